"""The audit of a run: before its first step, in what it leaves behind, and of whatever is there afterwards."""

import json
import random
import shutil
from dataclasses import replace

import pytest
import torch
import transformers

import lmlib
from lmlib import checkpoint
from lmlib.analysis import audit_page, figures, frames, ranking
from lmlib.audit import Report
from lmlib.audit.causality import pattern
from lmlib.cli.parser import main
from lmlib.data.corpus import content_hash
from lmlib.generation.settings import Settings
from lmlib.leaks import LEAKY, Leaky
from lmlib.model.attention import LatentAttention
from lmlib.notebook.playground import Playground
from lmlib.run.run_audit import audit, scores_elsewhere
from lmlib.run.start import find_start, open_store
from lmlib.sweep.learning_rate import find_learning_rate


def results(config):
    return json.loads((config.run_dir / "results.json").read_text())


@pytest.fixture(scope="module")
def leaky(outputs):
    """Runs with one fault of the original protocol each, trained with allow_leaks."""
    made = {}
    for name, fault in {
        "maskless": {"causal_mask": False},
        "overlapping": {"split": "windows"},
    }.items():
        made[name] = lmlib.RunConfig.load(
            "params/smoke.yaml",
            output_dir=outputs,
            run_name=name,
            allow_leaks=True,
            total_steps=10,
            **fault,
        )
        list(lmlib.train(made[name]))
    return made


# ---------------------------------------------------------------------------------------------------
# Before step 1


def test_an_honest_run_passes_and_its_results_say_so(trained):
    found = results(trained)["audit"]
    assert found["passed"] is True and found["leaks"] == "" and found["allow_leaks"] is False
    assert list(found["verdicts"]) == [
        "causality",
        "batch independence",
        "cache",
        "labels",
        "evaluation",
        "split",
        "lineage",
    ]
    assert LEAKY not in results(trained) and LEAKY not in json.loads(
        (trained.run_dir / "config.json").read_text()
    )


@pytest.mark.parametrize(
    "fault, check",
    [
        ({"causal_mask": False}, "causality: .*whole window"),
        ({"split": "windows"}, "split: 100.00%"),
    ],
)
@pytest.mark.parametrize("attention", ["mla", "mha"])
def test_a_run_that_leaks_is_refused_and_leaves_nothing(smoke, fault, check, attention):
    config = smoke(attention=attention, **fault)
    with pytest.raises(Leaky, match=rf"(?s)nothing was trained.*{check}.*allow_leaks: true"):
        list(lmlib.train(config))
    assert not config.run_dir.exists()


def test_a_fault_is_found_behind_layers_that_are_initialized_to_zero(smoke, monkeypatch):
    """The attention's output matrix starts at zero, so the untrained model's logits show no leak at all."""
    honest = LatentAttention.forward

    def blurred(self, x, angles, mask=None, cache=None, layer=0):
        y = honest(self, x, angles, mask, cache, layer)
        return y + (y.mean(1, keepdim=True) if cache is None else 0)

    monkeypatch.setattr(LatentAttention, "forward", blurred)
    with pytest.raises(ValueError, match="This run leaks"):
        list(lmlib.train(smoke()))


def test_short_overlapping_windows_and_a_leaky_parent_are_refused_too(smoke, leaky):
    with pytest.raises(Leaky, match="overlap in one text"):
        list(lmlib.train(smoke(split="windows", sequence_length=8)))
    parent = leaky["overlapping"].run_dir
    with pytest.raises(Leaky, match=r"init_from: the model that it starts from leaks \(split\)"):
        list(lmlib.train(smoke(init_from=str(parent))))
    child = smoke(init_from=str(parent), allow_leaks=True, total_steps=2)
    list(lmlib.train(child))
    assert results(child)[LEAKY] == "split, lineage, init_from"


def test_a_run_that_was_never_audited_is_audited_when_it_resumes(smoke):
    config = smoke(causal_mask=False, allow_leaks=True, total_steps=2)
    list(lmlib.train(config))
    environment = json.loads((config.run_dir / "environment.json").read_text())
    del environment["audit"]
    (config.run_dir / "environment.json").write_text(json.dumps(environment))
    longer = lmlib.RunConfig(**{**config.to_dict(), "total_steps": 3})
    list(lmlib.train(longer))
    assert results(longer)[LEAKY] == "causality, cache"


def test_a_range_test_refuses_what_leaks(smoke):
    with pytest.raises(Leaky):
        find_learning_rate(smoke(causal_mask=False), steps=3)


def test_text_in_both_splits_stops_a_run_or_marks_it(smoke, tmp_path):
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"text": f"{n} " + "so say we all, " * 60}) + "\n" for n in range(40))
    )
    (tmp_path / "other.jsonl").write_text(
        "".join(json.dumps({"text": "so say we all, " * 60}) + "\n" for n in range(9))
    )
    config = smoke(
        corpus=str(tmp_path / "train.jsonl"),
        validation_corpus=str(tmp_path / "other.jsonl"),
        test_fraction=0,
        total_steps=2,
    )
    with pytest.raises(Leaky, match="split: validation: .* that training text has"):
        list(lmlib.train(config))
    marked = replace(config, allow_leaks=True)
    list(lmlib.train(marked))
    assert results(marked)["audit"]["leaks"] == results(marked)[LEAKY] == "split"


def test_a_validation_corpus_that_is_the_corpus_is_refused(smoke, text_file):
    """Its documents are trained on, to the last one."""
    config = smoke(corpus=str(text_file), validation_corpus=str(text_file), test_fraction=0)
    with pytest.raises(Leaky, match="lineage: .* held-out documents"):
        list(lmlib.train(config))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Return a corpus of 120 documents of random words, which have nothing in common."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=5)) for _ in range(3000)]
    file = tmp_path_factory.mktemp("rows") / "c.jsonl"
    texts = (" ".join(draw.choices(words, k=120)) for _ in range(120))
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return file


def test_held_out_documents_that_a_parent_trained_on_are_a_leak(smoke, rows):
    parent = smoke(corpus=str(rows), validation_fraction=0.1, total_steps=3)
    list(lmlib.train(parent))
    child = smoke(
        corpus=str(rows), validation_fraction=0.6, init_from=str(parent.run_dir), total_steps=3
    )
    with pytest.raises(Leaky, match=r"lineage: \d+ of the \d+ held-out documents"):
        list(lmlib.train(child))
    same = smoke(
        corpus=str(rows), validation_fraction=0.1, init_from=str(parent.run_dir), total_steps=3
    )
    list(lmlib.train(same))
    assert results(same)["lineage"] == "complete" and LEAKY not in results(same)
    # A grandparent counts, whatever lies between.
    middle = smoke(
        corpus=str(rows),
        validation_fraction=0.6,
        init_from=str(parent.run_dir),
        total_steps=3,
        allow_leaks=True,
    )
    list(lmlib.train(middle))
    mark = json.loads((middle.run_dir / "config.json").read_text())[LEAKY]
    assert "lineage" in mark
    hashes = checkpoint.read_lineage(middle.run_dir / "checkpoints" / "checkpoint_step_3")
    assert len(hashes) > len(open_store(find_start(middle)).documents("training"))


def test_an_ancestors_text_is_searched_where_its_tokens_are_here(smoke, rows, tmp_path):
    """A copy with other words at its beginning has another hash, but shares the rest."""
    texts = [json.loads(line)["text"] for line in rows.read_text().splitlines()]
    parent = smoke(corpus=str(rows), total_steps=3)
    list(lmlib.train(parent))
    other = tmp_path / "other.jsonl"
    changed = [{"text": f"another beginning {text}"} for text in texts]
    other.write_text("\n".join(map(json.dumps, changed)))
    child = smoke(corpus=str(other), init_from=str(parent.run_dir), total_steps=3)
    with pytest.raises(Leaky, match="split: .* with an ancestor's text"):
        list(lmlib.train(child))
    stream = open_store(find_start(parent)).info["training"]["hash"]
    for file in (parent.run_dir.parent / ".tokens").glob("*/store.json"):
        if json.loads(file.read_text())["training"]["hash"] == stream:
            shutil.rmtree(file.parent)
    list(lmlib.train(child))
    assert "only exact copies are found" in results(child)["audit"]["verdicts"]["split"]


def test_a_parent_without_lineage_is_never_passed(smoke, rows, trained, tmp_path):
    """A Hugging Face folder: nobody knows what it was trained on."""
    folder = tmp_path / "model"
    shutil.copytree(trained.run_dir / "checkpoints" / "checkpoint_step_20", folder)
    shutil.rmtree(folder / "training_state")
    for name in ("checkpoint.json", "lineage.bin"):
        (folder / name).unlink()
    child = smoke(corpus=str(rows), init_from=str(folder), total_steps=3)
    list(lmlib.train(child))
    found = results(child)
    assert found["lineage"] == "unknown"
    assert found["audit"]["verdicts"]["lineage"].startswith("not judged lineage: lineage unknown")
    card = (child.run_dir / "checkpoints" / "checkpoint_step_3" / "README.md").read_text()
    assert "Lineage unknown" in card and "Test loss" in card
    assert "lineage unknown" in frames.results_table(child.run_dir)["state"].iloc[0]
    # Its children do not know either.
    grandchild = smoke(corpus=str(rows), init_from=str(child.run_dir), total_steps=3)
    list(lmlib.train(grandchild))
    assert results(grandchild)["lineage"] == "unknown"


def test_contamination_of_windows_shorter_than_an_ngram_is_found(smoke, rows, tmp_path):
    texts = [json.loads(line)["text"] for line in rows.read_text().splitlines()]
    held_out = [text for text in texts if content_hash(text) < 0.3 * 2**64]
    copies = [f"{text} {held_out[n % len(held_out)]}" for n, text in enumerate(texts)]
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": text}) for text in [*held_out, *copies]))
    config = smoke(corpus=str(corpus), validation_fraction=0.3, sequence_length=8, total_steps=3)
    with pytest.raises(Leaky, match="split: "):
        list(lmlib.train(config))


def test_a_run_is_audited_again_when_the_code_of_its_model_changes(smoke, monkeypatch):
    config = smoke(total_steps=6, checkpoint_every=3)
    run = lmlib.train(config)
    assert any(record.kind == "checkpoint" for record in run)
    run.close()
    before = json.loads((config.run_dir / "environment.json").read_text())["audit"]
    honest = LatentAttention.forward
    monkeypatch.setattr(
        LatentAttention, "forward", lambda self, x, *rest: honest(self, x, *rest) + x.roll(-1, 1)
    )
    with pytest.raises(Leaky, match="causality"):
        list(lmlib.train(replace(config, total_steps=8)))
    monkeypatch.undo()
    records = list(lmlib.train(replace(config, total_steps=8)))
    assert "audit" not in {record.kind for record in records}
    assert json.loads((config.run_dir / "environment.json").read_text())["audit"] == before


def test_the_audit_changes_neither_weights_nor_batches(smoke, monkeypatch):
    audited, plain = smoke(total_steps=4), smoke(total_steps=4)
    list(lmlib.train(audited))
    monkeypatch.setattr(
        "lmlib.run.prepare.before_training", lambda *given: {"leaks": "", "verdicts": {}}
    )
    list(lmlib.train(plain))
    weights = [
        (c.run_dir / "checkpoints" / "checkpoint_step_4" / "model.safetensors").read_bytes()
        for c in (audited, plain)
    ]
    assert weights[0] == weights[1]


# ---------------------------------------------------------------------------------------------------
# What a leaky run shows


@pytest.mark.parametrize(
    "name, leaks", [("maskless", "causality, cache"), ("overlapping", "split")]
)
def test_everything_that_a_leaky_run_shows_is_marked(name, leaks, leaky, capsys):
    config = leaky[name]
    assert results(config)[LEAKY] == leaks and results(config)["audit"]["passed"] is False
    assert json.loads((config.run_dir / "config.json").read_text())[LEAKY] == leaks
    folder = config.run_dir / "checkpoints" / "checkpoint_step_10"
    for file in ("config.json", "checkpoint.json"):
        assert json.loads((folder / file).read_text())[LEAKY] == leaks
    assert f"This model leaks ({leaks})" in (folder / "README.md").read_text()
    assert "(LEAKY)" in (config.run_dir / "training_curves.html").read_text()

    frame = frames.read_runs(config.run_dir)
    assert set(frame["run"]) == {f"{name} (LEAKY)"}
    assert "it LEAKS" in frames.results_table(frame)["state"].iloc[
        0
    ] and "it LEAKS" in frames.headline(frame, f"{name} (LEAKY)")
    for figure in (figures.training_curves(frame), figures.loss_by_position(frame)):
        assert all("(LEAKY)" in trace.name for trace in figure.data)
    record = next(
        r
        for r in map(json.loads, (config.run_dir / "metrics.jsonl").read_text().splitlines())
        if r["kind"] == "audit"
    )
    assert record["leaks"] == leaks

    assert main(["generate", str(config.run_dir), "--mode", "batch", "--prompts", "ROMEO"]) == 0
    assert f"This model LEAKS ({leaks})" in capsys.readouterr().err
    assert [label for label, _ in Playground(config.run_dir, "ROMEO", Settings()).step.options][
        -1
    ] == "step 10 (LEAKY)"


def test_what_was_measured_of_overlapping_windows_is_not_called_held_out(leaky):
    measured_on = results(leaky["overlapping"])["measured_on"]
    assert (
        measured_on["scores"].startswith("NOT held out")
        and measured_on["held_out_share_of_tokens"] == 0
    )


def test_a_leaky_model_is_loaded_as_it_was_trained_and_resumes(leaky):
    model, _ = lmlib.load(leaky["maskless"].run_dir)
    assert model.config.causal_mask is False
    ids = torch.arange(20)[None]
    changed = torch.cat((ids[:, :-1], ids[:, :1]), dim=1)
    assert not torch.equal(model(ids)[:, 0], model(changed)[:, 0])
    longer = lmlib.RunConfig(**{**leaky["maskless"].to_dict(), "total_steps": 12})
    assert (
        list(lmlib.train(longer))[-1].kind == "done"
        and results(longer)[LEAKY] == "causality, cache"
    )
    again = lmlib.RunConfig.load(longer.run_dir / "config.json")
    assert again.causal_mask is False and again.allow_leaks is True


def test_leaky_runs_are_never_ranked_beside_honest_ones(leaky, trained):
    table = ranking.ranking([leaky["maskless"].run_dir, trained.run_dir])
    assert table["verdict"].tolist() == ["best", "leaks"] and table.index[-1] == "maskless (LEAKY)"
    assert ranking.ranking([leaky["maskless"].run_dir])["verdict"].tolist() == ["leaks"]
    assert "leaks" in ranking.summary([leaky["overlapping"].run_dir])


def test_runs_of_one_leaky_model_keep_the_mark(outputs, trained):
    folders = []
    for name in ("twinA", "twinB"):
        config = lmlib.RunConfig.load(
            "params/smoke.yaml",
            output_dir=outputs,
            run_name=name,
            allow_leaks=True,
            total_steps=2,
            split="windows",
            seed=len(folders),
        )
        list(lmlib.train(config))
        folders.append(config.run_dir)
    table = ranking.ranking([*folders, trained.run_dir])
    assert dict(table["verdict"]) == {"trained": "best", "twin (LEAKY)": "leaks"}


def test_overlapping_windows_are_split_without_repetition(leaky):
    store = open_store(find_start(leaky["overlapping"]))
    total = len(store.train) - store.config.sequence_length
    held_out = store.starts(torch.arange(store.window_count("validation")).numpy(), held_out=True)
    training = store.starts(torch.arange(store.window_count("training")).numpy())
    assert sorted([*held_out, *training]) == list(range(total))
    assert len(held_out) == round(0.15 * total)


# ---------------------------------------------------------------------------------------------------
# Afterwards


def test_a_run_is_audited_in_the_terminal_and_on_a_page(trained, capsys, tmp_path):
    page = tmp_path / "audit.html"
    assert main(["audit", str(trained.run_dir), "--page", str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [
        "causality",
        "batch independence",
        "cache",
        "labels",
        "split",
        "lineage",
        "tokenizer",
        "record",
        "sample",
    ]
    names += ["evaluation", "profile"]
    assert [line[11 : line.index(":")] for line in lines[:-1]] == names and all(
        line.startswith("pass") for line in lines[:-1]
    )
    assert "measured again from its checkpoint" in lines[7] and lines[-1] == f"The page: {page}"
    text = page.read_text()
    assert "trained: no leak found; all 11 checks passed." in text and "Plotly.newPlot" in text


def test_a_terminal_shows_each_verdict_in_color_with_its_number(trained, capsys, monkeypatch):
    page = ["--page", str(trained.run_dir.parent / "audit.html")]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(["audit", str(trained.run_dir), *page]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith(" 3 of 11  \x1b[32mpass\x1b[0m       cache: ")
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["audit", str(trained.run_dir), *page]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_reports_come_as_their_checks_are_made(trained, monkeypatch):
    """And a notebook shows them at once, in color, with the number that is left."""
    found = audit(trained.run_dir)
    reports = iter(found)
    assert len(found) == 11 and next(reports).check == "causality"
    shown = []

    class Handle:
        def update(self, bundle, raw):
            shown.append(bundle)

    def display(bundle, **options):
        shown.append(bundle)
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    watched = audit_page.watch(found, trained.run_dir)
    assert next(watched).check == "causality"
    assert "1 of 11 checks made; now: batch independence" in shown[-1]["text/html"]
    assert len(list(watched)) == 10
    assert "pass       profile" in shown[-1]["text/plain"]
    assert "trained: no leak found; all 11 checks passed." in shown[-1]["text/html"]


def test_the_sentence_says_what_failed_and_what_could_not_be_made():
    passed, failed, unknown = (
        Report(check, verdict, "<i>")
        for check, verdict in (("labels", True), ("causality", False), ("sample", None))
    )
    say = audit_page.verdict
    assert say([passed, passed], "outputs/a") == "a: no leak found; all 2 checks passed."
    assert say([passed, unknown], "a") == (
        "a: no leak found; 1 of 2 checks passed, 1 could not be made (sample)."
    )
    assert say([passed, failed, unknown], "a") == (
        "a: LEAKS; 1 of 3 checks passed, 1 failed (causality), 1 could not be made (sample)."
    )
    record = Report("record", False, "another score")
    assert say([passed, record], "a").startswith("a: no leak found; 1 of 2 checks passed, 1 failed")
    table = audit_page.table([passed, failed, unknown], "<b>")
    assert "<i>" not in table and "<b>:" not in table and "LEAKS" in table
    assert len({color for color in audit_page.COLORS.values() if color in table}) == 3
    figure = audit_page.figure([passed], "no_mask <b>")
    assert "<b>no_mask &lt;b&gt;</b>" in {note.text for note in figure.layout.annotations}


def test_a_leaky_run_fails_its_audit(leaky, capsys):
    assert main(["audit", str(leaky["overlapping"].run_dir), "--step", "5"]) == 1
    shown = capsys.readouterr().out
    assert "FAIL       split: 100.00%" in shown and "at step 5 the run recorded" in shown
    assert (leaky["overlapping"].run_dir / "audit.html").exists()


def test_a_score_that_was_changed_by_hand_is_found(trained, tmp_path):
    shutil.copytree(trained.run_dir, tmp_path / "changed")
    shutil.copytree(trained.run_dir.parent / ".tokens", tmp_path / ".tokens")
    file = tmp_path / "changed" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text(
        "".join(
            json.dumps({**line, **({"val_loss": 1.0} if "val_loss" in line else {})}) + "\n"
            for line in lines
        )
    )
    reports = {report.check: report for report in audit(tmp_path / "changed")}
    assert (
        reports["record"].passed is False and "recorded 1.000000 nats" in reports["record"].summary
    )
    file.write_text(
        "".join(
            json.dumps({**line, **({"val_loss": None} if "val_loss" in line else {})}) + "\n"
            for line in lines
        )
    )
    report = next(report for report in audit(tmp_path / "changed") if report.check == "record")
    assert report.passed is None and "no recorded score at step 20" in report.summary


def test_a_checkpoint_and_a_folder_of_transformers_are_audited(trained, tmp_path, capsys):
    assert main(["audit", str(trained.run_dir / "checkpoints" / "checkpoint_step_5")]) == 0
    config = transformers.GPT2Config(
        vocab_size=99,
        n_embd=32,
        n_layer=1,
        n_head=4,
        n_positions=16,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    capsys.readouterr()
    assert main(["audit", str(tmp_path / "gpt2")]) == 0
    assert [line[:4] for line in capsys.readouterr().out.splitlines()] == ["pass"] * 4


@pytest.mark.parametrize(
    "given, message",
    [
        (["no/such/folder/at/all"], "There is no folder"),
        (["outputs/no_such_run"], "There is no folder"),
        (["./no_such_run"], "There is no folder"),
        (["no-such-organization/model"], "transformers cannot load it"),
        (["{run}", "--step", "7"], "has no checkpoint of step 7"),
        (["{run}", "--page", "no/folder/audit.html"], "lie in a folder that exists"),
        (["{run}", "--page", "audit.txt"], "must end in .html"),
        (["{run}/checkpoints/checkpoint_step_5", "--step", "5"], "step=5 does not apply"),
    ],
)
def test_what_cannot_be_audited_is_a_clear_error(given, message, trained, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["audit", *(word.format(run=trained.run_dir) for word in given)]) == 1
    assert message in capsys.readouterr().err


def test_scores_elsewhere_are_of_text_that_the_other_run_held_out(leaky, trained):
    rows = scores_elsewhere(leaky["overlapping"].run_dir, trained.run_dir)
    assert [row["step"] for row in rows] == [5, 10] and all(row["val_loss"] > 3 for row in rows)
    held_out = open_store(find_start(trained)).info["validation"]["documents"]
    assert [row["val_documents"] for row in rows] == [held_out, held_out]  # spread over all


# ---------------------------------------------------------------------------------------------------
# How leaks are described


def matrix(T, leaks):
    return torch.tensor([[s > t and leaks(t, s) for s in range(T)] for t in range(T)])


@pytest.mark.parametrize(
    "leaks, words",
    [
        (lambda t, s: True, "whole window"),
        (lambda t, s: t // 16 == s // 16, "blocks of 16"),
        (lambda t, s: t // 7 == s // 7, "blocks of 7"),
        (lambda t, s: s == t + 1, "the next token (a mask off by one, a centered convolution)"),
        (lambda t, s: s <= t + 3, "the next 3 tokens"),
        (lambda t, s: s == 49, "wraps around: the beginning sees the end"),
        (lambda t, s: t == 0, "wraps around: the beginning sees the end"),
        (lambda t, s: (t, s) == (20, 30), "positions 20 to 20 see tokens 30 to 30"),
        (lambda t, s: False, ""),
    ],
)
def test_patterns_of_pairs_are_named(leaks, words):
    assert pattern(matrix(50, leaks)) == words
