"""Frames and figures, of whole runs and of broken ones."""

import json

import pandas as pd
import pytest

from lmlib import figures


def test_every_record_is_a_row(trained):
    frame = figures.read_runs(trained.run_dir)
    assert list(frame["kind"].value_counts()[["step", "eval", "checkpoint", "done"]]) == [20, 5, 4, 1]
    assert {"run", "loss", "learning_rate", "val_loss", "tokens_per_second", "seconds"} <= set(frame)
    assert "timing" not in frame and set(frame["run"]) == {"trained"}


@pytest.mark.parametrize(
    "text",
    ["", '{"kind": "eval", "step": 0, "val_loss"', '{"kind": "step", "step": 1, "loss": NaN}\n', "5\n[]\nnull\n", "\x00\xff\n"],
)
def test_a_run_with_little_or_torn_metrics_is_drawn_as_far_as_it_goes(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_bytes(text.encode("latin-1"))
    frame = figures.read_runs(tmp_path)
    assert len(figures.training_curves(frame).layout.annotations) == 6
    assert figures.curves_png(frame).startswith(b"\x89PNG")
    assert isinstance(figures.results_table([tmp_path]), pd.DataFrame)


def test_a_run_without_metrics_is_empty_and_a_missing_one_an_error(tmp_path):
    assert figures.read_runs(tmp_path).empty
    with pytest.raises(ValueError, match="There is no run"):
        figures.read_runs(tmp_path / "nothing")


def test_curves_show_the_metrics(trained):
    frame = figures.read_runs(trained.run_dir)
    figure = figures.training_curves(frame)
    lines = {trace.name: trace for trace in figure.data if trace.showlegend}
    evals = frame[frame["kind"] == "eval"]
    assert list(lines["held-out"].y) == list(evals["val_loss"]) and list(lines["held-out"].x) == [0, 5, 10, 15, 20]
    assert list(lines["training"].y) == list(frame[frame["kind"] == "step"]["loss"])
    assert list(lines["held-out"].error_y.array) == list(evals["val_loss_stderr"])


def test_several_runs_lie_over_each_other_in_colours_of_their_own(trained, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_bytes((trained.run_dir / "metrics.jsonl").read_bytes())
    frame = figures.read_runs([trained.run_dir, other])
    colours = {(trace.legendgroup, trace.line.color) for trace in figures.training_curves(frame).data}
    assert len(colours) == 2
    table = figures.results_table([trained.run_dir, other])
    assert list(table.index) == ["trained", "other"] and table["held-out loss"].nunique() == 1


def test_saved_curves_need_no_network(trained, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes((trained.run_dir / "metrics.jsonl").read_bytes())
    figures.save_curves(tmp_path)
    page = (tmp_path / "training_curves.html").read_text()
    assert "plotly.js v" in page and '<script src="http' not in page
    assert (tmp_path / "training_curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_bundle_is_plain_json(trained):
    bundle = figures.chart_bundle(figures.read_runs(trained.run_dir))
    assert set(bundle) == {"application/vnd.plotly.v1+json", "image/png", "text/plain"}
    assert len(json.dumps(bundle)) < 400_000


def test_lines_read_as_the_seed_document_shows_them(trained):
    from lmlib.run_folder import Record

    step = Record("step", 100, {"loss": 10.2187}, {"tokens_per_second": 1234.5, "utilisation": 0.5, "seconds_left": 3725.0})
    assert figures.describe(step, 10000) == "Step 100/10000: Loss=10.2187 | 1,234 tokens/s | 50% of peak | 1:02:05 left"
