"""A notebook's cells as the parameters of a run."""

from pathlib import Path

import nbformat
import papermill
import pytest
from IPython.core.interactiveshell import InteractiveShell

from lmlib.cli.papermill import _injected
from lmlib.config import RunConfig
from lmlib.files import PROJECT_ROOT
from lmlib.notebook.parameters import notebook_folder, run_config

CELL = 'recipe = None\nrun_name = "quickstart"\ntotal_steps = 5\nseed = 0'
EXP9 = RunConfig.load("params/exp9.yaml")
VALUES = {"recipe": None, "run_name": "other", "total_steps": 5, "seed": 0}


def test_a_later_cell_that_renames_the_run_keeps_the_edits():
    config = run_config({**VALUES, "In": ["", CELL, 'run_name = "other"']})
    assert (config.run_name, config.total_steps) == ("other", 5)
    # What papermill injected stays the strongest.
    cells = ["", CELL, "# Parameters\ntotal_steps = 7", 'run_name = "other"']
    config = run_config({**VALUES, "total_steps": 7, "In": cells})
    assert (config.run_name, config.total_steps) == ("other", 7)


def test_a_misspelling_is_refused_until_its_cell_is_corrected():
    wrong = 'run_name = "other"\ntotl_steps = 5'
    namespace = {"run_name": "other", "totl_steps": 5, "In": ["", wrong]}
    with pytest.raises(ValueError, match="totl_steps is not a parameter"):
        run_config(namespace)
    namespace = {**namespace, "total_steps": 5, "In": ["", wrong, CELL]}
    assert run_config(namespace).total_steps == 5


def test_a_later_cell_leaves_a_notebooks_own_parameters_known(tmp_path):
    cells = ["", 'output_dir = "."\nothers = []', "# Parameters\nothers = [1]", 'run_name = "x"']
    namespace = {"output_dir": str(tmp_path), "others": [1], "run_name": "x", "In": cells}
    assert notebook_folder(namespace) == tmp_path


def run_notebook(tmp_path, cell="", injected=None, history=True) -> RunConfig:
    """Return the config that train.ipynb makes of lines in its cell and of papermill's values."""
    book = nbformat.read(PROJECT_ROOT / "notebooks" / "train.ipynb", 4)
    book.cells = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    for line in cell.splitlines():
        name = line.partition(" = ")[0]
        lines = book.cells[0].source.splitlines()
        [at] = [n for n, old in enumerate(lines) if old.startswith(f"{name} = ")]
        book.cells[0].source = "\n".join([*lines[:at], line, *lines[at + 1 :]])
    nbformat.write(book, tmp_path / "in.ipynb")
    if injected is not None:
        paths = (tmp_path / name for name in ("in.ipynb", "out.ipynb"))
        papermill.execute_notebook(*paths, injected, prepare_only=True, progress_bar=False)
        book = nbformat.read(tmp_path / "out.ipynb", 4)
    shell = InteractiveShell(user_ns={})
    for cell in book.cells:
        shell.run_cell(cell.source, store_history=history).raise_error()
    return run_config(shell.user_ns)


def test_none_leaves_the_recipe_and_any_other_value_overrides_it(tmp_path):
    recipe = 'recipe = "params/exp9.yaml"\n'
    assert run_notebook(tmp_path, recipe) == EXP9
    config = run_notebook(
        tmp_path,
        recipe + 'max_tokens = "null"\nq_lora_rank = "null"\nvocab_size = "null"\n'
        "total_steps = 1000\nmicro_batch_size = 4",
    )
    wanted = {"max_tokens": None, "q_lora_rank": None, "vocab_size": None}
    assert config == RunConfig.load(
        "params/exp9.yaml", **wanted, total_steps=1000, micro_batch_size=4
    )
    # 1000 is the default of total_steps, and no less an override.
    config = run_notebook(tmp_path, 'recipe = "params/smoke.yaml"\ntotal_steps = 1000')
    assert (config.total_steps, config.vocab_size) == (1000, 512)


@pytest.mark.parametrize("null", [None, "null"])
def test_an_injected_none_is_null(tmp_path, null):
    values = {"max_tokens": null, "q_lora_rank": null, "vocab_size": null}
    config = run_notebook(
        tmp_path,
        'recipe = "params/exp9.yaml"\nmicro_batch_size = 4\nq_lora_rank = 7',
        {**values, "micro_batch_size": null},
    )
    assert config == RunConfig.load("params/exp9.yaml", **dict.fromkeys(values))


@pytest.mark.parametrize("history", [True, False])  # nbval keeps no history
def test_lmlib_notebook_injects_every_value_with_history_and_without(tmp_path, history):
    null = {"max_tokens": None, "q_lora_rank": None, "vocab_size": None, "total_steps": 1000}
    for overrides in ({}, null, {"micro_batch_size": 2}):
        config = RunConfig.load("params/exp9.yaml", **overrides)
        injected = _injected(config, "params/exp9.yaml")
        assert injected["recipe"] == str(Path("params/exp9.yaml"))
        assert run_notebook(tmp_path, "", injected, history) == config


def test_every_misspelling_is_listed_at_once():
    wrong = 'run_name = None\ntotl_steps = None\nseeed = 3\ndropout = "lots"'
    namespace = {"run_name": None, "totl_steps": None, "seeed": 3, "dropout": "lots"}
    with pytest.raises(ValueError) as error:
        run_config({**namespace, "In": ["", wrong]})
    said = str(error.value)
    assert "did you mean total_steps" in said and "did you mean seed" in said
    with pytest.raises(ValueError, match="totl_steps is not a parameter"):
        run_config(namespace)
    assert "totl_steps" in said and "seeed" in said
