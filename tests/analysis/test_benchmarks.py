"""The scores that lmlib benchmark keeps, as a frame and as a figure."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lmlib.analysis import frames, render
from lmlib.analysis.benchmarks import benchmark_curves, read_benchmarks
from lmlib.intervals import student_t
from lmlib.notebook.explorer import panels


def write(run_dir: Path, step: int, *scores: dict):
    folder = run_dir / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"step_{step}.json").write_text(json.dumps({"step": step, "scores": scores}))


def score(value: float, task: str = "run_choice", metric: str = "acc", chance: float = 0.25):
    return {
        "task": task,
        "metric": metric,
        "score": value,
        "stderr": 0.01,
        "chance": chance,
        "items": 200,
        "clusters": 6,
    }


def test_scores_are_drawn_by_step_with_intervals_and_chance(tmp_path):
    bits = {"task": "run_text", "metric": "bits_per_byte", "chance": 8.0}
    write(tmp_path / "a", 200, score(0.5), score(2.0, **bits))
    write(tmp_path / "a", 100, score(0.3), score(2.5, **bits))
    write(tmp_path / "b", 100, score(0.4))
    figure = benchmark_curves(frames.read_runs([tmp_path / "a", tmp_path / "b"]))
    choice_a, choice_b, chance, bits_a, bits_b = figure.data
    assert list(choice_a.x) == [100, 200] and list(choice_a.y) == [0.3, 0.5]
    assert choice_a.error_y.array == pytest.approx([student_t(0.975, 5) * 0.01] * 2)
    assert list(choice_b.y) == [0.4] and set(chance.y) == {0.25} and chance.line.dash == "dot"
    assert list(bits_a.y) == [2.5, 2.0] and list(bits_b.y) == []
    titles = [note.text for note in figure.layout.annotations]
    assert titles == [
        "<b>run_choice</b>  acc, chance 0.25",
        "<b>run_text</b>  bits_per_byte, chance 8",
    ]
    assert render.png(figure).startswith(b"\x89PNG")


def test_curves_ipynb_shows_them(trained, tmp_path):
    """Its charts beside the curves are the explorer's panels."""
    run = shutil.copytree(trained.run_dir, tmp_path / "run")
    assert "Benchmarks" not in panels(frames.read_runs(run))
    write(run, 20, score(0.3))
    assert len(panels(frames.read_runs(run))["Benchmarks"].data) == 2


def test_damaged_files_are_left_out(tmp_path):
    run = tmp_path / "run"
    write(run, 100, score(0.3), {"task": "<b>", "score": [1]}, "text", {**score(0.1), "step": 3})
    write(run, 200, {"task": "<b>x", "metric": None, "score": "0.5", "clusters": [2]})
    (run / "benchmarks" / "step_300.json").write_text("{")
    (run / "benchmarks" / "step_400.json").write_text('{"scores": 1}')
    table = read_benchmarks(frames.read_runs(run))
    assert table["score"].tolist() == [0.3, 0.1, 0.5] and table["step"].tolist() == [100, 100, 200]
    assert np.isnan(table["clusters"].iloc[-1])
    figure = benchmark_curves(frames.read_runs(run))
    assert "&lt;b&gt;x" in figure.layout.annotations[0].text
    assert render.png(figure).startswith(b"\x89PNG")


def test_runs_without_benchmarks_draw_nothing(trained):
    assert not benchmark_curves(frames.read_runs(trained.run_dir)).data
