"""The start page's table: every run, and links that open notebooks on it."""

import json
import re
import shutil
from urllib.parse import unquote

import pytest

from lmlib import files
from lmlib.files import PROJECT_ROOT
from lmlib.leaks import LEAKY
from lmlib.notebook import index


@pytest.fixture
def folder(trained, tmp_path):
    shutil.copytree(trained.run_dir, tmp_path / "outputs" / "a run")
    return tmp_path / "outputs"


def test_runs_have_links_to_copies_that_are_set_to_them(folder):
    table = index.runs(folder)
    links = re.findall(r"<a href='([^']+)'>(\w+)</a>", table.html)
    assert [word for _, word in links] == ["curves", "generate"]
    for link, word in links:
        file = (PROJECT_ROOT / "notebooks" / unquote(link)).resolve()
        assert file == folder / "a run" / f"{word}.ipynb"
        cells = json.loads(file.read_text())["cells"]
        [source] = [
            "".join(cell["source"])
            for cell in cells
            if "parameters" in cell["metadata"].get("tags", [])
        ]
        values = {}
        exec(source, values)
        assert (values["run_name"], values["output_dir"]) == ("a run", str(folder))
        assert not any(cell.get("outputs") for cell in cells)
    bits = json.loads((folder / "a run" / "results.json").read_text())["val_bits_per_byte"]
    assert f"{bits:.3f}" in table.html and "finished" in table.html and "<polyline" in table.html
    assert "a run" in repr(table)


def test_a_copy_that_is_there_is_left_as_it_is(folder):
    index.runs(folder)
    copy = folder / "a run" / "curves.ipynb"
    for mine in ("mine", "[]", '{"cells": []}'):
        copy.write_text(mine)
        index.runs(folder)
        assert copy.read_text() == mine


def test_the_copies_of_a_project_that_was_moved_open_its_own_runs(folder, monkeypatch):
    monkeypatch.setattr(files, "PROJECT_ROOT", folder.parent)  # the runs lie inside the project
    index.runs(folder)
    copy = folder / "a run" / "curves.ipynb"
    inside = copy.read_text()
    comment = "# the folder of the runs: all of them can be chosen in the list"
    assert f"\"output_dir = 'outputs'  {comment}\\n\",\n" in inside
    edited = inside.replace("'outputs'", "'/elsewhere/outputs'").replace("# Look", "# Schön:")
    copy.write_text(edited.replace("others = []", "others = ['b']"))
    index.runs(folder)
    expected = inside.replace("# Look", "# Schön:").replace("others = []", "others = ['b']")
    assert copy.read_text() == expected


def test_a_run_whose_folder_cannot_be_written_has_no_link(folder):
    for name in index.NOTEBOOKS:
        (folder / "a run" / f".{name}.draft").mkdir()
    assert "<a " not in index.runs(folder).html


def test_a_leak_stands_beside_the_state_and_links_beside_the_name(folder):
    assert "LEAKS" not in index.runs(folder).html
    config = folder / "a run" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {LEAKY: "split"}))
    shown = index.runs(folder).html
    cells = re.findall(r"<td [^>]*>(.*?)</td>", shown)
    assert "a run" in cells[0] and "it LEAKS (split)" in cells[0]
    assert "curves</a>" in cells[1] and ">finished</span> <span" in cells[2]
    assert ">LEAKS</span>" in cells[2] and "#C0392B" in cells[2]


def test_names_are_escaped_and_no_run_is_said(folder, tmp_path):
    (folder / "a run").rename(folder / "<img src=x onerror=alert(1)>")
    shown = index.runs(folder).html
    assert "<img" not in shown and "&lt;img" in shown
    assert "There are no runs yet" in index.runs(tmp_path / "none").html
