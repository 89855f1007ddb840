"""Figures of runs, and the files and notebook outputs made of them."""

import json
import math
import shutil

import browser as jupyter
import nbformat
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from lmlib.analysis import figures, frames, panels, ranking, render
from lmlib.files import PROJECT_ROOT
from lmlib.notebook import chart


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
    assert drawn.layout.annotations[0].text.endswith("nats per token, 95 % bars")
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


# ---- The look ----


def write_run(folder, steps: int = 60, sessions: tuple = ()):
    """Write a run whose loss falls in a straight line from 100, after a first one of 1,000."""
    folder.mkdir()
    records = [{"kind": "eval", "step": 0, "val_loss": 1000.0, "val_bits_per_byte": 400.0}]
    for step in range(1, steps + 1):
        timing = {"seconds": float(step), "tokens_per_second": 5.0}
        loss = 100.0 - step
        records += [
            {"kind": "step", "step": step, "loss": loss, "timing": timing},
            {"kind": "eval", "step": step, "val_loss": loss, "val_accuracy": step / 1000},
        ]
    records.append({"kind": "checkpoint", "step": steps, "timing": {"seconds": float(steps)}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    known = {"sessions": [{"from_step": step} for step in sessions]}
    (folder / "environment.json").write_text(json.dumps(known))
    return folder


def in_other_tokens(trained, folder):
    """Copy a run, as if its tokenizer were another one."""
    shutil.copytree(trained.run_dir, folder, ignore=shutil.ignore_patterns("checkpoints"))
    known = json.loads((folder / "environment.json").read_text())
    known["data"]["tokenizer"] = "another"
    (folder / "environment.json").write_text(json.dumps(known))
    return folder


def test_the_loss_has_twice_the_width_and_panels_say_their_units(trained):
    figure = figures.training_curves(frames.read_runs(trained.run_dir))
    widths = [axis.domain[1] - axis.domain[0] for axis in figure.select_xaxes()]
    assert len(widths) == 6 and min(widths[0] / width for width in widths[1:]) > 2
    titles = [note.text for note in figure.layout.annotations]
    assert titles[0].startswith("<b>Loss</b>  nats per token") and len(titles) == 6
    assert titles[1:3] == ["<b>Accuracy</b>  validation", "<b>Bits per byte</b>  validation"]
    assert {note.xanchor for note in figure.layout.annotations} == {"left"}
    assert figure.layout.yaxis2.tickformat.endswith("p")  # percent
    assert figure.layout.hovermode == "x unified" and figure.layout.yaxis.hoverformat == ".3f"
    assert figure.layout.width is None and figure.layout.uirevision


def test_the_range_leaves_out_the_first_steps_also_in_a_png(tmp_path):
    figure = figures.training_curves(frames.read_runs(write_run(tmp_path / "run")))
    assert 97 < figure.layout.yaxis.autorangeoptions.clipmax < 101
    assert render.image(figure).axes[0].get_ylim()[1] < 101


def test_more_than_50_points_have_no_markers(tmp_path):
    for steps, mode in ((40, "lines+markers"), (60, "lines")):
        frame = frames.read_runs(write_run(tmp_path / str(steps), steps))
        lines = figures.panel_lines(frame, folder=str(tmp_path / str(steps)))
        assert lines[0][2]["mode"] == mode


def test_smoothing_does_not_lag_at_the_start(tmp_path):
    frame = frames.read_runs(write_run(tmp_path / "run"))
    raw, smooth, *_ = figures.panel_lines(frame, smoothing=11, folder=str(tmp_path / "run"))[0]
    assert smooth["y"][:50] == pytest.approx(raw["y"][:50])
    noise = pd.Series(np.random.default_rng(0).normal(size=400))
    assert panels.smoothed(noise, 100)[50:].std() < 0.2 * noise.std()
    gap = pd.Series([1.0, math.nan, 3.0])
    assert list(panels.smoothed(gap, 1)) == pytest.approx([1.0, math.nan, 3.0], nan_ok=True)


def test_checkpoints_are_ticks_and_resumes_lines_through_all_panels(tmp_path):
    frame = frames.read_runs(write_run(tmp_path / "run", 60, (0, 30)))
    shapes = figures.training_curves(frame).layout.shapes
    ticks = [s for s in shapes if s.name == "checkpoint"]
    dashed = [s for s in shapes if s.name == "resumed"]
    assert [(s.x0, s.yref) for s in ticks] == [(60, "y domain")] and ticks[0].y1 < 0.1
    assert {s.xref for s in dashed} == {"x", "x2", "x3", "x4", "x5", "x6"}
    assert {(s.x0, s.line.dash, s.y1) for s in dashed} == {(30, "dash", 1)}
    assert figures.marks(frame, "minutes")[1].get("x0") == pytest.approx(0.5)
    image = render.image(figures.training_curves(frame))
    drawn = [[list(line.get_xdata()) for line in axis.lines] for axis in image.axes]
    assert all([30, 30] in lines for lines in drawn) and [60, 60] in drawn[0]


def test_losses_that_cannot_be_compared_give_their_place_to_bits_per_byte(trained, tmp_path):
    other = in_other_tokens(trained, tmp_path / "other")
    frame = frames.read_runs([trained.run_dir, other])
    figure = figures.training_curves(frame)
    notes = [note.text for note in figure.layout.annotations]
    assert notes[0] == "<b>Bits per byte</b>  validation" and "not comparable" in notes[2]
    assert any("These runs differ in tokenizer" in note.replace("<br>", " ") for note in notes)
    large = [trace for trace in figure.data if trace.xaxis == "x"]
    bits = frame.loc[frame["kind"] == "eval", "val_bits_per_byte"]
    assert sum((list(trace.y) for trace in large), []) == list(bits)
    assert [trace.showlegend for trace in large] == [True, True]

    table = frames.results_table([trained.run_dir, other])
    cost = figures.cost(table)
    assert cost.layout.yaxis.title.text == "bits per byte"
    assert cost.data[0].y[0] == table["bits per byte"].iloc[0]
    positions = figures.loss_by_position(frame)
    assert "bits per byte" in positions.layout.annotations[0].text
    means = np.mean([list(trace.y) for trace in positions.data if trace.xaxis == "x"])
    assert means == pytest.approx(table["bits per byte"].mean(), rel=0.1)
    same = figures.cost(frames.results_table(trained.run_dir))
    assert same.layout.yaxis.title.text == "validation loss (nats per token)"


def test_the_toolbar_is_transparent_and_has_few_buttons_wherever_a_chart_is_shown(trained):
    frame = frames.read_runs(trained.run_dir)
    figure = figures.training_curves(frame)
    content = figures.chart_bundle(frame)["application/vnd.plotly.v1+json"]
    for layout in (chart.Figure(figure).layout.to_plotly_json(), content["layout"]):
        assert layout["modebar"]["bgcolor"] == "rgba(0, 0, 0, 0)"
        assert {"zoomin", "zoomout", "select", "lasso"} < set(layout["modebar"]["remove"])
        assert layout["modebar"]["orientation"] == "v" and layout["legend"]["x"] == 0
    assert content["config"] == chart.Figure(figure)._config == render.CONFIG


def test_a_widget_moves_to_newer_records_and_keeps_its_zoom(trained):
    frame = frames.read_runs(trained.run_dir)
    early = frame[frame["step"] <= 5]
    early.attrs = frame.attrs
    widget = chart.Figure(figures.training_curves(early))
    widget.layout.yaxis.range = [1, 2]  # as a browser reports a zoom
    before = widget.layout.yaxis.autorangeoptions.clipmax
    figures.update(widget, frame)
    for trace, expected in zip(widget.data, figures.training_curves(frame).data, strict=True):
        assert (trace.x, trace.y, trace.mode) == (expected.x, expected.y, expected.mode)
    assert widget.layout.yaxis.range == (1, 2)
    assert widget.layout.yaxis.autorangeoptions.clipmax == before
    assert widget.layout.shapes == figures.training_curves(frame).layout.shapes


def test_a_figure_comes_with_what_makes_it_fit_jupyterlab(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda content, raw: shown.append(content))
    render.show(figures.styled(go.Figure(), 100))
    assert "max-width: 100%" in shown[0]["text/html"] and "image/png" in shown[1]


def test_an_even_share_is_gray_also_in_a_png(tmp_path):
    lines = [{"kind": "step", "step": n, "loss": 1.0, "expert_load": [[0.5, 0.5]]} for n in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = render.image(figures.expert_load(frames.read_runs(tmp_path)))
    colors = drawn.axes[0].collections[0]
    assert colors.to_rgba(1)[:3] == pytest.approx([0.6] * 3, abs=0.01)


# ---- Text in pictures ----


def test_no_picture_holds_the_markup_of_numbers(trained, tmp_path, monkeypatch):
    """Every text in every PNG, log axes with one power of ten and with many included."""
    texts = []

    def collect(image, *args, **options):
        FigureCanvasAgg(image).draw()
        texts.append([text.get_text() for text in image.findobj(Text)])

    monkeypatch.setattr(Figure, "savefig", collect)
    frame = frames.read_runs([trained.run_dir, write_run(tmp_path / "run")])
    table = frames.results_table(trained.run_dir)
    wide = pd.concat([table, table.assign(parameters=10 * table["parameters"] ** 2)])
    drawn = [figures.training_curves(frame, x, log_x=log) for x in frames.AXES for log in (0, 1)]
    drawn += [figures.loss_by_position(frame), figures.cost(table), figures.cost(wide)]
    drawn += [ranking.losses([trained.run_dir]), ranking.curves([trained.run_dir])]
    one = figures.training_curves(frames.read_runs(trained.run_dir))
    drawn += [go.Figure(one).update_yaxes(type="log")]
    for figure in drawn:
        render.png(figure)
    assert len(texts) == len(drawn) and all(any(found) for found in texts)
    found = [text for picture in texts for text in picture]
    assert not [text for text in found if "mathdefault" in text or "$" in text]
    assert not [text for text in found if "e+" in text or "e-0" in text]
    assert {"0.1", "10", "100"} & set(found)


def test_no_committed_output_holds_the_markup_of_numbers():
    for path in (PROJECT_ROOT / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, 4).cells:
            for output in cell.get("outputs", []):
                shown = {k: v for k, v in output.get("data", output).items() if k != "image/png"}
                assert "mathdefault" not in json.dumps(shown), path.name


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(jupyter.CHROMIUM is None, reason="no Chromium on this machine")
def test_panels_without_points_log_no_errors(tmp_path):
    first = {"kind": "eval", "step": 0, "val_loss": 8.3, "val_accuracy": 0.02}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(first) + "\n")
    render.save(figures.training_curves(frames.read_runs(tmp_path)), tmp_path / "curves.html")
    with jupyter.chromium() as browser:
        page, errors = browser.new_page(), []
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.goto((tmp_path / "curves.html").as_uri())
        page.wait_for_selector(".js-plotly-plot .trace", state="attached")
        page.evaluate(jupyter.PAINTED)
        low, high = page.evaluate("document.querySelector('.js-plotly-plot').layout.yaxis2.range")
        assert errors == [] and low == 0 and high < 0.1


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(jupyter.CHROMIUM is None, reason="no Chromium on this machine")
def test_the_toolbar_of_a_saved_page_is_clear_of_the_legend(trained, tmp_path):
    page_file = tmp_path / "curves.html"
    render.save(figures.training_curves(frames.read_runs(trained.run_dir)), page_file)
    with jupyter.chromium() as browser:
        for width in (1400, 800):
            page = browser.new_page(viewport={"width": width, "height": 700})
            page.goto(page_file.as_uri())
            page.hover(".js-plotly-plot .nsewdrag >> nth=0")
            page.locator(".hoverlayer .legend text").first.wait_for()  # unified, with names
            buttons = page.locator(".modebar-btn")
            titles = [button.get_attribute("data-title") for button in buttons.all()]
            assert titles == ["Reset axes", "Zoom", "Pan", "Download plot as a PNG"]
            bar, legend, plot = (
                page.locator(name).first.bounding_box()
                for name in (".modebar", ".infolayer .legend", ".js-plotly-plot")
            )
            assert legend["x"] + legend["width"] <= bar["x"]
            panels = [panel.bounding_box() for panel in page.locator(".nsewdrag").all()]
            assert all(panel["x"] + panel["width"] <= bar["x"] for panel in panels)
            assert plot["x"] + plot["width"] <= width
            page.close()
