"""The playground without a browser: its buttons pressed in Python."""

import shutil
import time

import pytest

import lmlib
from lmlib.generation.settings import Settings
from lmlib.notebook.playground import Playground, playground


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained.run_dir, tmp_path / "run")


@pytest.fixture
def ground(run):
    return Playground(run, "To be", Settings(max_new_tokens=12))


def pressed(ground, job):
    """What the status line says once a job is done."""
    ground._start(job)
    ground.thread.join()
    return ground.status.value


def test_it_writes_what_generate_writes(ground, run):
    assert "12 tokens" in pressed(ground, ground.write)
    given, text = ground.last
    assert [text.text] == lmlib.generate(*lmlib.load(run), ["To be"], max_new_tokens=12) and given == "To be"
    ground.step.value = 10
    pressed(ground, ground.write)
    assert [ground.last[1].text] == lmlib.generate(*lmlib.load(run, 10), ["To be"], max_new_tokens=12)
    pressed(ground, ground.go_on)
    assert ground.last[0] == "To be" + lmlib.generate(*lmlib.load(run, 10), ["To be"], max_new_tokens=12)[0]
    pressed(ground, ground.another)
    assert ground.fields["seed"].value == 1


def test_settings_without_a_slider_and_beyond_one_count_too(run):
    ground = Playground(run, "To be", Settings(max_new_tokens=900, top_k=400, stop_strings=("e",), ignore_eos=True))
    assert ground.settings() == Settings(900, top_k=400, stop_strings=("e",), ignore_eos=True)
    assert "a stop string" in pressed(ground, ground.write)


def test_stop_is_answered_at_once(ground):
    ground.fields["max_new_tokens"].max = 100_000
    ground.fields["max_new_tokens"].value = 100_000
    ground._start(ground.write)
    while "tokens" not in ground.status.value:
        time.sleep(0.01)
    ground.buttons["Stop"].click()
    ground.thread.join(10)
    assert not ground.thread.is_alive() and 0 < len(ground.last[1].ids) < 100_000
    assert ground.buttons["Stop"].disabled and not ground.buttons["Generate"].disabled


def test_mistakes_are_said_and_the_playground_lives_on(ground, run):
    ground.prompt.value = "word " * 100_000
    assert "shorten the prompt" in pressed(ground, ground.write)
    ground.prompt.value = "To be"
    shutil.rmtree(run / "checkpoints" / "checkpoint_step_15")
    ground.step.value = 15
    assert "has no checkpoint of step 15; it has: 5, 10, 20" in pressed(ground, ground.write)
    ground.temperatures.value = ""
    assert "choose at least one checkpoint" in pressed(ground, ground.write_grid)
    ground.temperatures.value = "hot"
    assert "temperatures must be numbers" in pressed(ground, ground.write_grid)
    ground.step.value = 20
    for prompt in ("", "<|endoftext|>", "🐎 שלום \x1b[31m", "<script>alert(1)</script>"):
        ground.prompt.value = prompt
        assert "12 tokens" in pressed(ground, ground.write) and "<script" not in ground.output.value


def test_texts_are_compared_by_columns_grid_and_difference(ground):
    ground._add_column()
    ground.fields["temperature"].value = 0
    ground._add_column()
    pressed(ground, ground.write_columns)
    assert ground.beside.value.count("lmlib-text'>") == 2 and "temperature 0," in ground.beside.value
    pressed(ground, ground.write_grid)
    assert ground.table.value.count("lmlib-text'>") == 8
    pressed(ground, ground.write)
    assert "Blue: step 20 finds it likelier than step 5" in pressed(ground, ground.compare)
    assert ground.difference.value.count("class='token'") == 12


def test_a_run_without_checkpoints_can_be_opened(tmp_path):
    ground = Playground(tmp_path, "", Settings())
    assert ground.step.label == "no checkpoint yet"
    assert "neither a run with checkpoints" in pressed(ground, ground.write)


def test_checkpoints_of_a_run_still_training_appear(ground, run, monkeypatch):
    from lmlib import checkpoint

    ground._show_checkpoints([5, 10, 15, 20, 25])
    assert [value for _, value in ground.step.options] == [5, 10, 15, 20, 25] and ground.step.value == 20
    assert ground.chosen.value == (15, 20)
    ground._show_checkpoints([5, 10])
    assert ground.step.value == 10 and "The checkpoint of step 20 is gone" in ground.status.value
    assert checkpoint.checkpoint_steps(run) == [5, 10, 15, 20]


def test_elsewhere_a_line_says_where_it_lives(run, capsys):
    playground(run)
    assert "open this notebook in JupyterLab" in capsys.readouterr().out
