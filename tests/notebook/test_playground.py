"""The playground without a browser: Python presses its buttons."""

import json
import shutil
import time

import pytest

import lmlib
from lmlib.errors import UserError
from lmlib.generation.settings import Settings
from lmlib.notebook import token_html
from lmlib.notebook.playground import Playground, best_run, playground


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained.run_dir, tmp_path / "run")


@pytest.fixture
def play(run):
    return Playground(run, "To be", Settings(max_new_tokens=12))


def finish(play, job):
    """Return what the status line shows once a job has finished."""
    play.sampler.start(job)
    play.sampler.thread.join()
    return play.status.value


def test_the_playground_and_generate_give_the_same_text(play, run):
    assert "12 tokens" in finish(play, play.generate)
    given, text = play.last
    assert [text.text] == lmlib.generate(
        *lmlib.load(run), ["To be"], max_new_tokens=12
    ) and given == "To be"
    play.step.value = 10
    finish(play, play.generate)
    assert [play.last[1].text] == lmlib.generate(*lmlib.load(run, 10), ["To be"], max_new_tokens=12)
    finish(play, play.continue_text)
    [text] = lmlib.generate(*lmlib.load(run, 10), ["To be"], max_new_tokens=12)
    assert play.last[0] == "To be" + text.rstrip("\ufffd")  # half a character at its end
    finish(play, play.another_seed)
    assert play.fields["seed"].value == 1


def test_settings_without_a_slider_or_beyond_its_limits_apply(run):
    play = Playground(
        run, "To be", Settings(max_new_tokens=900, top_k=400, stop_strings=("e",), ignore_eos=True)
    )
    assert play.settings() == Settings(900, top_k=400, stop_strings=("e",), ignore_eos=True)
    assert "; stop string" in finish(play, play.generate)


def test_stop_ends_generation_at_once(play):
    play.fields["max_new_tokens"].max = 100_000
    play.fields["max_new_tokens"].value = 100_000
    play.sampler.start(play.generate)
    while "tokens" not in play.status.value:
        time.sleep(0.01)
    assert play.main.description == "Stop"
    play.main.click()
    play.sampler.thread.join(10)
    assert not play.sampler.thread.is_alive() and 0 < len(play.last[1].ids) < 100_000
    assert play.main.description == "Generate" and "tokens/s; stopped" in play.status.value


def test_a_new_job_takes_the_place_of_one_that_runs(play):
    play.fields["max_new_tokens"].max = 100_000
    play.fields["max_new_tokens"].value = 100_000
    play.sampler.start(play.generate)
    while "tokens" not in play.status.value:
        time.sleep(0.01)
    play.fields["max_new_tokens"].value = 12
    play.keys._handle_custom_msg({"prompt": "My lord"}, [])  # Ctrl+Enter in the prompt
    play.sampler.thread.join(10)
    assert play.prompt.value == "My lord" == play.last[0] and len(play.last[1].ids) == 12
    assert play.keys.text == "My lord" + play.last[1].text and "stopped" not in play.status.value


def test_stopping_between_the_texts_of_a_grid_is_said(play):
    play.fields["max_new_tokens"].value = 1  # each text ends before it can be stopped
    show, play.sampler.stop.is_set = token_html.grid, lambda: play.table.value.startswith("<table")
    assert show(["step"], []).startswith("<table")
    assert "Stopped: 1 of 8 texts." in finish(play, play.generate_grid)


def test_the_menu_opens_another_run_with_a_text_of_it(play, run):
    other = shutil.copytree(run, run.parent / "other")
    shutil.rmtree(other / "checkpoints" / "checkpoint_step_20")
    play = Playground(run, "To be", Settings(max_new_tokens=12))
    finish(play, play.generate_grid)
    play.menu.value = other
    play.sampler.thread.join()
    assert play.run_dir == other and play.step.value == 15 and play.chosen.value == (10, 15)
    [text] = lmlib.generate(*lmlib.load(other), ["To be"], max_new_tokens=12)
    assert play.last[1].text == text and "fill the grid" in play.table.value


def test_empty_tabs_say_what_to_do(play):
    for place, words in zip(
        (play.output, play.side_by_side, play.table, play.difference),
        ("Press Generate", "add the checkpoint", "fill the grid", "Compare two checkpoints"),
        strict=True,
    ):
        assert words in place.value


def test_the_app_opens_the_best_finished_run_that_does_not_leak(run):
    def write(name: str, started: str, bits: float, **config: str):
        folder = shutil.copytree(run, run.parent / name)
        changes = {"environment.json": {"sessions": [{"started": started}]}, "config.json": config}
        for file, change in changes.items():
            known = json.loads((folder / file).read_text())
            (folder / file).write_text(json.dumps(known | change))
        record = {"kind": "eval", "step": 20, "val_loss": bits, "val_bits_per_byte": bits}
        (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        return folder

    good, worse = write("good", "2026-01-01", 2.0), write("worse", "2026-02-01", 2.5)
    write("leaky", "2026-03-01", 0.1, lmlib_leaky="split")
    stopped = write("stopped", "2026-04-01", 1.0)
    (stopped / "results.json").unlink()
    empty = write("empty", "2026-05-01", 1.0)
    shutil.rmtree(empty / "checkpoints")
    assert best_run(run.parent) == good
    for folder in (good, worse, run):
        shutil.rmtree(folder)
    assert best_run(run.parent) == stopped


def test_the_model_is_said_to_load_and_nothing_can_be_stopped_until_it_has(play):
    seen = []
    play.status.observe(
        lambda change: seen.append((change.new, play.main.description, play.main.disabled)), "value"
    )
    finish(play, play.generate)
    (first, *button), (second, *later), *_ = seen
    assert "loading the model…" in first and button == ["Loading…", True]
    assert "generating…" in second and not play.main.disabled
    assert ["Stop", False] in [rest for _, *rest in seen] and play.main.description == "Generate"


def test_tokens_before_the_part_that_is_scored_say_why_they_are_gray(play):
    play.fields["max_new_tokens"].value = 5
    finish(play, play.generate)
    assert "not scored" not in play.output.value
    play.fields["max_new_tokens"].value = 100  # the window has 64
    finish(play, play.generate)
    assert "title='not scored: the text is longer than the context window" in play.output.value
    assert "Gray after the prompt is not scored" in play.output.value
    finish(play, play.compare)
    assert "title='not scored" in play.difference.value


def test_errors_appear_in_the_status_line_and_the_playground_keeps_working(play, run):
    play.prompt.value = "word " * 100_000
    assert "shorten the prompt" in finish(play, play.generate)
    play.prompt.value = "To be"
    shutil.rmtree(run / "checkpoints" / "checkpoint_step_15")
    play.step.value = 15
    assert "has no checkpoint of step 15; it has: 5, 10, 20" in finish(play, play.generate)
    play.temperatures.value = ""
    assert "choose at least one checkpoint" in finish(play, play.generate_grid)
    play.temperatures.value = "hot"
    assert "temperatures must be numbers" in finish(play, play.generate_grid)
    play.step.value = 20
    for prompt in ("", "<|endoftext|>", "🐎 שלום \x1b[31m", "<script>alert(1)</script>"):
        play.prompt.value = prompt
        assert "12 tokens" in finish(play, play.generate) and "<script" not in play.output.value


def test_columns_grid_and_difference_compare_texts(play):
    play._add_column()
    play.fields["temperature"].value = 0
    play._add_column()
    finish(play, play.generate_columns)
    assert (
        play.side_by_side.value.count("lmlib-text'>") == 2
        and "temperature 0," in play.side_by_side.value
    )
    finish(play, play.generate_grid)
    assert play.table.value.count("lmlib-text'>") == 8
    finish(play, play.generate)
    assert "Blue: step 20 finds it likelier than step 5" in finish(play, play.compare)
    assert play.difference.value.count("class='token'") == 12


def test_a_run_without_checkpoints_can_be_opened(tmp_path):
    play = Playground(tmp_path, "", Settings())
    assert play.step.label == "no checkpoint yet"
    assert "neither a run with checkpoints" in finish(play, play.generate)


def test_new_checkpoints_of_a_training_run_appear(play, run):
    from lmlib import checkpoint

    play._show_checkpoints([5, 10, 15, 20, 25])
    assert [value for _, value in play.step.options] == [
        5,
        10,
        15,
        20,
        25,
    ] and play.step.value == 20
    assert play.chosen.value == (15, 20)
    play._show_checkpoints([5, 10])
    assert play.step.value == 10 and "The checkpoint of step 20 is gone" in play.status.value
    assert checkpoint.checkpoint_steps(run) == [5, 10, 15, 20]


def test_outside_jupyterlab_a_line_says_where_to_open_it(run, capsys):
    playground(run)
    assert "open this notebook in JupyterLab" in capsys.readouterr().out
    with pytest.raises(UserError, match="No run under .* has a checkpoint yet. `make train`"):
        best_run(run / "checkpoints")
