"""Grids planned and trained in real processes, and the search for a learning rate."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fingerprint import fingerprint
from process import LONG, SMOKE, processes_of, wait_until

import lmlib
from lmlib.checkpoint import checkpoint_steps
from lmlib.cli.parser import main
from lmlib.files import PROJECT_ROOT
from lmlib.model.size import active_parameter_count, parameter_count
from lmlib.run import lock
from lmlib.run.lock import hold_lock, run_status
from lmlib.sweep import launch
from lmlib.sweep.grid import plan
from lmlib.sweep.launch import _shares, sweep
from lmlib.sweep.learning_rate import RangeTest, _steepest, candidates, find_learning_rate


def test_a_grid_is_every_combination_and_names_say_which(tmp_path):
    grid = {"seed": [0, 1], "dropout": [0.0, 0.1], "output_dir": [str(tmp_path)]}
    configs = plan([SMOKE], grid)
    assert [(c.run_name, c.seed, c.dropout) for c in configs] == [
        ("smoke-seed0-dropout0.0", 0, 0.0),
        ("smoke-seed0-dropout0.1", 0, 0.1),
        ("smoke-seed1-dropout0.0", 1, 0.0),
        ("smoke-seed1-dropout0.1", 1, 0.1),
    ]
    assert {c.output_dir for c in configs} == {str(tmp_path)} and not list(tmp_path.iterdir())
    longer = plan([SMOKE], {"total_steps": [20, 40], "seed": [3]})
    assert [(c.run_name, c.total_steps) for c in longer] == [
        ("smoke-total_steps20-seed3", 20),
        ("smoke-total_steps40-seed3", 40),
    ]
    unused = plan([SMOKE], {"feed_forward": ["mlp", "moe"], "num_experts": [4, 8]})
    assert [c.run_name for c in unused] == [
        "smoke-feed_forwardmlp-num_experts4",
        "smoke-feed_forwardmoe-num_experts4",
        "smoke-feed_forwardmoe-num_experts8",
    ]


def test_every_mistake_of_a_sweep_is_listed_before_anything_runs(tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("run_name: smoke\nvocab_size: 300\n")
    with pytest.raises(
        ValueError, match="dropuot is not a parameter; did you mean dropout"
    ) as error:
        plan([SMOKE], {"dropuot": [0.1], "seed": [0, "x"]})
    assert "seed is 'x'" in str(error.value)
    with pytest.raises(ValueError, match="two runs would share the folder outputs/smoke"):
        plan([SMOKE, other], {})
    with pytest.raises(ValueError, match=r"no parameter file missing\.yaml") as error:
        plan(["missing.yaml", SMOKE], {"dropuot": [0.1]})
    assert "dropuot is not a parameter" in str(error.value)
    with pytest.raises(ValueError, match="The sweep is empty"):
        plan([], {})


def test_a_sweep_trains_skips_resumes_and_survives_one_that_fails(text_file, tmp_path, capsys):
    """One run has no corpus, the other is trained; a second sweep trains the rest."""
    shutil.copy(text_file, tmp_path / "text.txt")
    corpora = [str(tmp_path / name) for name in ("text.txt", "missing.txt")]
    given = ["sweep", str(SMOKE), "-p", "output_dir", str(tmp_path / "runs"), "-p", "seed", "0"]
    given += ["-p", "corpus", *corpora]
    given += ["-p", "validation_fraction", "0.5", "-p", "vocab_size", "300"]
    assert main([*given, "--jobs", "2"]) == 1
    shown = capsys.readouterr().out
    assert "2 runs in " in shown and "missing.txt" in shown
    assert shown.count("failed: ") == 1 and shown.count("finished") == 1
    [good] = [run for run in (tmp_path / "runs").iterdir() if (run / "results.json").exists()]
    assert (good / "train.ipynb").exists() and "Step 20/20" in (good / "sweep.log").read_text()
    results = json.loads((good / "results.json").read_text())
    assert "val_loss" in results and "test_loss" not in results  # the sweep may choose by it
    before = {path: path.read_bytes() for path in good.rglob("*") if path.is_file()}

    (tmp_path / "missing.txt").write_text((tmp_path / "text.txt").read_text())
    assert main(given) == 0
    shown = capsys.readouterr().out
    assert shown.count("finished before") == 1 and shown.count("finished") == 2
    assert "one seed: unknown" in shown
    assert {path: path.read_bytes() for path in good.rglob("*") if path.is_file()} == before


def sweep_of_two(folder: Path, **parameters) -> list[str]:
    """Return the command of a sweep over two seeds."""
    given = [word for pair in parameters.items() for word in ("-p", *map(str, pair))]
    command = [sys.executable, "-m", "lmlib", "sweep", str(SMOKE), "-p", "seed", "0", "1"]
    return [*command, "-p", "output_dir", str(folder), *given]


@pytest.mark.slow
def test_ctrl_c_lets_the_running_run_save_and_starts_no_other(tmp_path):
    command = sweep_of_two(tmp_path, **LONG)
    with subprocess.Popen(command, cwd=PROJECT_ROOT, stderr=subprocess.PIPE) as process:
        wait_until((tmp_path / "smoke-seed0" / "train.ipynb").exists, process)
        time.sleep(1)  # the kernel is only starting: the request is repeated until the run sees it
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    assert process.returncode == 130 and run_status(tmp_path / "smoke-seed0") == "stopped"
    assert len(list((tmp_path / "smoke-seed0" / "checkpoints").iterdir())) == 1
    assert not (tmp_path / "smoke-seed1").exists()


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_process_behind_and_its_run_is_saved(tmp_path):
    with subprocess.Popen(sweep_of_two(tmp_path, **LONG), cwd=PROJECT_ROOT) as process:
        metrics = tmp_path / "smoke-seed0" / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and '"step"' in metrics.read_text(), process)
        process.kill()
    wait_until(lambda: processes_of(tmp_path) == [])
    assert run_status(tmp_path / "smoke-seed0") == "stopped"
    assert checkpoint_steps(tmp_path / "smoke-seed0")


@pytest.mark.slow
def test_two_sweeps_over_one_folder_share_the_runs(tmp_path):
    """As on two machines: each run is trained once, and neither sweep ends before all runs."""
    options = {"cwd": PROJECT_ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    command = sweep_of_two(tmp_path)
    sweeps = [subprocess.Popen(command, text=True, **options) for _ in range(2)]
    shown = [process.communicate()[0] for process in sweeps]
    assert [process.returncode for process in sweeps] == [0, 0], shown
    assert all(text.count("bits per byte, ") == 2 and "failed" not in text for text in shown)
    assert any("; this sweep looks at it again later." in text for text in shown)
    for seed in range(2):
        environment = json.loads((tmp_path / f"smoke-seed{seed}" / "environment.json").read_text())
        assert len(environment["sessions"]) == 1


def test_a_run_of_another_machine_is_taken_over_once_its_heartbeat_is_stale(tmp_path, monkeypatch):
    [config] = plan([SMOKE], {"total_steps": [2], "output_dir": [str(tmp_path)]})
    beat = config.run_dir / "heartbeat.json"
    beat.parent.mkdir()
    beat.write_text('{"machine": "another", "pid": 7}')
    monkeypatch.setattr(launch, "PAUSE", 0.1)
    looked = []

    def holder(run_dir: Path) -> str:
        if len(looked) == 3:  # it has died
            os.utime(beat, (time.time() - 60,) * 2)
        looked.append(lock.run_holder(run_dir))
        return looked[-1]

    monkeypatch.setattr(launch, "run_holder", holder)
    [outcome] = sweep([config])
    assert outcome.state == "finished" and set(looked) == {"7 on another"} and len(looked) >= 4


def test_an_unusable_folder_or_a_run_in_training_fails_alone(tmp_path):
    configs = plan([SMOKE], {"seed": [0, 1, 2], "output_dir": [str(tmp_path)]})
    configs[0].run_dir.write_text("a file where the folder should be")
    configs[1].run_dir.mkdir()
    (configs[1].run_dir / "results.json").write_text("{}")
    with hold_lock(configs[2].run_dir):
        outcomes = {outcome.config.run_name: outcome for outcome in sweep(configs)}
    assert {outcome.state for outcome in outcomes.values()} == {"failed"}
    assert "itself is training it" in outcomes["smoke-seed2"].message
    assert not configs[2].run_dir.exists()


def test_jobs_share_the_devices_that_the_user_gave(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert _shares(3) == [{"CUDA_VISIBLE_DEVICES": name} for name in "232"]
    assert _shares(None, processes=2) == [{"CUDA_VISIBLE_DEVICES": "2,3"}]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    pairs = [{"CUDA_VISIBLE_DEVICES": names} for names in ("0,1", "2,3")]
    assert _shares(None, processes=2) == pairs
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert _shares(None) == [{"CUDA_VISIBLE_DEVICES": name} for name in "01"]


def test_the_search_suggests_a_rate_that_learns_and_changes_no_state(smoke):
    """Training afterwards is bit for bit what it is without a search."""
    shape = {"hidden_size": 64, "dropout": 0.1, "total_steps": 12}
    alone = smoke(**shape)
    list(lmlib.train(alone))
    searched = smoke(**shape)
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    found = find_learning_rate(searched, steps=60)
    assert torch.equal(torch.random.get_rng_state(), state) and not searched.run_dir.exists()
    list(lmlib.train(searched))
    assert fingerprint(searched.run_dir) == fingerprint(alone.run_dir)

    assert found.factors[0] == 1e-3 and found.factors == sorted(found.factors)
    assert len(found.losses) == len(found.factors)
    assert found.losses[0] == pytest.approx(6.24, abs=0.05)  # ln 512: random weights
    assert min(found.losses) < 5.6
    lowest = found.losses.index(min(found.losses))
    assert 1e-2 < found.factor < found.factors[lowest] * 1.0001
    assert set(found.suggestion) == {"learning_rate", "muon_learning_rate"}
    assert find_learning_rate(searched, steps=60) == found


def test_a_search_that_never_learns_suggests_nothing():
    config = lmlib.RunConfig()
    assert _steepest([0.1, 1.0, 10.0], [5.0, 5.1, 5.2]) is None and _steepest([], []) is None
    found = RangeTest(config, [0.1, 1.0, 10.0], [5.0, 5.1, 5.2], None)
    assert found.suggestion == {} and [c.learning_rate for c in candidates(found, 5)] == [
        config.learning_rate
    ]
    assert _steepest([1, 2, 4, 8, 16], [5.0, 4.9, 4.0, 3.95, 9.0]) == 2


def test_candidates_are_short_runs_beside_the_suggestion(smoke, capsys):
    config = smoke(total_steps=500)
    found = RangeTest(config, [0.1, 1.0, 3.0], [5.0, 4.0, 6.0], 0.5)
    short = candidates(found, 5)
    assert [c.learning_rate for c in short] == [0.0017, 0.005, 0.01, 0.015]
    assert short[1].muon_learning_rate == 0.01
    assert {(c.total_steps, c.eval_every) for c in short} == {(5, 5)}
    folder = config.run_dir.with_name(f"{config.run_name}-rates")
    assert short[0].run_dir == folder / "5steps-rate0.0017-0.0033"
    near = candidates(RangeTest(config, [0.1, 1.0, 3.0], [5.0, 4.0, 6.0], 1.04), 5)
    assert len({c.run_dir for c in near}) == len(near) == 4
    given = ["find-rate", str(SMOKE), "-p", "output_dir", config.output_dir]
    given += ["-p", "hidden_size", "64"]
    assert main(given) == 0 and "Suggested: -p learning_rate " in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", [["sweep", str(SMOKE), "-p", "seed"], ["sweep", str(SMOKE), "--jobs", "0"]]
)
def test_invalid_options_of_a_sweep_are_refused(command, capsys):
    assert main(command) == 1
    assert "write -p NAME VALUE" in (said := capsys.readouterr().err) or "--jobs is 0" in said


def test_the_recipes_of_experiment_8_differ_as_they_should():
    """Of each cell at full size: experts add to the total parameters, not to the active ones."""
    counts = {}
    for file in (PROJECT_ROOT / "params" / "exp8").glob("*.yaml"):
        config = lmlib.RunConfig.load(file)
        with torch.device("meta"):
            model = lmlib.LanguageModel(config)
        from lmlib import training

        assert training.model_name(config) == file.stem and config.run_name == f"exp8_{file.stem}"
        counts[file.stem] = parameter_count(model), active_parameter_count(model)
    assert json.loads(json.dumps(counts)) == {
        "mlp_512d": [37_758_464, 37_758_464],
        "attention_mlp_512d": [36_281_024, 36_281_024],
        "moe_4e_2k_512d": [43_993_088, 37_726_208],
        "moe_8e_2k_512d": [56_532_992, 37_732_352],
        "moe_16e_2k_512d": [81_612_800, 37_744_640],
        "attention_moe_4e_2k_512d": [42_517_184, 36_250_304],
        "attention_moe_8e_2k_512d": [55_057_088, 36_256_448],
        "attention_moe_16e_2k_512d": [80_136_896, 36_268_736],
    }


def test_ctrl_c_while_a_run_is_started_is_raised_after_it_is_known():
    """Else the process, which has a session of its own, would train on unseen."""
    from lmlib.sweep.launch import _ctrl_c_deferred

    started = []
    with pytest.raises(KeyboardInterrupt), _ctrl_c_deferred():
        signal.raise_signal(signal.SIGINT)
        started.append("known")
    assert started == ["known"]
