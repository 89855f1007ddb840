"""Parameters: what is accepted, what is refused, and how it is said."""

from typing import get_type_hints

import hostile
import pytest

from lmlib.config import RunConfig
from lmlib.files import PROJECT_ROOT
from lmlib.notebook.parameters import run_config
from lmlib.parameters import parse_overrides, read_parameters
from lmlib.text import printable


def test_every_mistake_is_listed_at_once_with_the_nearest_name():
    with pytest.raises(ValueError) as caught:
        RunConfig(
            totl_steps=5, learning_rate="fast", seed=1.5, deterministic="false", optimizer="sgd"
        )
    message = str(caught.value)
    assert "totl_steps is not a parameter; did you mean total_steps" in message
    assert "learning_rate is 'fast'; write a number" in message
    assert "seed is 1.5; write an integer" in message
    assert "deterministic is 'false'; write true or false" in message
    assert "optimizer is 'sgd'; choose from 'muon', 'adamw'" in message


def test_numbers_that_yaml_reads_as_text_are_numbers():
    config = RunConfig(learning_rate="3e-4", total_steps="1e3", muon_learning_rate=1)
    assert (config.learning_rate, config.total_steps, config.muon_learning_rate) == (
        3e-4,
        1000,
        1.0,
    )
    assert type(config.muon_learning_rate) is float and type(config.total_steps) is int


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        (
            {"attention": "mha", "hidden_size": 100, "num_attention_heads": 3},
            "not a multiple of num_attention_heads",
        ),
        ({"warmup_ratio": 1.0}, "must be at least 0 and below 1"),
        ({"warmup_ratio": 12}, "must be at least 0 and below 1"),
        ({"decay_ratio": 1.5}, "at least 0 (a cosine) and at most 1"),
        ({"muon_momentum": 1.0}, "must be at least 0 and below 1"),
        ({"compile": "yes"}, "compile is 'yes'; write true or false"),
        ({"compile": True, "sharding": "full"}, "a divided model cannot be compiled"),
        ({"sharding": "some"}, "sharding is 'some'; choose from 'none', 'full'"),
        ({"validation_windows": 0}, "validation_windows is 0; it must be 1 or more"),
        ({"validation_fraction": 0.0}, "must lie between 0 and 1"),
        ({"micro_batch_size": 32, "batch_size": 16}, "larger than batch_size"),
        ({"max_tokens": 10}, "less than one window"),
        ({"qk_rope_head_dim": 7}, "must be even"),
        ({"total_steps": 0}, "total_steps is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"run_name": "../../etc"}, "it names a folder"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"learning_rate": float("nan")}, "write a finite number"),
        ({"learning_rate": "inf"}, "write a number"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": True}, "write an integer"),
        ({"init_step": 5}, "init_step is given without init_from"),
        ({"corpus": "a\nb"}, "write text on one line"),
    ],
)
def test_contradictions_are_named(parameters, sentence):
    with pytest.raises(ValueError, match=None) as caught:
        RunConfig(**parameters)
    assert sentence in str(caught.value)


def test_parameters_that_the_attention_does_not_use_are_ignored():
    assert RunConfig(attention="mha", qk_rope_head_dim=7).attention == "mha"
    assert (
        RunConfig(attention="mla", hidden_size=100, num_attention_heads=3).num_attention_heads == 3
    )


@pytest.mark.parametrize("name", hostile.PARAMETER_FILES)
def test_hostile_parameter_files_are_refused_and_run_no_code(tmp_path, name):
    assert hostile.refused(name, tmp_path)


def test_errors_in_a_parameter_file_name_the_file(tmp_path):
    file = tmp_path / "p.yaml"
    file.write_text("seed: 1\nseed: 2")
    with pytest.raises(ValueError, match="p.yaml is not valid YAML: given twice: seed"):
        read_parameters(file)
    file.write_text('"x; import os": 1\ncorpus: [a]')
    with pytest.raises(
        ValueError, match="(?s)p.yaml cannot be used.*not a valid parameter name.*corpus is a list"
    ):
        read_parameters(file)


@pytest.mark.parametrize(
    "text",
    ["\x1b[31mred\x1b[0m", "\x07\r\x08", "\x9b31m", "\u202eexe.\u2066x", "\ud800", "a\u2028b"],
)
def test_control_characters_are_shown_as_numbers(text):
    assert printable(text).isprintable()
    for plain in ("plain\ntext\twith ünï🐎", "👩\u200d🚀 \xa0 שלום"):
        assert printable(plain) == plain


def test_a_missing_recipe_lists_the_recipes():
    with pytest.raises(ValueError, match="params/exp9.yaml"):
        RunConfig.load("params/nothing.yaml")


def test_every_recipe_loads():
    for file in (PROJECT_ROOT / "params").rglob("*.yaml"):
        assert RunConfig.load(file).run_name


def test_command_line_values_are_typed_by_their_parameter():
    given = parse_overrides(
        [
            ("total_steps", "5"),
            ("run_name", "7"),
            ("corpus_config", "null"),
            ("deterministic", "false"),
        ],
        get_type_hints(RunConfig),
    )
    assert given == {
        "total_steps": 5,
        "run_name": "7",
        "corpus_config": None,
        "deterministic": False,
    }
    with pytest.raises(ValueError, match="not a valid parameter name"):
        parse_overrides([("x = 1; import os", "1")], get_type_hints(RunConfig))
    with pytest.raises(ValueError, match="corpus_split contains control characters"):
        parse_overrides([("corpus_split", "a\nimport os")], get_type_hints(RunConfig))


def test_a_notebook_takes_injected_over_edited_over_recipe_over_default():
    cell = (
        'recipe = "params/smoke.yaml"\nrun_name = None\nseed = 0\ntotal_steps = 600\nbatch_size = 7'
    )
    variables = {
        "recipe": "params/smoke.yaml",
        "run_name": None,
        "seed": 3,
        "total_steps": 600,
        "batch_size": 7,
    }
    config = run_config({**variables, "In": ["", cell, "# Parameters\nseed = 3\n"], "unrelated": 1})
    assert (config.seed, config.batch_size, config.hidden_size, config.run_name) == (
        3,
        7,
        32,
        "smoke",
    )


def test_an_unknown_injected_name_is_refused():
    cells = {
        "In": ["", 'recipe = None\nrun_name = "x"', "# Parameters\ntotal_stepz = 5"],
        "recipe": None,
        "run_name": "x",
    }
    with pytest.raises(
        ValueError, match="total_stepz is not a parameter; did you mean total_steps"
    ):
        run_config({**cells, "total_stepz": 5})
    with pytest.raises(ValueError, match="total_stepz is not a parameter"):
        run_config({"total_stepz": 5})


def test_importing_lmlib_costs_no_torch():
    import subprocess
    import sys

    code = "import sys, lmlib; lmlib.RunConfig; lmlib.config; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT_ROOT)
