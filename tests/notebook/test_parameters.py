"""A notebook's cells as the parameters of a run."""

import pytest

from lmlib.notebook.parameters import notebook_folder, run_config

CELL = 'recipe = None\nrun_name = "quickstart"\ntotal_steps = 5\nseed = 0'
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
