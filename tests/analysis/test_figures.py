"""Figures of runs, and the files and notebook outputs made of them."""

import json
import math

import pytest

from lmlib.analysis import figures, frames, render


def test_curves_show_the_metrics(trained):
    frame = frames.read_runs(trained.run_dir)
    figure = figures.training_curves(frame)
    lines = {trace.name: trace for trace in figure.data if trace.showlegend}
    evals = frame[frame["kind"] == "eval"]
    assert list(lines["validation"].y) == list(evals["val_loss"]) and list(
        lines["validation"].x
    ) == [0, 5, 10, 15, 20]
    assert list(lines["training"].y) == list(frame[frame["kind"] == "step"]["loss"])


def test_error_bars_are_95_percent_intervals_over_documents(tmp_path):
    """Few documents have no bar, nor has an error of older versions, which took windows as units."""
    records = [
        {"kind": "eval", "step": step, "val_loss": 5.0, "val_loss_stderr": 0.1, "val_documents": n}
        for step, n in enumerate((2, 5, 16))
    ]
    del (old := dict(records[0], step=3))["val_documents"]
    lines = "".join(json.dumps(record) + "\n" for record in [*records, old])
    (tmp_path / "metrics.jsonl").write_text(lines)
    drawn = figures.training_curves(frames.read_runs(tmp_path))
    [line] = [trace for trace in drawn.data if trace.name == "validation" and trace.showlegend]
    bars = [math.nan, 0.27764, 0.21314, math.nan]  # t for 4 and 15 degrees of freedom: published
    assert list(line.error_y.array) == pytest.approx(bars, rel=1e-3, nan_ok=True)
    assert drawn.layout.yaxis.title.text == "bars: 95 % over documents"
    assert render.png(drawn).startswith(b"\x89PNG")


def test_each_of_several_runs_has_its_own_color(trained, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_bytes((trained.run_dir / "metrics.jsonl").read_bytes())
    frame = frames.read_runs([trained.run_dir, other])
    colors = {
        (trace.legendgroup, trace.line.color) for trace in figures.training_curves(frame).data
    }
    assert len(colors) == 2
    table = frames.results_table([trained.run_dir, other])
    assert list(table.index) == ["trained", "other"] and table["validation loss"].nunique() == 1


def test_saved_curves_need_no_network(trained, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes((trained.run_dir / "metrics.jsonl").read_bytes())
    figures.save_curves(tmp_path)
    page = (tmp_path / "training_curves.html").read_text()
    assert "plotly.js v" in page and '<script src="http' not in page
    assert (tmp_path / "training_curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_is_saved_as_a_png_or_a_page(trained, tmp_path):
    figure = figures.cost(frames.results_table([trained.run_dir]))
    render.save(figure, tmp_path / "cost.png")
    render.save(figure, tmp_path / "cost & co.html")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "cost & co.html").read_text()
    assert (
        "<title>cost &amp; co</title>" in page
        and "color-scheme" in page
        and '<script src="http' not in page
    )
    with pytest.raises(ValueError, match="must end in .png or .html"):
        render.save(figure, tmp_path / "cost.pdf")
    assert len(list(tmp_path.iterdir())) == 2


def test_the_bundle_is_plain_json(trained):
    bundle = figures.chart_bundle(frames.read_runs(trained.run_dir))
    assert set(bundle) == {"application/vnd.plotly.v1+json", "image/png", "text/plain"}
    assert len(json.dumps(bundle)) < 400_000
