"""python -m lmlib: the commands as typed."""

import signal
import subprocess
import sys
import time

import nbformat

from lmlib.config import PROJECT_ROOT


def lmlib(*arguments, text=None, check=0):
    done = subprocess.run(
        [sys.executable, "-m", "lmlib", *map(str, arguments)],
        **{"input": text, "capture_output": True, "text": True, "cwd": PROJECT_ROOT},
    )
    assert done.returncode == check, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_train_leaves_curves_and_says_when_there_is_nothing_to_do(outputs):
    command = ["train", "params/smoke.yaml", "-p", "output_dir", outputs, "-p", "run_name", "terminal", "-p", "total_steps", 6]
    out = lmlib(*command)
    assert "A new run of 6 steps" in out and "Step 6/6: Loss=" in out and "   Val Loss: " in out
    assert (outputs / "terminal" / "training_curves.html").exists()
    assert "is finished: 6 steps. To go on, raise total_steps" in lmlib(*command)
    assert "Going on after step 6 of 8" in lmlib(*command[:-1], 8)
    assert "terminal                 finished    step       8" in lmlib("runs", outputs)


def test_mistakes_are_sentences_and_write_nothing(outputs):
    before = sorted(outputs.iterdir())
    out = lmlib("train", "params/smoke.yaml", "-p", "output_dir", outputs, "-p", "totl_steps", 5, check=1)
    assert out.startswith("Error:") and "did you mean total_steps" in out and "Traceback" not in out
    out = lmlib("notebook", "params/smoke.yaml", "-p", "output_dir", outputs, "-p", "x;import os", 5, check=1)
    assert "is not a parameter's name" in out
    assert sorted(outputs.iterdir()) == before


def test_notebook_leaves_itself_in_the_runs_folder_and_is_left_alone_when_finished(outputs):
    command = ["notebook", "params/smoke.yaml", "-p", "output_dir", outputs, "-p", "run_name", "by_notebook"]
    out = lmlib(*command, "-p", "learning_rate", "3e-3")
    assert "Step 20/20: Loss=" in out and "Everything is in" in out and "WARNING" not in out
    executed = outputs / "by_notebook" / "train.ipynb"
    book, before = nbformat.read(executed, 4), executed.read_bytes()
    injected = next(cell for cell in book.cells if "injected-parameters" in cell.metadata.get("tags", []))
    assert "learning_rate = 0.003" in injected.source
    assert "left as it is" in lmlib(*command, "-p", "learning_rate", "3e-3")
    assert executed.read_bytes() == before


def test_ctrl_c_on_the_notebook_saves_and_says_how_to_go_on(outputs, tmp_path):
    command = [sys.executable, "-m", "lmlib", "notebook", "params/smoke.yaml", "-p", "total_steps", "100000"]
    command += ["-p", "output_dir", str(outputs), "-p", "run_name", "interrupted", "-p", "checkpoint_every", "50000"]
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=PROJECT_ROOT)
    deadline = time.monotonic() + 120
    while "Step 9/" not in (tmp_path / "out").read_text():
        assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "out").read_text()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    said = (tmp_path / "out").read_text()
    assert "Stopping after the step at hand" in said and "Its checkpoint is saved: start the same run again" in said
    assert len(list((outputs / "interrupted" / "checkpoints").iterdir())) == 1


def test_generate_in_batch(trained):
    out = lmlib("generate", trained.run_dir, "--mode", "batch", "--prompts", "Hello world", "Once", "--max-new-tokens", 5)
    assert out.count("🎯 Prompt: ") == 2 and "🤖 Generated: Hello world" in out
    assert "batch mode needs prompts" in lmlib("generate", trained.run_dir, "--mode", "batch", check=1)
    assert "it has: 5, 10, 15, 20" in lmlib("generate", trained.run_dir, "--step", 7, check=1)
    assert "temperature is -1.0" in lmlib("generate", trained.run_dir, "--temperature", -1, check=1)


def test_generate_interactively(trained):
    text = "checkpoints\nload 10\nload 11\nparams\nOnce upon a time\n\nexit\n"
    out = lmlib("generate", trained.run_dir, "--max-new-tokens", 5, text=text)
    assert "step      20  held-out loss" in out and "Loaded step 10." in out and "no checkpoint of step 11" in out
    assert "temperature: 0.8" in out and "🤖 Generated: Once upon a time" in out
    assert "Error" in lmlib("generate", trained.run_dir, text="word " * 500 + "\n")


def test_checkpoints(trained, tmp_path):
    out = lmlib("checkpoints", trained.run_dir)
    assert [line.split()[1] for line in out.splitlines()] == ["5", "10", "15", "20"]
    assert out.count("can be continued") == 2
    assert "There is no run" in lmlib("checkpoints", tmp_path / "nothing", check=1)
