"""The explorer without a browser: what each control does to the charts."""

import json
import shutil
from copy import deepcopy

import pytest

from lmlib.notebook import chart, explorer, picker


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


def explored(runs):
    return explorer.Explorer(runs, runs[0].parent)


def lines_of(view, run, name="validation"):
    return [
        trace
        for trace in view.charts["Curves"].figure.data
        if trace.legendgroup == run and trace.name == f"{run}, {name}"
    ]


def other_text(run_dir):
    """Let a run look as if it was scored in other tokens."""
    environment = json.loads((run_dir / "environment.json").read_text())
    environment["data"]["tokenizer"] = "another"
    (run_dir / "environment.json").write_text(json.dumps(environment))


def test_every_control_changes_the_lines(pair):
    view = explored(pair)
    assert list(lines_of(view, "a")[0].x) == [0, 5, 10, 15, 20]
    view.x.value = "tokens"
    assert list(lines_of(view, "a")[0].x) == [0, 1280, 2560, 3840, 5120]
    layout = view.charts["Curves"].figure.layout.to_plotly_json()
    axes = [layout[name] for name in layout if name.startswith("xaxis")]
    assert "tokens trained" in {axis.get("title", {}).get("text") for axis in axes}
    view.log_x.value = view.log_loss.value = True
    layout = view.charts["Curves"].figure.layout
    assert layout.xaxis.type == layout.yaxis.type == "log"
    assert list(lines_of(view, "a")[0].x) == [None, 1280, 2560, 3840, 5120]  # no log of step 0
    rough = list(lines_of(view, "a", "training, smoothed")[0].y)
    view.smoothing.value = 1
    raw = list(lines_of(view, "a", "training")[0].y)
    assert list(lines_of(view, "a", "training, smoothed")[0].y) == raw != rough


def test_a_run_has_one_color_and_one_switch_in_every_figure(pair):
    view = explored(pair)
    colors = {
        trace.marker.color
        for name in ("Curves", "By position", "Cost")
        for trace in view.charts[name].figure.data
        if trace.legendgroup == "b"
    }
    assert len(colors) == 1 and colors.pop() in view.swatches[pair[1]].value
    assert "Cost" in view.tabs.titles
    view.switches[pair[1]].value = False
    for name in ("Curves", "By position"):
        shown = {trace.legendgroup: trace.visible for trace in view.charts[name].figure.data}
        assert shown == {"a": True, "b": False}
    assert "Cost" not in view.tabs.titles  # of one run
    assert "a, step 20" in view.text.value and "b, step" not in view.text.value
    view.switches[pair[0]].value = False
    assert view.tabs.titles == ("Curves", "Texts") and "No run is chosen" in view.warning.value


def test_texts_follow_the_slider_and_charts_follow_the_file(pair, trained):
    view = explored(pair)
    assert "a, step 20" in view.text.value and "b, step 10" in view.text.value
    view.text_step.value = 5
    assert "a, step 5" in view.text.value and "a, step 20" not in view.text.value
    (pair[1] / "metrics.jsonl").write_bytes((trained.run_dir / "metrics.jsonl").read_bytes())
    view.refresh()
    assert list(lines_of(view, "b")[0].x) == [0, 5, 10, 15, 20]
    assert "step 20 of 20" in view.states[pair[1]].value
    assert view.text_step.value == 5  # the selected step stays


def test_experts_appear_with_their_first_record_and_a_deleted_folder_keeps_its_lines(pair):
    view = explored(pair)
    assert view.tabs.titles == ("Curves", "By position", "Cost", "Texts")
    with open(pair[0] / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "step": 21, "loss": 5.0, "expert_load": [[0.5, 0.5]]}\n')
    view.tabs.selected_index = 3
    view.refresh()
    assert view.tabs.titles == ("Curves", "By position", "Cost", "Experts", "Texts")
    assert view.tabs.children[3] is view.charts["Experts"].box
    assert len(view.charts["Experts"].figure.data) == 1
    assert view.tabs.selected_index == 4  # Texts, as before
    shutil.rmtree(pair[1])
    view.refresh()
    view.x.value = "tokens"
    assert list(lines_of(view, "b")[0].x)[:2] == [0, 1280]
    assert "folder deleted" in view.states[pair[1]].value


def test_every_run_under_the_folder_can_be_chosen_and_found(pair):
    """A run keeps its color when others are switched off and on."""
    inside = shutil.copytree(pair[0], pair[0].parent / "sweep" / "inside")
    view = explored(pair[:1])
    listed = {switch.description: switch.value for switch in view.switches.values()}
    assert listed == {"a": True, "b": False, "sweep/inside": False}
    assert "finished · 20" in view.states[pair[1]].value
    assert " bits per byte" in view.states[pair[1]].value
    view.filter.value = "SWEEP fin"
    assert len(view.rows.children) == 2  # and the chosen one
    view.switches[inside].value = True
    assert lines_of(view, "inside") and "Cost" in view.tabs.titles
    color = lines_of(view, "inside")[0].line.color
    view.switches[pair[0]].value = False
    assert lines_of(view, "inside")[0].line.color == color
    assert color in view.swatches[inside].value
    view.switches[pair[0]].value = True
    shutil.rmtree(pair[0])
    view.switches[pair[1]].value = True  # reading again leaves the deleted one out
    assert view.chosen == [inside, pair[1]] and lines_of(view, "b")


def test_other_tokenizers_are_warned_of_and_compared_in_bits_per_byte(pair, capsys):
    other_text(pair[1])
    view = explored(pair)
    assert "differ in tokenizer" in view.warning.value
    for run in pair:
        assert "bits per byte" in view.states[run].value
        assert "loss" not in view.states[run].value
    view.switches[pair[1]].value = False  # then the other one has its loss again
    assert view.warning.value == "" and "validation loss" in view.states[pair[0]].value
    explorer.explore(pair, pair[0].parent)
    assert "differ in tokenizer" in capsys.readouterr().out


def test_a_page_that_is_loaded_again_gets_what_the_charts_show_now(pair):
    """JupyterLab asks for the state of each widget; Plotly's own is that of the first drawing."""
    view = explored(pair)
    view.x.value, view.log_loss.value = "tokens", True
    view.switches[pair[1]].value = False
    for shown in view.charts.values():
        state = deepcopy(shown.figure.get_state(["_widget_data", "_widget_layout"]))
        assert state["_widget_data"] == shown.figure._data
        assert state["_widget_layout"] == shown.figure._layout
    assert view.charts["Curves"].figure._widget_layout["yaxis"]["type"] == "log"


def test_the_charts_of_a_page_share_one_copy_of_plotly(pair):
    figures = [shown.figure for shown in explored(pair).charts.values()]
    states = [figure.get_state() for figure in figures]
    assert len(states) > 1 and {state["_code"] for state in states} == {
        chart.shared_code().model_id
    }
    assert max(len(state["_esm"]) for state in states) < 2000
    assert len(chart.shared_code().text) > 4_000_000


def test_outside_jupyterlab_it_prints_the_state_of_runs_and_shows_a_chart(pair, capsys):
    explorer.explore(pair, pair[0].parent)
    shown = capsys.readouterr().out
    assert "a: finished | step 20 of 20 | loss " in shown and "Training curves of a, b" in shown


def test_a_menu_of_runs_holds_their_folders(pair):
    menu = picker.run_menu(pair[0].parent, pair[1])
    assert menu.value == pair[1] and {folder for _, folder in menu.options} == set(pair)
    assert all(" · finished · " in line for line, _ in menu.options)
    assert picker.run_menu(pair[0].parent, pair[0].parent / "none").value is None
