"""The explorer without a browser: what each control does to the charts."""

import shutil

import pytest

from lmlib.notebook import explorer


@pytest.fixture
def pair(trained, tmp_path):
    copies = [
        shutil.copytree(
            trained.run_dir, tmp_path / name, ignore=shutil.ignore_patterns("checkpoints")
        )
        for name in ("a", "b")
    ]
    lines = (copies[1] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copies[1] / "metrics.jsonl").write_text("".join(lines[:20]))
    return copies


def lines_of(view, run, name="validation"):
    return [
        trace
        for trace in view.charts["Curves"].data
        if trace.legendgroup == run and trace.name == f"{run}, {name}"
    ]


def test_every_control_changes_the_lines(pair):
    view = explorer.Explorer(pair)
    assert list(lines_of(view, "a")[0].x) == [0, 5, 10, 15, 20]
    view.x.value = "tokens"
    assert list(lines_of(view, "a")[0].x) == [0, 1280, 2560, 3840, 5120]
    assert view.charts["Curves"].layout.xaxis4.title.text == "tokens trained"
    view.log_x.value = view.log_loss.value = True
    layout = view.charts["Curves"].layout
    assert layout.xaxis.type == layout.yaxis.type == "log" and layout.yaxis2.type == "linear"
    assert list(lines_of(view, "a")[0].x) == [
        None,
        1280,
        2560,
        3840,
        5120,
    ]  # no logarithm of step 0
    rough = list(lines_of(view, "a", "training, smoothed")[0].y)
    view.smoothing.value = 1
    raw = list(lines_of(view, "a", "training")[0].y)
    assert list(lines_of(view, "a", "training, smoothed")[0].y) == raw != rough


def test_a_run_has_one_color_and_one_switch_in_every_figure(pair):
    view = explorer.Explorer(pair)
    colors = {
        trace.marker.color
        for name in ("Curves", "By position", "Cost")
        for trace in view.charts[name].data
        if trace.legendgroup == "b"
    }
    assert len(colors) == 1 and colors.pop() in view.swatches["b"].value
    view.switches["b"].value = False
    for name in ("Curves", "By position", "Cost"):
        shown = {trace.legendgroup: trace.visible for trace in view.charts[name].data}
        assert shown == {"a": True, "b": False}
    assert "a, step 20" in view.text.value and "b, step" not in view.text.value


def test_texts_follow_the_slider_and_charts_follow_the_file(pair, trained):
    view = explorer.Explorer(pair)
    assert "a, step 20" in view.text.value and "b, step 10" in view.text.value
    view.text_step.value = 5
    assert "a, step 5" in view.text.value and "a, step 20" not in view.text.value
    (pair[1] / "metrics.jsonl").write_bytes((trained.run_dir / "metrics.jsonl").read_bytes())
    view.refresh()
    assert (
        list(lines_of(view, "b")[0].x) == [0, 5, 10, 15, 20]
        and "step 20 of 20" in view.states["b"].value
    )
    assert view.text_step.value == 5  # the selected step stays


def test_experts_appear_with_their_first_record_and_a_deleted_folder_keeps_its_lines(pair):
    view = explorer.Explorer(pair)
    assert len(view.charts["Experts"].data) == 0
    with open(pair[0] / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "step": 21, "loss": 5.0, "expert_load": [[0.5, 0.5]]}\n')
    view.refresh()
    assert len(view.charts["Experts"].data) == 1 and view.tabs.children[3] is view.charts["Experts"]
    shutil.rmtree(pair[1])
    view.refresh()
    view.x.value = "tokens"
    assert list(lines_of(view, "b")[0].x)[:2] == [0, 1280]


def test_outside_jupyterlab_it_prints_the_state_of_runs_and_shows_a_chart(pair, capsys):
    explorer.explore(pair)
    shown = capsys.readouterr().out
    assert "a: finished | step 20 of 20 | loss " in shown and "Training curves of a, b" in shown
