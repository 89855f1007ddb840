"""The live chart: an error in drawing costs the chart, not the run."""

import pytest

import lmlib
from lmlib.analysis import figures
from lmlib.checkpoint import checkpoint_steps
from lmlib.notebook.live import watch
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


def test_records_that_cannot_be_read_cost_the_chart_too(smoke, capsys):
    """A damaged file of an earlier session: a folder where metrics.jsonl belongs."""
    config = smoke()

    def records():
        (config.run_dir / "metrics.jsonl").mkdir(parents=True)
        yield from made

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
