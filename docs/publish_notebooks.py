"""Update the outputs in the committed notebooks: `make notebooks`, after `make train`.

    python docs/publish_notebooks.py [train index curves generate compare audit learning_rate app]

train.ipynb gets the outputs of outputs/quickstart/train.ipynb. The others are executed here:

- index on all runs in outputs/, curves and generate on the quickstart run;
- audit on it and on outputs/exp9_seed_small:
  `lmlib sweep params/exp9_seed_small/*.yaml`
- learning_rate trains what it shows;
- compare on outputs/exp8_small:
  `lmlib sweep params/exp8_small/*.yaml -p seed 0 1 2 --jobs 2`

What papermill adds (injected cells, times, absolute paths) is removed.
"""

import platform
import sys
import tempfile
from pathlib import Path

import nbformat
import papermill

from lmlib.files import PROJECT_ROOT

# As JupyterLab writes it, so that opening and saving a notebook changes nothing.
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {
        "codemirror_mode": {"name": "ipython", "version": 3},
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "nbconvert_exporter": "python",
        "pygments_lexer": "ipython3",
        "version": platform.python_version(),
    },
}


def main():
    notebooks = PROJECT_ROOT / "notebooks"
    every = ["index", "curves", "generate", "compare", "audit", "learning_rate", "app"]
    chosen = sys.argv[1:] or ["train", *every]
    if "train" in chosen:
        publish(PROJECT_ROOT / "outputs" / "quickstart" / "train.ipynb", notebooks / "train.ipynb")
    with tempfile.TemporaryDirectory() as folder:
        for name in (f"{stem}.ipynb" for stem in chosen if stem != "train"):
            executed = Path(folder, name)
            papermill.execute_notebook(
                notebooks / name, executed, progress_bar=False, cwd=str(PROJECT_ROOT)
            )
            publish(executed, notebooks / name)


def publish(executed: Path, committed: Path):
    """Copy the outputs of an executed notebook into the committed one, whose code must be equal."""
    book, copy = (nbformat.read(path, 4) for path in (committed, executed))
    pairs = zip(code_cells(book), code_cells(copy), strict=True)
    for number, (cell, source) in enumerate(pairs, 1):
        if cell.source != source.source:
            raise SystemExit(
                f"{executed} was executed from another version of {committed.name}, so its outputs "
                "do not belong to this one. Execute the notebook again."
            )
        cell.outputs = [clean(output, number) for output in source.outputs]
        cell.execution_count = number
    title = {name: value for name, value in book.metadata.items() if name == "title"}
    book.metadata = nbformat.from_dict(METADATA | title)
    nbformat.write(book, committed)


def code_cells(book: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Return the code cells without those that papermill injected."""
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    return [cell for cell in cells if "injected-parameters" not in cell.metadata.get("tags", [])]


def clean(output: nbformat.NotebookNode, number: int) -> nbformat.NotebookNode:
    """Remove an output's metadata and absolute paths, and number it as its cell."""
    output.get("metadata", {}).clear()
    if "execution_count" in output:
        output.execution_count = number
    if "text" in output:
        output.text = output.text.replace(f"{PROJECT_ROOT}/", "")
    return output


if __name__ == "__main__":
    main()
