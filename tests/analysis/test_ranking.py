"""The ranking against a t interval computed by hand, and which runs are of one model."""

import json
import math

import numpy as np
import pytest
from evaluations import documents, write_evaluation

from lmlib.analysis import ranking
from lmlib.errors import UserError


def run(folder, name: str, seed, loss: float, text: str = "same", **config):
    run_dir = folder / name
    run_dir.mkdir(parents=True)
    record = {
        "kind": "eval",
        "step": 10,
        "val_loss": loss,
        "val_loss_stderr": 0.1,
        "val_accuracy": 0.2,
        "timing": {"seconds": 60.0},
    }
    (run_dir / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (run_dir / "config.json").write_text(
        json.dumps(
            {"seed": seed, "run_name": name, "batch_size": 1, **{"sequence_length": 8, **config}}
        )
    )
    model = {"parameter_count": 100, "active_parameter_count": 60, "flops_per_token": 600.0}
    (run_dir / "environment.json").write_text(
        json.dumps({"fingerprints": {"validation.bin": text, "train.bin": name}, "model": model})
    )
    (run_dir / "results.json").write_text("{}")
    return run_dir


def test_models_are_compared_by_the_differences_between_runs_of_one_seed(tmp_path):
    """The losses vary much between seeds, their differences little."""
    best = [
        run(tmp_path, f"best-seed{s}", s, loss, attention="mla")
        for s, loss in enumerate((4.0, 5.0, 6.0))
    ]
    worse = [
        run(tmp_path, f"worse-seed{s}", s, loss, attention="mha")
        for s, loss in enumerate((4.1, 5.12, 6.11))
    ]
    noise = [
        run(tmp_path, f"noise-seed{s}", s, loss, attention="x")
        for s, loss in enumerate((4.3, 4.9, 6.2))
    ]
    table = ranking.ranking(iter([*worse, *noise, *best]))
    assert list(table.index) == ["best", "worse", "noise"]
    losses = [[4.0, 5.0, 6.0], [4.1, 5.12, 6.11], [4.3, 4.9, 6.2]]
    mean = sum(map(sum, losses)) / 9
    left = 0.0  # residuals after each model's and each seed's mean
    for row in losses:
        for seed, loss in enumerate(row):
            left += (loss - sum(row) / 3 - sum(other[seed] for other in losses) / 3 + mean) ** 2
    half = 3.961 * math.sqrt(left / 4 * 2 / 3)  # t for 4 degrees of freedom at 1 - 0.025 / 3 pairs
    assert list(table["± seeds"])[1:] == [pytest.approx(half, rel=1e-3)] * 2
    assert half > 0.2 and list(table["verdict"])[1:] == ["documents unknown"] * 2

    pair = ranking.ranking(
        [*best, *worse]
    )  # without the noisy model a tenth of a nat is significant
    row = pair.loc["worse"]
    half = (
        4.303 * 0.01 / math.sqrt(3)
    )  # 0.10, 0.12 and 0.11: mean 0.11, deviation 0.01; t for two degrees of freedom
    assert (row["behind the best"], row["± seeds"]) == (
        pytest.approx(0.11),
        pytest.approx(half, rel=1e-3),
    )
    assert (row["validation loss"], row["spread"], row["seeds"]) == (
        pytest.approx(5.11),
        pytest.approx(1.005, abs=1e-2),
        3,
    )
    assert (row["parameters"], row["active"], row["FLOPs"], row["minutes"]) == (100, 60, 48_000, 1)
    said = "worse: 5.110 nats over 3 seeds, +0.110 ± 0.025 (seeds) to the best: documents unknown\n"
    assert said in ranking.summary([*best, *worse])
    assert {trace.name for trace in ranking.losses([*best, *worse]).data} == {"best", "worse"}
    curves = ranking.curves([*best, *worse])  # 5 and 5.11 around their mean
    assert [trace.y[0] for trace in curves.data] == pytest.approx([-0.055, 0.055])
    assert "5.055 (step 10)" in curves.layout.annotations[0].text
    assert curves.data[1].error_y.array[0] == pytest.approx(0.005)  # of 0.10, 0.12, 0.11, halved
    [interval] = [t for t in ranking.losses(worse).data if "lines" in t.mode]
    half = 4.303 * np.std([4.1, 5.12, 6.11], ddof=1) / math.sqrt(3)
    assert list(interval.x) == pytest.approx([5.11 - half, 5.11 + half], rel=1e-3)
    assert list(ranking.curves(best).data[0].y) == [5.0]  # one model: as it is
    assert [t.y[0] for t in ranking.losses([*worse, *best]).data if "lines" in t.mode] == [
        "worse",
        "best",
    ]  # drawn upward
    assert ranking.first_seeds([*best[::-1], *worse]) == [best[0], worse[0]]


def test_verdicts_say_what_cannot_be_compared(tmp_path):
    best = [run(tmp_path, f"a-seed{s}", s, 4.0, attention="mla") for s in (0, 1)]
    alone = run(tmp_path, "alone", 0, 4.5, attention="mha")
    other = [run(tmp_path, f"other-seed{s}", s, 5.0, text="another", corpus="x") for s in (0, 1)]
    unfinished = run(tmp_path, "unfinished", 0, 1.0, attention="y")
    (unfinished / "results.json").unlink()
    verdicts = ranking.ranking([*other, *best, alone, unfinished])["verdict"]
    assert verdicts.to_dict() == {"a": "best", "alone": "one seed: unknown", "other": "other text"}
    assert (
        ranking.count_states([*best, unfinished])
        == "3 runs: 2 finished, 1 stopped\nunfinished: stopped"
    )
    assert ranking.summary([unfinished]) == ranking.summary([]) == "No run is finished yet."
    assert len(ranking.losses([]).data) == len(ranking.curves([unfinished]).data) == 0


def test_runs_with_equal_parameters_are_of_one_model_whatever_their_names(tmp_path):
    """A seed trained twice counts once; an invalid seed and windows of another length raise nothing."""
    runs = [
        run(tmp_path, name, seed, 4.0 + seed, dropout=0.1)
        for name, seed in (("mlp", 0), ("mlp_s0", 0), ("mlp_s1", 1))
    ]
    [row] = ranking.ranking(runs).to_dict("records")
    assert (row["seeds"], row["validation loss"]) == (2, 4.5)
    odd = run(tmp_path, "odd", ["x"], 5.0, dropout=0.2)
    short = [run(tmp_path, f"short-seed{seed}", seed, 1.0, sequence_length=4) for seed in (0, 1)]
    table = ranking.ranking(
        [*runs, odd, *short, run(tmp_path, "more", 2, 4.0, sequence_length=8, dropout=0.3)]
    )
    assert table["verdict"].to_dict() == {
        "mlp": "best",
        "more": "one seed: unknown",
        "odd": "one seed: unknown",
        "short": "other text",
    }
    assert ranking.first_seeds([odd, *runs])


def test_equal_models_are_rarely_called_different():
    """In at most 5 % of 2,000 sweeps of 8 equal models (6 %, as the test is random) one is "worse"."""
    generator, wrong = np.random.default_rng(0), 0
    for _ in range(2000):
        losses = generator.normal(size=(8, 3)) * 0.01 + generator.normal(size=(1, 3))
        means = losses.mean(1)
        wrong += means.max() - means.min() > ranking._half_interval(losses)
    assert wrong / 2000 < 0.06


def test_models_without_two_seeds_in_common_are_not_compared(tmp_path):
    a = [run(tmp_path, f"a-seed{s}", s, 4.0, dropout=0.1) for s in (0, 1)]
    b = [run(tmp_path, f"b-seed{s}", s, 5.0, dropout=0.2) for s in (1, 2)]
    assert ranking.ranking([*a, *b])["verdict"].to_dict() == {
        "a": "best",
        "b": "no two seeds in common: unknown",
    }


def test_two_models_of_one_name_stay_apart(tmp_path):
    a = run(tmp_path / "x", "m-seed0", 0, 4.0, dropout=0.0)
    b = run(tmp_path / "y", "m-seed1", 1, 5.0, dropout=0.1)
    assert len(ranking.ranking([a, b])) == 2
    rates = [
        run(tmp_path, f"r-seed{s}-learning_rate{r}", s, 4.0, learning_rate=r)
        for s in (0, 1)
        for r in (0.1, 0.2)
    ]
    assert set(ranking.ranking(rates).index) == {"r-learning_rate0.1", "r-learning_rate0.2"}


def scored(folder, name: str, seed: int, losses: list[float], **config):
    """A finished run with its evaluation file; its loss is the mean over tokens of the file."""
    rows = documents(losses)
    tokens = sum(row[1] for entries in rows.values() for row in entries)
    loss = sum(row[0] for entries in rows.values() for row in entries) / tokens
    write_evaluation(run_dir := run(folder, name, seed, loss, **config), rows)
    return run_dir


EASY = np.linspace(3, 5, 8)  # losses of eight documents


def models(folder, difference: np.ndarray, count: int = 8, seeds=(0, 1, 2)) -> list:
    """Two models: the second is behind by `difference` (documents,), up to a little noise."""
    noise = np.random.default_rng(0).normal(0, 0.002, (2, len(seeds), len(difference)))
    return [
        scored(
            folder, f"{name}-seed{seed}", seed, [*(EASY + extra + noise[n, s])[:count]], dropout=n
        )
        for n, (name, extra) in enumerate((("a", 0 * difference), ("b", difference)))
        for s, seed in enumerate(seeds)
    ]


def test_a_difference_that_one_document_makes_is_within_the_noise(tmp_path):
    """Every seed agrees; another choice of documents would not."""
    of_one = ranking.ranking(models(tmp_path / "one", np.array([0.5, 0, 0, 0, 0, 0, 0, 0.0])))
    of_all = ranking.ranking(models(tmp_path / "all", np.full(8, 0.05)))
    for table, verdict in ((of_one, "within the noise"), (of_all, "worse")):
        row = table.loc["b"]
        assert row["behind the best"] > 3 * row["± seeds"] > 0 and row["documents"] == 8
        assert (row["behind the best"] > row["± documents"]) == (verdict == "worse")
        assert list(table["verdict"]) == ["best", verdict]
    assert of_one.loc["b", "± documents"] > 10 * of_all.loc["b", "± documents"]


def test_the_interval_over_documents_is_that_of_the_mean_over_seeds(tmp_path):
    runs = models(tmp_path, np.linspace(0, 0.1, 8))
    [row] = ranking.pairs(runs).reset_index().to_dict("records")
    tables = [
        ranking.comparison.compare(b, a).table for a, b in zip(runs[:3], runs[3:], strict=True)
    ]
    of_document = sum(table["difference"] for table in tables) / 3
    tokens = tables[0]["tokens"]
    mean = (of_document * tokens).sum() / tokens.sum()
    squares = ((tokens * (of_document - mean)) ** 2).sum()
    half = 2.3646 * math.sqrt(8 / 7 * squares) / tokens.sum()
    assert (row["model"], row["minus"], row["verdict"]) == ("b", "a", "worse")
    assert row["difference"] == pytest.approx(mean) and row["documents"] == 8
    assert row["± documents"] == pytest.approx(half, rel=1e-4)
    said = ranking.summary(runs)
    assert f"{mean:+.3f} ± {row['± seeds']:.3f} (seeds) ± {half:.3f} (documents)" in said
    assert said.endswith("other documents with these trained models.")
    assert ranking.best_two(runs) == [runs[0], runs[3]]


def test_more_pairs_have_wider_intervals_and_each_pair_has_a_row(tmp_path):
    two = models(tmp_path, np.full(8, 0.05))
    third = [scored(tmp_path, f"c-seed{s}", s, [*(EASY + 1)], dropout=3) for s in (0, 1, 2)]
    table = ranking.pairs([*two, *third])
    assert list(table.index) == [("b", "a"), ("c", "a"), ("c", "b")]
    of_two = ranking.pairs(two)["± documents"].iloc[0]
    assert table["± documents"].iloc[0] == pytest.approx(of_two * 3.1276 / 2.3646, rel=1e-3)


def test_few_documents_give_no_verdict(tmp_path):
    table = ranking.ranking(models(tmp_path, np.full(8, 0.5), count=4))
    assert list(table["verdict"]) == ["best", "few documents"] and table.loc["b", "documents"] == 4
    [one] = ranking.pairs(models(tmp_path / "1", np.full(8, 0.5), count=1)).to_dict("records")
    assert one["verdict"] == "few documents" and math.isnan(one["± documents"])


def test_the_verdict_is_one_sentence(tmp_path):
    two = models(tmp_path / "two", np.full(8, 0.05))
    assert ranking.verdict(two) == "b is worse than a."
    third = [scored(tmp_path, f"c-seed{s}", s, [*(EASY + 1)], dropout=3) for s in (0, 1, 2)]
    same = [
        scored(tmp_path, f"d-seed{s}", s, [*(EASY + 0.002 * s + 0.001)], dropout=4)
        for s in (0, 1, 2)
    ]
    other = [run(tmp_path, f"x-seed{s}", s, 5.0, text="another") for s in (0, 1)]
    sentence = ranking.verdict([*two, *third, *same, *other])
    assert sentence == (
        "b is worse than 2 of 3 other models; c is worse than 3 of 3 other models; all other "
        "differences are within the noise; not compared: x (other text)."
    )
    noise = models(tmp_path / "noise", np.array([0.5, 0, 0, 0, 0, 0, 0, 0.0]))
    assert ranking.verdict(noise) == "The difference between the two models is within the noise."
    few = ranking.verdict(models(tmp_path / "few", np.full(8, 0.5), count=4))
    assert few == "1 difference without a verdict (few documents)."
    assert ranking.verdict(two[:3]) == "There is nothing to compare: a."
    assert ranking.verdict([]) == "No run is finished yet."
    assert ranking.Verdict("<i>")._repr_html_().count("&lt;i&gt;") == 1


def test_models_scored_on_other_text_are_in_bits_per_byte_and_warned_of(tmp_path):
    best = models(tmp_path, np.full(8, 0.05))
    other = run(tmp_path, "other", 0, 0.5, text="another")
    records = (other / "metrics.jsonl").read_text()
    (other / "metrics.jsonl").write_text(
        records.replace('"val_loss": 0.5', '"val_loss": 0.5, "val_bits_per_byte": 2.75')
    )
    row = ranking.ranking([*best, other]).loc["other"]
    assert math.isnan(row["validation loss"]) and row["bits per byte"] == 2.75
    said = ranking.summary([*best, other])
    assert "other: 2.750 bits per byte over 1 seed: other text" in said
    assert "These runs differ in validation text" in said


def test_a_folder_without_a_finished_run_says_what_to_run(tmp_path):
    unfinished = run(tmp_path, "unfinished", 0, 1.0)
    (unfinished / "results.json").unlink()
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=r"^There is no finished run.*lmlib sweep params/exp8_"):
            ranking.sweep_runs(folder)
    run(tmp_path, "finished", 1, 1.0)
    assert len(ranking.sweep_runs(tmp_path)) == 2


def test_runs_without_or_with_damaged_evaluation_files_get_no_verdict(tmp_path):
    runs = models(tmp_path, np.full(8, 0.5))
    (runs[0] / "evaluations" / "validation_step_10.json").write_text("{")
    table = ranking.ranking(runs)
    assert list(table["verdict"]) == ["best", "documents unknown"] and not ranking.best_two(runs)
    assert math.isnan(table.loc["b", "± documents"]) and table["documents"].isna().all()
    for nothing in ([], runs[:1]):
        assert ranking.pairs(nothing).empty and ranking.best_two(nothing) == []


def test_what_models_were_evaluated_on_is_told_by_the_hashes_of_their_data(tmp_path):
    runs = models(tmp_path, np.full(8, 0.05))
    for folder, text in zip(runs, "xxxxxy", strict=True):
        data = {"training": folder.name, "validation": text, "tokenizer": "t", "test": None}
        (folder / "environment.json").write_text(json.dumps({"data": data, "lineage": "complete"}))
    assert list(ranking.scores(runs)["evaluated on"].value_counts()) == [5, 1]
    assert list(ranking.ranking(runs)["verdict"]) == ["best", "worse"]


def test_unknown_lineage_is_noted_and_the_test_score_stands_beside(tmp_path):
    runs = models(tmp_path, np.full(8, 0.05))
    for folder in runs[3:]:
        (folder / "environment.json").write_text(
            json.dumps({"fingerprints": {"validation.bin": "same"}, "lineage": "unknown"})
        )
        (folder / "results.json").write_text(json.dumps({"test_loss": 1.0}))
    table = ranking.ranking(runs)
    assert list(table["notes"]) == ["", "lineage unknown"]
    assert math.isnan(table.loc["a", "test loss"]) and table.loc["b", "test loss"] == 1
    assert list(table.index) == ["a", "b"]  # the test score ranks nothing
    assert ": worse (lineage unknown)" in ranking.summary(runs)
