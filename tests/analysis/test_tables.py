"""Tables for people: a card for one run, formatted columns for several."""

import json
import math
import re
import shutil

import pandas as pd
import pytest

from lmlib.analysis import frames, ranking, tables
from lmlib.intervals import student_t


def write_run(folder, loss: float = 4.0, **results):
    folder.mkdir()
    record = {"kind": "eval", "step": 1200, "val_loss": loss, "val_loss_stderr": 0.1}
    record |= {"val_documents": 7, "val_accuracy": 0.25, "val_perplexity": math.exp(loss)}
    record |= {"val_bits_per_byte": loss / 2, "timing": {"seconds": 90.0}}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "config.json").write_text(json.dumps({"seed": 0}))
    model = {"parameter_count": 1234567, "active_parameter_count": 1234567}
    (folder / "environment.json").write_text(json.dumps({"model": model}))
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def cells_of(table: tables.Table) -> list[list[str]]:
    rows = re.findall("<tr>(.*?)</tr>", table._repr_html_(), re.DOTALL)
    return [re.findall("<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in rows]


def test_one_run_is_a_card(tmp_path):
    measured = {"scores": "validation text", "test": "test text"}
    test = {"test_loss": 4.2, "test_loss_stderr": 0.2, "test_documents": 5, "test_accuracy": 0.2}
    run = write_run(tmp_path / "run", measured_on=measured, **test)
    card = tables.results([run])
    half = student_t(0.975, 6) * 0.1
    for shown in (card._repr_html_(), repr(card)):
        assert f"4.000 ± {half:.3f}" in shown and "25.0 %" in shown and "2.000" in shown
        assert "4.200 ± 0.555" in shown and "1,234,567 parameters" in shown
        assert "step 1,200" in shown and "1.5 minutes" in shown and "finished" in shown
        assert "validation: 7 documents, validation text" in shown
        assert "test: 5 documents, test text" in shown
        assert "nan" not in shown.lower() and "<NA>" not in shown and "e+" not in shown


def test_a_card_shows_notes_and_what_is_missing(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    card = tables.results(empty)
    assert "Note: no records yet" in repr(card) and "–" in repr(card)
    assert "no records yet" in card._repr_html_() and "nan" not in card._repr_html_().lower()
    damaged = write_run(tmp_path / "run", test_loss={}, measured_on=[1], test_documents="x")
    assert "test" not in repr(tables.results(damaged))


def test_several_runs_are_columns_with_the_best_in_bold(tmp_path):
    runs = [write_run(tmp_path / name, loss) for name, loss in (("a", 4.5), ("b", 4.0))]
    table = tables.results(runs)
    head, a, b = cells_of(table)
    assert head[:5] == ["run", "state", "steps", "validation loss", "± 95 %"]
    assert "active" not in head and "best" not in head and "notes" not in head  # nothing new
    bold = {name for name, cell in zip(head, b, strict=True) if "<b>" in cell}
    assert bold == {"validation loss", "bits per byte", "accuracy", "perplexity"}
    assert {name for name, cell in zip(head, a, strict=True) if "<b>" in cell} == {"accuracy"}
    assert a[2] == "1,200" and a[head.index("parameters")] == "1,234,567"
    assert "4.500" in repr(table) and "<b>" not in repr(table)


def test_runs_in_other_tokens_have_a_warning_and_the_best_in_bits_per_byte(tmp_path, trained):
    other = tmp_path / "other"
    shutil.copytree(trained.run_dir, other, ignore=shutil.ignore_patterns("checkpoints"))
    known = json.loads((other / "environment.json").read_text())
    known["data"]["tokenizer"] = "another"
    (other / "environment.json").write_text(json.dumps(known))
    table = tables.results([trained.run_dir, other])
    assert "These runs differ in tokenizer" in repr(table) and "differ in tok" in table.html
    head, first, _ = cells_of(table)
    assert [name for name, cell in zip(head, first, strict=True) if "<b>" in cell] == [
        "bits per byte"
    ]


def test_numbers_have_no_e_notation_and_are_never_nan():
    frame = pd.DataFrame(
        {
            "validation loss": [4.0, 3.0, math.nan],
            "FLOPs": [2.2837e13, 1e21, math.inf],
            "learning_rate": [1e-5, 0.0028, math.nan],
            "difference": [0.1, -0.05, math.nan],
            "parameters": pd.array([2459712, 5, None], "Int64"),
            "verdict": ["best", "leaks", "worse"],
            "init_from": [None, "<b>$x$\x1b", ["a"]],
        },
        index=pd.Index(["one", "two", "three"], name="model"),
    )
    table = tables.formatted(frame, "a <caption>")
    rows = cells_of(table)
    first = ["one", "4.000", "2.28 × 10¹³", "0.00001", "+0.100", "2,459,712", "best", "none"]
    assert rows[1] == first
    assert rows[2][1:6] == ["3.000", "1.00 × 10²¹", "0.0028", "−0.050", "5"]  # leaks: not best
    assert rows[3][1:6] == ["–"] * 5
    assert "&lt;b&gt;$x$\\x1b" in table.html and "a &lt;caption&gt;" in table.html
    assert "nan" not in repr(table).lower() and "e-0" not in repr(table)


def test_rankings_are_formatted_empty_ones_too(tmp_path):
    runs = []
    for model, loss in (("a", 4.0), ("b", 4.1)):
        for seed in (0, 1):
            runs.append(write_run(tmp_path / f"{model}-seed{seed}", loss + seed / 100))
            (runs[-1] / "config.json").write_text(json.dumps({"seed": seed, "corpus": model}))
    table = tables.formatted(ranking.ranking(runs))
    assert [row[0] for row in cells_of(table)] == ["model", "a", "b"]
    assert "<b>4.005</b>" in table.html and "nan" not in table.html.lower()
    assert cells_of(tables.formatted(ranking.pairs(runs)))[1][:2] == ["b", "a"]
    for empty in (ranking.ranking([]), ranking.pairs([])):
        assert repr(tables.formatted(empty)) == "No rows"


def test_the_state_of_a_run_is_a_badge_that_reads_on_light_and_dark():
    for state, color in tables.BADGES.items():
        parts = [int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert 1.05 / (light + 0.05) > 4.5, state  # white text
    assert "&lt;x&gt;" in tables.badge("<x>")


def test_the_interval_of_a_card_needs_two_documents():
    assert tables.interval_half(0.1, 2) == pytest.approx(1.27062, rel=1e-4)
    assert all(math.isnan(tables.interval_half(*pair)) for pair in ((0.1, 1), (math.nan, 9)))
    assert frames.FEW > 2  # fewer have a note


def test_columns_without_any_value_are_left_out():
    table = tables.formatted(pd.DataFrame({"model": ["a", "b"], "test loss": [None, float("nan")]}))
    assert "model" in table.html and "test loss" not in table.html + repr(table)
    assert "test loss" in tables.formatted(pd.DataFrame({"test loss": []})).html


def test_scores_near_their_limits_keep_the_digits_that_tell_them_apart():
    shown = tables.formatted(
        pd.DataFrame({"accuracy": [0.9995, 0.268], "perplexity": [1.003, 61.6]})
    )
    assert all(text in shown.html for text in ("99.95 %", "26.8 %", "1.003", "61.6"))


def test_a_badge_holds_the_state_alone():
    assert re.search(r">died</span> it LEAKS \(&lt;b&gt;\)$", tables.badge("died; it LEAKS (<b>)"))
