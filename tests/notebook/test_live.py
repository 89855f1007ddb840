"""The live chart: an error in drawing costs the chart, not the run."""

import os
import signal
from dataclasses import replace

import pytest

import lmlib
from lmlib.analysis import figures, frames
from lmlib.checkpoint import checkpoint_steps
from lmlib.errors import Stopped, UserError
from lmlib.notebook import live
from lmlib.notebook.header import duration, header
from lmlib.notebook.live import watch
from lmlib.notebook.parameters import run_config
from lmlib.run import start
from lmlib.run.records import Record


def break_charts(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(figures, "chart_bundle", fail)


@pytest.mark.parametrize("error", [RuntimeError("no \x1b fonts"), OSError(28, "No space left")])
def test_an_error_in_drawing_is_reported_once_and_training_goes_on(
    smoke, monkeypatch, capsys, error
):
    break_charts(monkeypatch, error)
    config = smoke()
    steps = [record.step for record in watch(lmlib.train(config), config.run_dir)]
    said = capsys.readouterr().out
    assert steps[-1] == 20 and checkpoint_steps(config.run_dir) == [5, 10, 15, 20]
    assert said.count("The chart is left out") == 1 and "training continues" in said
    assert "\x1b" not in said


def test_records_that_cannot_be_read_cost_the_chart_too(smoke, capsys, monkeypatch):
    """As where the disk that holds metrics.jsonl fails."""
    config = smoke()

    def refuse(run_dirs):
        raise OSError(5, "Input/output error")

    def records():
        config.run_dir.mkdir(parents=True)
        yield from made

    monkeypatch.setattr("lmlib.analysis.frames.read_runs", refuse)
    made = [Record("checkpoint", step, {"path": "p"}, {}) for step in range(3)]
    assert list(watch(records(), config.run_dir)) == made
    assert capsys.readouterr().out.count("The chart is left out") == 1


def test_a_consumer_that_leaves_ends_training_before_the_last_drawing(smoke, monkeypatch):
    order = []

    def records():
        try:
            yield Record("checkpoint", 1, {"path": "p"}, {})
        finally:
            order.append("closed")

    monkeypatch.setattr(figures, "chart_bundle", lambda frame: order.append("drawn") or {})
    config = smoke()
    config.run_dir.mkdir(parents=True)
    watched = watch(records(), config.run_dir)
    next(watched)
    order.clear()
    watched.close()
    assert order == ["closed", "drawn"]


def interrupted_at(step, config):
    """Train in the notebook's loop, and press the stop button at a step."""
    for record in watch(lmlib.train(config), config.run_dir):
        if record.step == step and record.kind == "step":
            os.kill(os.getpid(), signal.SIGINT)


def test_a_stop_ends_the_loop_in_a_browser_and_is_raised_elsewhere(smoke, monkeypatch):
    shown = {}
    monkeypatch.setattr(live._Page, "put", lambda _, name, bundle: shown.update({name: bundle}))
    config = smoke(total_steps=1000, checkpoint_every=1000)
    with pytest.raises(Stopped, match="Stopped at step 7 of 1000 .SIGINT"):
        interrupted_at(7, config)
    monkeypatch.setattr(live, "is_live", lambda: True)
    monkeypatch.setattr(live._Page, "draw_widget", lambda _: None)
    interrupted_at(9, config)  # resumes, and raises nothing
    head = shown["head"]["text/html"]
    assert "Stopped at step 9 of 1,000. Saved. Run the cells again to resume." in head
    assert ">stopped</span>" in head and "9 / 1,000" in head
    steps = frames.read_runs(config.run_dir).query("kind == 'step'")
    speed = steps["tokens_per_second"].median()  # that of the last step says little
    assert f"<b>{speed:,.0f}</b><small>tokens/s, median" in head
    assert "Next:" in shown["below"]["text/html"] and "Step 9/1000" in shown["below"]["text/html"]
    # Any value from the current step on: what was mistyped as 1000 may become 9.
    cell = 'recipe = "params/smoke.yaml"\nrun_name = "x"\ntotal_steps = 0'
    values = {"recipe": "params/smoke.yaml", "run_name": config.run_name, "checkpoint_every": 1000}
    values |= {"output_dir": config.output_dir, "In": ["", cell + "\noutput_dir = 1"]}
    values["In"][1] += "\ncheckpoint_every = 1000"
    with pytest.raises(UserError, match="at step 9, beyond total_steps 8. Set total_steps to 9"):
        start.find_start(run_config({**values, "total_steps": 8}))
    finished = run_config({**values, "total_steps": 9})
    interrupted_at(-1, finished)
    assert ">finished</span>" in shown["head"]["text/html"]
    assert lmlib.load(config.run_dir)


def test_a_stop_while_the_text_is_prepared_is_one_sentence(smoke, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(start, "prepare", interrupt)
    monkeypatch.setattr(live, "is_live", lambda: True)
    config = smoke()
    assert list(watch(lmlib.train(config), config.run_dir)) == []
    assert "before the first step. Nothing was trained" in capsys.readouterr().out
    with pytest.raises(Stopped):
        start.open_store(start.find_start(replace(config, seed=1)))


@pytest.mark.parametrize("error", [UserError("a \x1b[1m b"), Stopped("a \x1b[1m b")])
def test_errors_for_people_show_their_sentence_alone(error):
    assert error._render_traceback_() == ["a \\x1b[1m b"]


def test_the_head_survives_odd_records_and_escapes_names(tmp_path):
    odd = {"step": {"step": "9", "tokens_per_second": "<b>", "seconds_left": float("nan")}}
    folder = tmp_path / "<script>"
    shown = header(folder, "running", odd, "many", "")["text/html"]
    assert "<script>" not in shown and "<b><b>" not in shown and "&lt;script&gt;" in shown
    scores = {"eval": {"step": 5, "val_loss": 3.5, "val_loss_stderr": 0.1, "val_documents": 3}}
    assert "3.50 ± 0.43" in header(folder, "died", scores, 10, "")["text/html"]
    assert [duration(s) for s in (40, 390, 7800)] == ["40 s", "6 min", "2 h 10 min"]
