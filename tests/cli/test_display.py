"""What happens to the display costs the display, never the run."""

import json
import os
import pty
import re
import signal
import subprocess
import sys

import pytest
from process import command, start, wait_for

from lmlib.checkpoint import checkpoint_steps, verify_state
from lmlib.files import PROJECT_ROOT

pytestmark = pytest.mark.usefixtures("sighup")

LONG = {"total_steps": 100_000, "eval_every": 50_000, "checkpoint_every": 50_000}


def is_finished(run_dir) -> bool:
    return (run_dir / "results.json").exists() and checkpoint_steps(run_dir) == [5, 10, 15, 20]


def saved_step(run_dir) -> int:
    """Return the step of the only checkpoint of a run, which must be whole."""
    [step] = checkpoint_steps(run_dir)
    verify_state(run_dir / "checkpoints" / f"checkpoint_step_{step}")
    return step


# ---------------------------------------------------------------------------------------------
# Errors in printing


@pytest.mark.parametrize("name", ["train", pytest.param("notebook", marks=pytest.mark.slow)])
def test_a_latin_1_terminal_shows_escapes_and_the_run_finishes(outputs, name):
    words = command(name, output_dir=outputs, run_name=f"latin-{name}")
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(words, capture_output=True, cwd=PROJECT_ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert rb"\u2192" in done.stdout  # the arrow of a sample
    assert is_finished(outputs / f"latin-{name}")


@pytest.mark.parametrize("name", ["train", "notebook"])
def test_a_reader_that_leaves_the_pipe_does_not_end_the_run(outputs, name):
    words = command(name, output_dir=outputs, run_name=f"piped-{name}")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, cwd=PROJECT_ROOT, **pipes) as process:
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read().decode()
        assert process.wait() == 0, said
    assert said.count("Nothing more is printed") == 1 and "Broken pipe" in said
    assert "Traceback" not in said and "Exception ignored" not in said
    assert is_finished(outputs / f"piped-{name}")


def test_a_full_disk_under_the_output_does_not_end_the_run(outputs):
    words = command("train", output_dir=outputs, run_name="full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, cwd=PROJECT_ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(b"Nothing more is printed") == 1 and b"No space left" in done.stderr
    assert is_finished(outputs / "full")


def test_a_full_disk_costs_the_notebook_not_the_run(outputs):
    run_dir = outputs / "full-notebook"
    run_dir.mkdir()
    (run_dir / ".train.ipynb.draft").symlink_to("/dev/full")
    words = command("notebook", output_dir=outputs, run_name="full-notebook")
    done = subprocess.run(words, capture_output=True, text=True, cwd=PROJECT_ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("train.ipynb cannot be written") == 1
    assert "No space left on device" in done.stderr and "Step 20/20" in done.stdout
    assert is_finished(run_dir)


def test_curves_that_cannot_be_drawn_at_ctrl_c_are_reported(outputs, tmp_path):
    """Their file is a folder here."""
    (outputs / "undrawn" / "training_curves.html").mkdir(parents=True)
    log = tmp_path / "log"
    process = start(log, *command("train", output_dir=outputs, run_name="undrawn", **LONG))
    wait_for(process, log, "Step 3/")
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert "The curves cannot be drawn" in log.read_text()
    assert "run the same command to resume" in log.read_text()
    assert saved_step(outputs / "undrawn") >= 3


# ---------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize(
    ("name", "number"), [("train", "SIGHUP"), ("notebook", "SIGHUP"), ("notebook", "SIGTERM")]
)
def test_a_signal_saves_and_stops(outputs, tmp_path, name, number):
    run_name, log = f"{name}-{number}", tmp_path / "log"
    process = start(log, *command(name, output_dir=outputs, run_name=run_name, **LONG))
    wait_for(process, log, "Step 3/")
    process.send_signal(signal.Signals[number])
    process.send_signal(signal.Signals[number])  # a closing terminal may send it twice
    assert process.wait() == 130, log.read_text()
    step = int(re.search(r"Stopped at step (\d+)", log.read_text())[1])
    assert saved_step(outputs / run_name) == step >= 3


@pytest.mark.parametrize("name", ["train", pytest.param("notebook", marks=pytest.mark.slow)])
def test_a_terminal_that_is_gone_leaves_a_saved_run(outputs, tmp_path, name):
    """Closing a pseudo-terminal sends SIGHUP; what is printed later fails (EIO)."""
    run_name, log = f"gone-{name}", outputs / f"gone-{name}" / "metrics.jsonl"
    words = command(name, output_dir=outputs, run_name=run_name, **LONG)
    child, terminal = pty.fork()
    if child == 0:  # the leader of a session with this terminal
        os.chdir(PROJECT_ROOT)
        os.execv(sys.executable, words)
    said = b""
    while b"Step 3/" not in said:
        said += os.read(terminal, 1000)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    last = json.loads(log.read_text().splitlines()[-1])
    assert saved_step(outputs / run_name) == last["step"] >= 3


@pytest.mark.parametrize("name", ["train", pytest.param("notebook", marks=pytest.mark.slow)])
def test_nohup_ignores_sighup(outputs, tmp_path, name):
    run_name, log = f"nohup-{name}", tmp_path / "log"
    words = command(name, output_dir=outputs, run_name=run_name, **LONG)
    process = start(log, "nohup", *words)
    wait_for(process, log, "Step 3/")
    process.send_signal(signal.SIGHUP)
    seen = log.read_text().count("Step ")
    wait_for(process, log, "Step ", times=seen + 3)
    assert not checkpoint_steps(outputs / run_name)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert "SIGINT" in log.read_text() or name == "notebook"


def test_sighup_on_a_sweep_saves_its_run(outputs, tmp_path):
    log = tmp_path / "log"
    words = command("sweep", output_dir=outputs, seed=7, **LONG)
    process = start(log, *words)
    run_dir = outputs / "smoke-seed7"
    wait_for(process, log, "runs in")
    try:
        metrics = run_dir / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count('"kind": "step"') < 3:
            assert process.poll() is None, log.read_text()
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGHUP)
        assert process.wait() == 130
    finally:
        process.kill()
    assert saved_step(run_dir) >= 3


# ---------------------------------------------------------------------------------------------
# Another folder


def test_a_notebook_from_another_folder_means_the_same_paths(text_file, tmp_path):
    """`corpus` and `output_dir` are relative to the folder of the command."""
    (tmp_path / "mine.txt").write_bytes(text_file.read_bytes())
    (tmp_path / "here").mkdir()
    parameters = {"output_dir": "here", "run_name": "one", "corpus": "mine.txt"}
    words = command("notebook", **parameters, vocab_size=300, validation_fraction=0.5)
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert is_finished(tmp_path / "here" / "one")
    assert (tmp_path / "here" / "one" / "train.ipynb").exists()
    assert not (PROJECT_ROOT / "here").exists()
