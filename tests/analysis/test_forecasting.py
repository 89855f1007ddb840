"""The forecast of a run's last validation loss, on real runs that are cut off before their end."""

import json
from pathlib import Path

import numpy as np
import pytest

from lmlib import analysis
from lmlib.analysis import figures, frames
from lmlib.analysis.forecasting import forecast_from
from lmlib.cli.look import runs as list_runs
from lmlib.config import RunConfig
from lmlib.notebook import chart
from lmlib.optim import schedule


def write_run(folder: Path, steps: int, total: int = 1000, **changes) -> Path:
    """A run whose losses follow a power law of the summed learning rates, with noise."""
    config = RunConfig(run_name=folder.name, output_dir=str(folder.parent), total_steps=total)
    config = {**config.to_dict(), **changes}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    factors = [schedule(step, total, 0.05, config["decay_ratio"]) for step in range(1, total + 1)]
    passed, noise = np.cumsum(factors) / sum(factors), np.random.default_rng(0)
    loss = 3 + 0.8 * passed**-0.3 - 0.15 * (1 - np.array(factors))
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(10, steps + 1, 10):
            rate = config["learning_rate"] * factors[step - 1]
            values = {"loss": loss[step - 1] + noise.normal(0, 0.1), "learning_rate": rate}
            for kind, numbers in (
                ("step", values),
                ("eval", {"val_loss": loss[step - 1] + 0.05}),
            ):
                if kind == "step" or step % 50 == 0:
                    timing = {"seconds": float(step)}
                    line = {"kind": kind, "step": step, **numbers, "timing": timing}
                    file.write(json.dumps(line) + "\n")
    return folder


def end_of(total: int = 1000, decay: float = 0.6) -> float:
    factors = [schedule(step, total, 0.05, decay) for step in range(1, total + 1)]
    return 3 + 0.8 - 0.15 * (1 - factors[-1]) + 0.05


@pytest.mark.parametrize("steps", [300, 500, 700, 950])
@pytest.mark.parametrize("decay", [0.0, 0.6, 1.0])
def test_the_interval_contains_the_end_and_narrows(tmp_path, steps, decay):
    found = analysis.forecast(write_run(tmp_path / "run", steps, decay_ratio=decay))
    assert found.step == 1000
    assert found.low < end_of(decay=decay) < found.high
    assert found.low < found.loss < found.high
    assert found.curve["step"].iloc[0] == steps and found.curve["step"].iloc[-1] == 1000
    later = analysis.forecast(write_run(tmp_path / "later", steps + 40, decay_ratio=decay))
    assert later.high - later.low < found.high - found.low


def test_a_wider_level_is_wider(tmp_path):
    run = write_run(tmp_path / "run", 500)
    narrow, wide = (analysis.forecast(run, level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high and wide.loss == narrow.loss


def test_no_forecast_before_30_percent_after_the_end_or_without_records(tmp_path):
    assert analysis.forecast(write_run(tmp_path / "early", 290)) is None
    assert analysis.forecast(write_run(tmp_path / "ended", 1000)) is None
    assert analysis.forecast(write_run(tmp_path / "started", 0)) is None
    damaged = write_run(tmp_path / "damaged", 500)
    (damaged / "config.json").write_text("{")
    assert analysis.forecast(damaged) is None


def test_losses_that_are_not_finite_are_left_out(tmp_path):
    run = write_run(tmp_path / "run", 500)
    whole = analysis.forecast(run)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "step": 500, "loss": NaN, "timing": {"seconds": 1}}\n')
        file.write('{"kind": "eval", "step": 500, "val_loss": Infinity, "timing": {}}\n')
    assert analysis.forecast(run).loss == whole.loss


def test_repeated_text_widens_the_interval(tmp_path):
    run = write_run(tmp_path / "run", 300)
    once = analysis.forecast(run)
    for tokens, wider in ((1000 * 2048, False), (100 * 2048, True)):
        counts = {"corpus": {"training": {"tokens": tokens}}}
        (run / "environment.json").write_text(json.dumps(counts))
        found = analysis.forecast(run)
        assert (found.high - found.low > 1.5 * (once.high - once.low)) == wider


def test_recorded_learning_rates_count_rather_than_the_stretched_schedule(tmp_path):
    """After an extension the past was trained by the old schedule, not by the new one."""
    run = write_run(tmp_path / "run", 1000)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "total_steps": 2000}))
    recorded = analysis.forecast(run)
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace('"learning_rate"', '"other"'))
    assert recorded.loss != pytest.approx(analysis.forecast(run).loss, abs=0.01)


def test_millions_of_steps_take_no_longer(tmp_path):
    run = write_run(tmp_path / "run", 500)
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"total_steps": 1000', '"total_steps": 5000000'))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [json.dumps({**line, "step": 5000 * line["step"]}) for line in lines]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    assert 3.5 < analysis.forecast(run).loss < 4.2


@pytest.mark.parametrize("x", ["step", "tokens", "flops", "minutes"])
def test_the_chart_has_a_faint_band_until_the_end(tmp_path, x):
    run = write_run(tmp_path / "run", 500)
    (run / "environment.json").write_text('{"model": {"flops_per_token": 10.0}}')
    figure = figures.training_curves(frames.read_runs(run), x=x)
    [band] = [trace for trace in figure.data if trace.fill == "toself"]
    per_step = {"step": 1, "tokens": 2048, "flops": 20480, "minutes": np.nan}[x]
    if x == "minutes":
        assert not len(band.x) and not band.showlegend
        return
    assert (min(band.x), max(band.x)) == pytest.approx((500 * per_step, 1000 * per_step))
    assert band.opacity < 0.3 and band.showlegend
    assert figures.chart_bundle(frames.read_runs(run))["image/png"]


def test_the_live_chart_moves_the_band_and_drops_it_at_the_end(tmp_path):
    run = write_run(tmp_path / "run", 500)
    widget = chart.Figure(figures.training_curves(frames.read_runs(run)))
    [band] = [trace for trace in widget.data if trace.fill == "toself"]
    assert min(band.x) == 500
    lines = (write_run(tmp_path / "whole", 1000) / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines)
    figures.update(widget, frames.read_runs(run))
    assert not len(band.x) and not band.showlegend


def test_a_forecast_of_several_runs_takes_the_records_of_its_own(tmp_path):
    first = write_run(tmp_path / "first", 500)
    second = write_run(tmp_path / "second", 400, learning_rate=0.01)
    frame = frames.read_runs([first, second])
    found = forecast_from(frame[frame["run"] == "second"], second)
    assert found == analysis.forecast(second) != analysis.forecast(first)


def test_lmlib_runs_prints_it(tmp_path, capsys):
    write_run(tmp_path / "run", 500)
    write_run(tmp_path / "ended", 1000)

    class Options:
        output_dir = str(tmp_path)

    list_runs(Options)
    text = capsys.readouterr().out
    found = analysis.forecast(tmp_path / "run")
    assert text.count("forecast") == 1
    assert f"{found.loss:.3f} (90 %: {found.low:.3f} to {found.high:.3f})" in text
