"""python -m lmlib: the commands as typed."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import nbformat
import pexpect

from lmlib.files import PROJECT_ROOT


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
    [line] = [line for line in lmlib("runs", outputs).splitlines() if line.startswith("terminal ")]
    (outputs / "elsewhere").symlink_to(outputs / "terminal", target_is_directory=True)
    try:  # one run under two names, by a path that counts from here
        shown = lmlib("runs", os.path.relpath(outputs, PROJECT_ROOT))
        assert len(re.findall(r"^(elsewhere|terminal) .* at step 8$", shown, re.MULTILINE)) == 1
    finally:
        (outputs / "elsewhere").unlink()
    assert line.split()[1:6] == ["finished", "step", "8", "best", "held-out"] and line.endswith("at step 8")


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


def test_a_batch_reads_prompts_from_anywhere_and_writes_json_lines(trained, tmp_path):
    (tmp_path / "prompts.txt").write_text("My lord\n\nOnce \x1b[31mupon\n")
    command = ["generate", trained.run_dir, "--mode", "batch", "--prompts", "Hello", "-"]
    command += ["--prompts-file", tmp_path / "prompts.txt", "--max-new-tokens", 5, "--output", tmp_path / "out.jsonl"]
    lmlib(*command, text="from here\nand here\n")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["Hello", "from here", "and here", "My lord", "Once \x1b[31mupon"]
    assert all(line["tokens"] == 5 and line["ended_by"] == "length" and line["text"] for line in lines)
    out = lmlib("generate", trained.run_dir, "--mode", "batch", "--prompts", "Once \x1b[31mupon", "--step", 10)
    assert "\x1b" not in out and "🎯 Prompt: Once \\x1b[31mupon" in out
    assert "temperature is 'hot'" in lmlib(*command[:6], "--temperature", "hot", check=1)
    before = (tmp_path / "out.jsonl").read_text()
    again = ["--output", tmp_path / "out.jsonl", "--top-k", 10000]
    assert "top_k is 10000; write 1 to 512" in lmlib(*command[:6], *again, check=1)
    assert (tmp_path / "out.jsonl").read_text() == before
    assert "belong to --mode batch" in lmlib("generate", trained.run_dir, "--mode", "interactive", "--prompts", "x", check=1)
    assert "prompt 2: The prompt has" in lmlib(*command[:6], "word " * 200, check=1)
    assert "batch mode needs prompts" in lmlib(*command[:4], check=1)


def test_the_options_are_the_settings_of_generation():
    from dataclasses import asdict

    from lmlib.cli import generate
    from lmlib.cli.parser import SETTINGS
    from lmlib.generation.settings import Settings

    assert {name: generate.shown_setting(value) for name, value in asdict(Settings()).items()} == SETTINGS


def test_a_session_in_a_real_terminal(trained):
    """Through a pseudo-terminal: editing, history, Ctrl-C, settings, checkpoints, mistakes."""
    child = pexpect.spawn(
        sys.executable, ["-m", "lmlib", "generate", str(trained.run_dir)], cwd=str(PROJECT_ROOT), encoding="utf-8", timeout=60
    )
    child.expect("Prompt: ")

    def say(line: str, *answers: str):
        child.sendline(line)
        for answer in answers:
            child.expect_exact(answer)
        child.expect("Prompt: ")

    say("again", "Error: again: there is no prompt yet")
    say("To be", "Generated: To be", "100 tokens", "past the model's window, it saw only the last 64 tokens")
    say("set max_new_tokens 5", "max_new_tokens: 5")
    say("\x1b[A\x1b[A", "Generated: To be", "5 tokens")  # two lines up in the history
    say("To bx\x7fe", "Generated: To be")  # a key undone
    say("set temperature -1", "Error: temperature is -1")
    say("set warmth 1", "Error: set warmth: write set, a name and a value; the names are max_new_tokens")
    say("params", "max_new_tokens: 5", "temperature: 0.8")
    say("load 10", "Loaded step 10.")
    say("load 7", "Error:", "has no checkpoint of step 7; it has: 5, 10, 15, 20")
    say("checkpoints", "step      20", "best")
    say("load abc", "Error: load abc: write a step")
    say("set stop_strings The End|\\n\\n", "stop_strings: The End|\\n\\n")
    say("again", "(seed 1)", "tokens")
    say("set stop_strings none", "stop_strings: none")
    say("", "Generated: ", "5 tokens")
    say("<|endoftext|>", "5 tokens")
    say("🐎 שלום", "Generated: 🐎 שלום")
    say("set max_new_tokens 100000", "max_new_tokens: 100000")
    child.sendline("To be")
    child.expect_exact("Generated: To be")
    child.sendintr()
    child.expect_exact("(stopped)")
    child.expect("Prompt: ")
    child.sendintr()
    child.expect_exact("(quit leaves)")
    child.expect("Prompt: ")
    child.sendline("quit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
