"""The commands as typed."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields

import nbformat
import pexpect
import pytest

from lmlib.cli.parser import EXTRAS, missing_packages, parser
from lmlib.files import PROJECT_ROOT
from lmlib.generation.settings import Settings, format_setting, parse_setting

STEPS = {"best": "best", "500": 500, "0": 0}


def lmlib(*arguments, text=None, check=0, python=("-m", "lmlib")):
    """Run a command, check its exit status and return all that it printed."""
    command = [sys.executable, *python, *map(str, arguments)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=PROJECT_ROOT)
    assert done.returncode == check, done.stdout + done.stderr
    return done.stdout + done.stderr


def smoke_with(**parameters) -> list:
    """The smoke recipe and its -p options."""
    pairs = [word for name, value in parameters.items() for word in ("-p", name, value)]
    return ["params/smoke.yaml", *pairs]


def test_train_draws_curves_and_says_when_a_run_is_finished(outputs):
    recipe = smoke_with(output_dir=outputs, run_name="terminal", total_steps=6)
    out = lmlib("train", *recipe)
    assert "A new run of 6 steps" in out and "Step 6/6: Loss=" in out and "   Val Loss: " in out
    assert (outputs / "terminal" / "training_curves.html").exists()
    assert "is finished: 6 steps. To continue, raise total_steps" in lmlib("train", *recipe)
    assert "Resuming from step 6 of 8" in lmlib("train", *recipe[:-1], 8)
    [line] = [line for line in lmlib("runs", outputs).splitlines() if line.startswith("terminal ")]
    (outputs / "elsewhere").symlink_to(outputs / "terminal", target_is_directory=True)
    try:  # one run under two names, by a path relative to the project's root
        shown = lmlib("runs", os.path.relpath(outputs, PROJECT_ROOT))
        assert len(re.findall(r"^(elsewhere|terminal) .* 8 of 8 ", shown, re.MULTILINE)) == 1
    finally:
        (outputs / "elsewhere").unlink()
    bits = json.loads((outputs / "terminal" / "results.json").read_text())["val_bits_per_byte"]
    assert re.search(rf"^terminal +finished +20\d\d-.* 8 of 8 +{bits:.3f}", line)


def test_invalid_parameters_end_in_a_sentence_and_write_nothing(outputs):
    before = sorted(outputs.iterdir())
    out = lmlib("train", *smoke_with(output_dir=outputs, totl_steps=5), check=1)
    assert out.startswith("Error:") and "did you mean total_steps" in out and "Traceback" not in out
    out = lmlib("train", *smoke_with(output_dir=outputs), "-p", "self", 1, check=1)
    assert "self is not a parameter" in out and "Traceback" not in out
    out = lmlib("notebook", *smoke_with(output_dir=outputs), "-p", "x;import os", 5, check=1)
    assert "is not a valid parameter name" in out
    assert sorted(outputs.iterdir()) == before


def test_notebook_is_written_to_the_runs_folder_and_left_as_it_is_when_finished(outputs):
    recipe = smoke_with(output_dir=outputs, run_name="by_notebook", learning_rate="3e-3")
    out = lmlib("notebook", *recipe)
    assert "Step 20/20: Loss=" in out and "Everything is in" in out and "WARNING" not in out
    executed = outputs / "by_notebook" / "train.ipynb"
    book, before = nbformat.read(executed, 4), executed.read_bytes()
    injected = next(
        cell for cell in book.cells if "injected-parameters" in cell.metadata.get("tags", [])
    )
    assert "learning_rate = 0.003" in injected.source
    assert "left as it is" in lmlib("notebook", *recipe)
    assert executed.read_bytes() == before


def test_ctrl_c_on_the_notebook_saves_and_says_how_to_resume(outputs, tmp_path):
    recipe = smoke_with(output_dir=outputs, run_name="interrupted", total_steps=100_000)
    recipe += ["-p", "checkpoint_every", 50_000]
    command = [sys.executable, "-m", "lmlib", "notebook", *map(str, recipe)]
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=PROJECT_ROOT)
    deadline = time.monotonic() + 120
    while "Step 9/" not in (tmp_path / "out").read_text():
        said = (tmp_path / "out").read_text()
        assert time.monotonic() < deadline and process.poll() is None, said
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    said = (tmp_path / "out").read_text()
    assert "Stopping after this step" in said
    [line] = [line for line in said.splitlines() if "The checkpoint is saved; run the" in line]
    assert line.startswith("Stopped at step ") and "Traceback" not in said
    assert len(list((outputs / "interrupted" / "checkpoints").iterdir())) == 1


def test_generate_in_batch(trained):
    batch = ["generate", trained.run_dir, "--mode", "batch"]
    out = lmlib(*batch, "--prompts", "Hello world", "Once", "--max-new-tokens", 5)
    assert out.count("🎯 Prompt: ") == 2 and "🤖 Generated: Hello world" in out
    assert "batch mode needs prompts" in lmlib(*batch, check=1)
    assert "it has: 5, 10, 15, 20" in lmlib("generate", trained.run_dir, "--step", 7, check=1)
    assert "temperature is -1.0" in lmlib("generate", trained.run_dir, "--temperature", -1, check=1)


def test_generate_interactively(trained):
    text = "checkpoints\nload 10\nload 11\nparams\nOnce upon a time\n\n/exit\n"
    out = lmlib("generate", trained.run_dir, "--max-new-tokens", 5, text=text)
    assert "step      20  validation loss" in out and "Loaded step 10." in out
    assert "no checkpoint of step 11" in out
    assert "temperature: 0.8" in out and "🤖 Generated: Once upon a time" in out
    assert "Error" in lmlib("generate", trained.run_dir, text="word " * 500 + "\n")


def test_checkpoints(trained, tmp_path):
    out = lmlib("checkpoints", trained.run_dir)
    assert [line.split()[1] for line in out.splitlines()] == ["5", "10", "15", "20"]
    assert out.count("(can be resumed)") == 2
    assert "There is no folder" in lmlib("checkpoints", tmp_path / "nothing", check=1)


def test_a_misspelled_run_names_the_nearest_without_asking_the_hub(trained):
    near = trained.run_dir.with_name(trained.run_dir.name[:-1])
    for command in ("audit", "generate", "checkpoints", "stop"):
        began = time.monotonic()
        said = lmlib(command, near, check=1)
        assert f"There is no folder {near}; did you mean {trained.run_dir}" in said
        assert time.monotonic() - began < 20  # transformers would try for 24 seconds or more


def test_a_batch_takes_prompts_from_anywhere_and_writes_json_lines(trained, tmp_path):
    out, file = tmp_path / "out.jsonl", tmp_path / "prompts.txt"
    file.write_text("My lord\n\nOnce \x1b[31mupon\n")
    batch = ["generate", trained.run_dir, "--mode", "batch"]
    options = ["--prompts-file", file, "--max-new-tokens", 5, "--output", out]
    lmlib(*batch, "--prompts", "Hello", "-", *options, text="from here\nand here\n")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    prompts = ["Hello", "from here", "and here", "My lord", "Once \x1b[31mupon"]
    assert [line["prompt"] for line in lines] == prompts
    assert all(line["tokens"] == 5 and line["ended_by"] == "length" for line in lines)
    assert all(line["text"] for line in lines)
    before = out.read_text()
    again = ["--prompts", "Hello", "--output", out, "--top-k", 10000]
    assert "top_k is 10000; write 1 to 512" in lmlib(*batch, *again, check=1)
    assert out.read_text() == before


def test_a_batch_shows_untrusted_text_safely_and_refuses_what_it_cannot_do(trained):
    batch = ["generate", trained.run_dir, "--mode", "batch"]
    out = lmlib(*batch, "--prompts", "Once \x1b[31mupon", "--step", 10)
    assert "\x1b" not in out and "🎯 Prompt: Once \\x1b[31mupon" in out
    hot = ["--prompts", "Hello", "--temperature", "hot"]
    assert "temperature is 'hot'" in lmlib(*batch, *hot, check=1)
    interactive = ["generate", trained.run_dir, "--mode", "interactive", "--prompts", "x"]
    assert "belong to --mode batch" in lmlib(*interactive, check=1)
    long = ["--prompts", "Hello", "word " * 200]
    assert "prompt 2: The prompt has" in lmlib(*batch, *long, check=1)
    assert "batch mode needs prompts" in lmlib(*batch, check=1)


def test_every_sampling_setting_is_an_option_with_its_help_and_default():
    shown = " ".join(lmlib("generate", "--help").split())
    for field in fields(Settings):
        default = format_setting(field.default)
        assert f"--{field.name.replace('_', '-')} VALUE" in shown
        assert f"{field.metadata['help']} ({default})" in shown
        assert parse_setting(field.name, default) == field.default


@pytest.mark.parametrize("command", ["generate", "audit"])
def test_a_step_is_a_number_or_best(command, capsys):
    steps = {text: parser().parse_args([command, "x", "--step", text]).step for text in STEPS}
    assert steps == STEPS
    assert parser().parse_args([command, "x"]).step is None
    for text in ("first", "-1", "1.5", "Best"):
        with pytest.raises(SystemExit):
            parser().parse_args([command, "x", f"--step={text}"])
        said = capsys.readouterr().err
        assert f"{text!r} is not a step; write one, as in 500, or best" in said


@pytest.mark.parametrize("command", [[], ["train"], ["generate"], ["audit"]])
def test_help_imports_neither_torch_nor_pandas(command):
    shown = lmlib(*command, "--help", python=("-X", "importtime", "-m", "lmlib"))
    assert " ".join(["usage: lmlib", *command]) in shown
    lines = [line for line in shown.splitlines() if line.startswith("import time:")]
    imported = {line.split("|")[-1].strip().split(".")[0] for line in lines}
    heavy = {"torch", "transformers", "numpy", *EXTRAS["notebook"]}
    assert "argparse" in imported and not imported & heavy


# ---------------------------------------------------------------------------------------------
# Without the notebook packages


def core(*arguments, check=0):
    """Run a command where the notebook packages cannot be imported."""
    script = """if True:
        import sys
        from lmlib.cli.parser import EXTRAS, main
        sys.modules.update(dict.fromkeys(EXTRAS['notebook']))  # None: importing it fails
        sys.exit(main(sys.argv[1:]))
    """
    return lmlib(*arguments, check=check, python=("-c", script))


def test_the_core_packages_are_enough_to_train_generate_and_audit(tmp_path, text_file):
    run = tmp_path / "core"
    recipe = smoke_with(output_dir=tmp_path, run_name="core", corpus=text_file, vocab_size=300)
    recipe += smoke_with(validation_fraction=0.5, total_steps=4, checkpoint_every=2)[1:]
    assert "Done: 4 steps" in core("train", *recipe)
    assert (run / "results.json").exists() and not (run / "training_curves.html").exists()
    assert "is finished: 4 steps" in core("train", *recipe)
    prompt = ["--prompts", "To be", "--max-new-tokens", 5]
    assert "🤖 Generated: To be" in core("generate", run, *prompt)
    assert "validation loss" in core("checkpoints", run)
    audited = core("audit", run)
    assert "causality" in audited
    assert 'The page needs the notebook packages: pip install -e ".[notebook]".' in audited
    assert "is not running here" in core("stop", run, check=1)


@pytest.mark.parametrize("command", ["notebook", "sweep", "runs"])
def test_a_command_that_needs_the_notebook_packages_says_so(command, tmp_path):
    arguments = [tmp_path] if command == "runs" else smoke_with(output_dir=tmp_path)
    shown = core(command, *arguments, check=1)
    assert shown == (
        f'lmlib {command} needs the notebook packages: pip install -e ".[notebook]".\n'
    )
    assert not list(tmp_path.iterdir())


def test_a_missing_package_of_the_core_is_not_explained_away():
    with pytest.raises(ModuleNotFoundError):
        missing_packages("lmlib train", ModuleNotFoundError("no torch", name="torch.nn"))


# ---------------------------------------------------------------------------------------------
# Runs and sessions


def test_runs_says_what_qualifies_their_scores(tmp_path):
    def write(name, *records, **config):
        (tmp_path / name).mkdir()
        lines = [*map(json.dumps, records), "["]  # the last one cut off
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines))
        (tmp_path / name / "config.json").write_text(json.dumps(config))

    first, last = ({"kind": "eval", "step": n, "val_loss": x} for n, x in ((0, 5.0), (5, math.nan)))
    write("diverged", first, last, seed=0)
    write("new", seed=0, lmlib_leaky="split")
    write("strange", {"kind": ["x"], "step": "y"}, {"kind": "eval", "step": 1, "val_loss": [1]})
    long = "a_" * 40
    write(long, seed=0)
    head, *lines = lmlib("runs", tmp_path).splitlines()
    assert head.split() == ["run", "state", "started", "steps", "bits", "per", "byte"]
    assert max(map(len, [head, *lines])) <= 100 and long in lines
    cut = "line of metrics.jsonl cannot be read"
    below = dict(itertools.pairwise(lines))
    [diverged] = [line for line in lines if re.search(r"^diverged  .*stopped +- +5 ", line)]
    assert below[diverged] == f"    1 {cut}; some losses are not finite"
    [new] = [line for line in lines if re.search(r"^new  .* 0 +-$", line)]
    assert below[new] == f"    it LEAKS (split); no records yet; 1 {cut}"
    [strange] = [line for line in lines if line.startswith("strange")]
    assert below[strange].endswith("cannot be read; some losses")
    assert below[below[strange]] == "    are not finite"


def test_runs_are_listed_newest_first_with_a_warning_where_they_cannot_be_compared(
    trained, tmp_path
):
    for name, started in (("old", "2026-01-01T00:00:00Z"), ("new", "2026-02-01T00:00:00Z")):
        shutil.copytree(trained.run_dir, tmp_path / name)
        file = tmp_path / name / "environment.json"
        known = json.loads(file.read_text())
        known["sessions"][-1]["started"] = started
        file.write_text(json.dumps(known))
    _, new, old = lmlib("runs", tmp_path).splitlines()
    assert (new[:4].strip(), old[:4].strip()) == ("new", "old") and "2026-02-01" in new
    known["data"]["tokenizer"] = "another"
    file.write_text(json.dumps(known))
    warned = lmlib("runs", tmp_path)
    assert "These runs differ in tokenizer" in warned and "bits per byte can" in warned


def test_a_misspelled_command_or_recipe_names_the_nearest(tmp_path):
    assert "trian is not a command; did you mean train?" in lmlib("trian", check=2)
    shown = lmlib("train", "params/smok.yaml", check=1)
    assert "There is no parameter file params/smok.yaml; did you mean params/smoke.yaml?" in shown
    shown = lmlib("train", "mine", check=1)
    assert shown.startswith("Error: There is no parameter file mine (params/exp9.yaml, ")


def test_a_recipe_is_found_by_its_name_in_params():
    for command in ("train", "notebook", "sweep", "find-rate"):
        params = parser().parse_args([command, "no_mask"]).params
        assert params in (file := "params/exp9_seed_small/no_mask.yaml", [file])
    assert parser().parse_args(["train", "exp8/mlp_512d"]).params == "params/exp8/mlp_512d.yaml"
    assert parser().parse_args(["train", "params/smoke.yaml"]).params == "params/smoke.yaml"
    assert parser().parse_args(["train"]).params == "params/quickstart.yaml"


def test_no_command_prints_the_help():
    assert lmlib() == lmlib("--help")


def test_a_terminal_has_colors_and_a_file_has_none(trained):
    command = [sys.executable, "-m", "lmlib", "runs", str(trained.output_dir)]
    plain = lmlib("runs", trained.output_dir)
    assert "\x1b" not in plain

    def shown(**environment) -> str:
        place = {"cwd": str(PROJECT_ROOT), "encoding": "utf-8", "timeout": 60}
        child = pexpect.spawn(
            command[0],
            command[1:],
            dimensions=(50, 500),
            env={**os.environ, **environment},
            **place,
        )
        return child.read()

    assert "\x1b[32mfinished" in shown()
    assert "\x1b" not in shown(NO_COLOR="1")


def test_a_session_in_a_real_terminal(trained):
    """Through a pseudo-terminal: editing, history, Ctrl-C, settings, checkpoints, errors."""
    command = ["-m", "lmlib", "generate", str(trained.run_dir)]
    place = {"cwd": str(PROJECT_ROOT), "encoding": "utf-8", "timeout": 60}
    child = pexpect.spawn(sys.executable, command, **place)
    child.expect("Prompt: ")

    def say(line: str, *answers: str):
        child.sendline(line)
        for answer in answers:
            child.expect_exact(answer)
        child.expect("Prompt: ")

    say("again", "Error: again: there is no prompt yet")
    slid = "longer than the context window: the model saw only the last 64 tokens"
    say("To be", "Generated: To be", "100 tokens", slid)
    say("set max_new_tokens 5", "max_new_tokens: 5")
    say("\x1b[A\x1b[A", "Generated: To be", "5 tokens")  # two lines up in the history
    say("To bx\x7fe", "Generated: To be")  # a key undone
    say("set temperature -1", "Error: temperature is -1")
    say("set warmth 1", "warmth is not a setting", "The settings are max_new_tokens")
    say("set temprature 1", "temprature is not a setting; did you mean temperature?")
    say("set top_k", "Error: set top_k: write a value too, as in set top_k 50")
    say("helpp", "Error: helpp is not a command; did you mean help?")
    say("/help", "These lines are commands")
    say(" helpp", "Generated:  helpp", "5 tokens")
    say("params", "max_new_tokens: 5", "temperature: 0.8")
    say("load 10", "Loaded step 10.")
    say("load 7", "Error:", "has no checkpoint of step 7; it has: 5, 10, 15, 20")
    say("checkpoints", "step      20", "best")
    say("load abc", "Error: load abc: write a step, as in load 500, or load best")
    say("set stop_strings The End|\\n\\n", "stop_strings: The End|\\n\\n")
    say("again", "(seed 1)", "tokens")
    say("set stop_strings none", "stop_strings: none")
    child.sendline("")
    assert child.expect_exact(["Prompt: ", "Generated: "]) == 0
    say("<|endoftext|>", "5 tokens")
    say("🐎 שלום", "Generated: 🐎 שלום")
    say("set max_new_tokens 100000", "max_new_tokens: 100000")
    child.sendline("To be")
    child.expect_exact("Generated: To be")
    child.sendintr()
    child.expect_exact("(stopped)")
    child.expect("Prompt: ")
    child.sendintr()
    child.expect_exact("(type quit to leave)")
    child.expect("Prompt: ")
    child.sendline("quit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
