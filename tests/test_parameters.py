"""Values on the command line and in YAML files, and what they are coerced to."""

from typing import Literal, get_type_hints

import pytest

from lmlib.config import RunConfig
from lmlib.parameters import absolute_paths, coerce, parse_overrides, read_parameters

STEP = int | Literal["best"] | None


def from_terminal(tmp_path, name, text):
    return parse_overrides([(name, text)], get_type_hints(RunConfig))


def from_file(tmp_path, name, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"{name}: {text}\n")
    return read_parameters(file)


@pytest.fixture(params=[from_terminal, from_file])
def read(request, tmp_path):
    """Return a function that reads one parameter, from the terminal or from a file."""
    return lambda name, text: RunConfig(**request.param(tmp_path, name, text)).to_dict()[name]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("seed", "010", 10),
        ("seed", "0", 0),
        ("total_steps", "1_000", 1000),
        ("total_steps", "1e3", 1000),
        ("learning_rate", "3e-4", 3e-4),
        ("learning_rate", "1.5e-3", 1.5e-3),
        ("learning_rate", "00.5", 0.5),
        ("seed", "009007199254740993", 9007199254740993),
        ("run_name", "010", "010"),
        ("run_name", "0x10", "0x10"),
    ],
)
def test_numbers_are_decimal_and_text_stays_text(read, name, text, value):
    assert read(name, text) == value


@pytest.mark.parametrize("text", ["1:30", "0x10", "0b11", "0o17", "1:30.5"])
def test_numbers_in_another_base_are_refused(read, text):
    with pytest.raises(ValueError, match=f"batch_size is '{text}'; write an integer"):
        read("batch_size", text)
    with pytest.raises(ValueError, match=f"learning_rate is '{text}'; write a number"):
        read("learning_rate", text)


@pytest.mark.parametrize(
    ("value", "coerced"), [(5, 5), ("5", 5), ("005", 5), ("best", "best"), (None, None)]
)
def test_a_step_is_an_integer_best_or_null(value, coerced):
    assert coerce("init_step", value, STEP) == (coerced, None)


@pytest.mark.parametrize("value", ["bset", 1.5, True, ""])
def test_another_step_is_refused(value):
    sentence = f"init_step is {value!r}; write an integer or 'best' or null"
    assert coerce("init_step", value, STEP) == (value, sentence)


def test_paths_that_exist_here_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine.txt", "train", "here", "shakespeare"):
        (tmp_path / name).mkdir()
    parameters = RunConfig(corpus="mine.txt", output_dir="here", init_from="gone").to_dict()
    changed = {"corpus": str(tmp_path / "mine.txt"), "output_dir": str(tmp_path / "here")}
    assert absolute_paths(parameters) == parameters | changed
    words = RunConfig(corpus="shakespeare", tokenizer="train", output_dir="gone").to_dict()
    assert absolute_paths(words) == words
