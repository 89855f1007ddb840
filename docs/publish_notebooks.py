"""Renew the outputs that the committed notebooks show: `make notebooks`, after `make train`.

train.ipynb takes those of outputs/quickstart/train.ipynb; curves and generate are run on that run, audit on it and on
outputs/exp9_seed_small (`python -m lmlib sweep params/exp9_seed_small/*.yaml`), and compare on outputs/exp8_small
(`python -m lmlib sweep params/exp8_small/*.yaml -p seed 0 1 2 --jobs 2`). Names on the command line choose among them:
`python docs/publish_notebooks.py train audit`. What papermill adds (injected cells, times, paths of this machine) is left out.
"""

import sys
import tempfile
from pathlib import Path

import nbformat
import papermill

from lmlib.files import PROJECT_ROOT


def main():
    notebooks = PROJECT_ROOT / "notebooks"
    chosen = sys.argv[1:] or ["train", "curves", "generate", "compare", "audit"]
    if "train" in chosen:
        publish(PROJECT_ROOT / "outputs" / "quickstart" / "train.ipynb", notebooks / "train.ipynb")
    with tempfile.TemporaryDirectory() as folder:
        for name in (f"{stem}.ipynb" for stem in chosen if stem != "train"):
            papermill.execute_notebook(notebooks / name, Path(folder, name), progress_bar=False, cwd=str(PROJECT_ROOT))
            publish(Path(folder, name), notebooks / name)


def publish(executed: Path, committed: Path):
    """Put the outputs of one notebook's code cells under those of the other, whose sources must be the same."""
    ran, book = (nbformat.read(path, 4) for path in (executed, committed))
    cells = [c for c in ran.cells if c.cell_type == "code" and "injected-parameters" not in c.metadata.get("tags", [])]
    own = [c for c in book.cells if c.cell_type == "code"]
    for number, (cell, source) in enumerate(zip(own, cells, strict=True), 1):
        if cell.source != source.source:
            raise SystemExit(f"{executed} ran another version of {committed.name}; run it again first.")
        cell.execution_count, cell.outputs = number, [_cleaned(output, number) for output in source.outputs]
    nbformat.write(book, committed)


def _cleaned(output: nbformat.NotebookNode, number: int) -> nbformat.NotebookNode:
    output.get("metadata", {}).clear()
    if "execution_count" in output:
        output.execution_count = number
    if "text" in output:
        output.text = output.text.replace(f"{PROJECT_ROOT}/", "")
    return output


if __name__ == "__main__":
    main()
