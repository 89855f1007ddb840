"""The notebooks: short, in step with the library, and executed by papermill and nbval."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import nbformat
import papermill
import pytest

from lmlib.config import RunConfig
from lmlib.files import PROJECT_ROOT

NOTEBOOKS = sorted((PROJECT_ROOT / "notebooks").glob("*.ipynb"))
SMOKE = PROJECT_ROOT / "params" / "smoke.yaml"


def code_cells(path):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def texts(book) -> str:
    """Return all that a notebook's cells printed or displayed as text."""
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(
        str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", "")) for o in outputs
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_short_and_define_nothing(path):
    cells = code_cells(path)
    assert 0 < len(cells) <= 12
    assert [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])] == cells[:1]
    for cell in cells[1:]:
        assert len(cell.source.splitlines()) <= 10, cell.source
    for cell in cells:
        assert not re.search(r"^\s*(def|class) ", cell.source, re.MULTILINE)
    book = nbformat.read(path, 4)
    assert (
        book.metadata.kernelspec.name == "python3" and book.metadata.kernelspec.language == "python"
    )
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_saving_in_jupyterlab_would_change_nothing(path):
    """JavaScript writes 10.0 as 10, and JupyterLab what it knows of the kernel (a browser test)."""

    def as_javascript(text: str) -> int | float:
        return int(float(text)) if float(text).is_integer() else float(text)

    text = path.read_text("utf-8")
    book = json.loads(text, parse_float=as_javascript)
    assert text == json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    assert book["metadata"]["kernelspec"]["display_name"] == "Python 3 (ipykernel)"
    assert book["metadata"]["language_info"]["version"]


def test_the_parameters_cell_lists_every_parameter_with_runconfigs_comment():
    """Each is None, "as the recipe says"; what the class calls None is "null" in the cell."""
    source = (PROJECT_ROOT / "lmlib" / "config.py").read_text()
    body = source[source.index("# fmt: off") : source.index("# fmt: on")]
    declared = re.findall(r"^    (\w+): .+? = (?:\".*?\"|\S+)\s+# (.*)$", body, re.MULTILINE)
    assert [name for name, _ in declared] == list(RunConfig().to_dict())
    cell = code_cells(PROJECT_ROOT / "notebooks" / "train.ipynb")[0].source
    assigned = re.findall(r"^(\w+) = (\".*?\"|\S+)  # (.*)$", cell, re.MULTILINE)
    names = [name for name, _, _ in assigned]
    assert names[:5] == ["recipe", "run_name", "total_steps", "corpus", "learning_rate"]
    assert {value for _, value, _ in assigned[1:]} == {"None"}
    rest = [name for name, _ in declared if name not in names[:5]]
    assert names[5:] == rest and "# Everything else, rarely changed" in cell
    comments = {name: comment.replace("None:", '"null":') for name, comment in declared}
    assert {name: comment for name, _, comment in assigned[1:]} == comments


@pytest.fixture
def runs(trained, tmp_path) -> Path:
    """Return a folder with a copy of the finished run: notebooks write files beside a run."""
    shutil.copytree(trained.run_dir, tmp_path / "runs" / "trained")
    (tmp_path / "runs" / ".tokens").symlink_to(Path(trained.output_dir) / ".tokens")
    return tmp_path / "runs"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_by_papermill(path, runs, tmp_path):
    """curves, generate, compare and audit read finished runs; the others train their own."""
    run_name = "notebook" if path.stem == "train" else "trained"
    parameters = {"output_dir": str(runs), "run_name": run_name}
    if path.stem == "learning_rate":
        parameters |= {"rate_recipe": str(SMOKE), "rate_steps": "20", "confirm_steps": "3"}
    command = ["papermill", path, tmp_path / "out.ipynb", "-f", SMOKE, "--no-progress-bar"]
    for pair in parameters.items():
        command += ["-p", *pair]
    subprocess.run([sys.executable, "-m", *command], check=True, cwd=tmp_path, capture_output=True)
    book = nbformat.read(tmp_path / "out.ipynb", 4)
    shown = texts(book)
    if path.stem == "train":
        assert "Recipe params/quickstart.yaml, changed: " in shown
        assert "vocab_size 512 (recipe: 4096)" in shown
        assert re.search(
            r"notebook: finished \| Step 20 / 20 \| Validation loss \d\.\d\d ± ", shown
        )
        assert (
            "Step 1/20: Loss=" in shown
            and "Step 20/20: Loss=" in shown
            and "Val Loss:" in shown
            and "**HAMLET**" in shown
        )
        assert (runs / "notebook" / "training_curves.png").exists()
    if path.stem == "generate":
        assert (
            "Checkpoints: 5 10 15 20" in shown
            and "Once upon a time" in shown
            and "step 15" in shown
        )
    if path.stem == "learning_rate":
        assert "Suggested: {'learning_rate'" in shown
        assert "3steps-rate0.01-0.02 finished" in shown
    if path.stem == "compare":
        assert "There is nothing to compare: trained." in shown
    if path.stem == "audit":
        assert "pass       causality" in shown and "pass       record" in shown
    if path.stem in ("train", "curves", "compare", "audit"):
        kinds = [
            set(o.data)
            for cell in book.cells
            if cell.cell_type == "code"
            for o in cell.outputs
            if "data" in o
        ]
        assert {"application/vnd.plotly.v1+json", "image/png", "text/plain"} in kinds
        assert "validation loss" in shown or path.stem == "audit"
    assert (tmp_path / "out.ipynb").stat().st_size < 1_000_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_misspelled_injected_parameter_stops_the_notebook(path, outputs, tmp_path):
    before = sorted(outputs.iterdir())
    with pytest.raises(
        papermill.PapermillExecutionError,
        match="tempratur is not a parameter|total_stepz is not a parameter",
    ):
        name = "total_stepz" if path.stem == "train" else "tempratur"
        papermill.execute_notebook(
            path,
            tmp_path / "out.ipynb",
            {"output_dir": str(outputs), name: 5},
            progress_bar=False,
            cwd=str(tmp_path),
        )
    assert sorted(outputs.iterdir()) == before


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_pass_nbval(path, runs, tmp_path):
    own = (
        {"rate_recipe": str(SMOKE), "rate_steps": 12, "confirm_steps": 0}
        if path.stem == "learning_rate"
        else {}
    )
    papermill.execute_notebook(
        path,
        tmp_path / path.name,
        {**_smoke(), "output_dir": str(runs), "run_name": "trained", **own},
        prepare_only=True,
        progress_bar=False,
    )
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
        + ["--nbval-lax", "--nbval-current-env", tmp_path / path.name, "--rootdir", tmp_path],
        check=True,
        cwd=tmp_path,
    )


def test_interrupting_the_kernel_saves_the_run(outputs):
    """JupyterLab's stop button sends an interrupt to the kernel."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    try:
        client.execute(
            f"import lmlib; config = lmlib.RunConfig.load({str(SMOKE)!r}, total_steps=100000, run_name='stopped',"
            f"output_dir={str(outputs)!r}, eval_every=50000, checkpoint_every=50000)\n"
            "for record in lmlib.train(config):\n    print(record.step)"
        )
        printed = ""
        while "\n30\n" not in printed:
            message = client.get_iopub_msg(timeout=60)
            printed += message["content"].get("text", "")
            assert message["msg_type"] != "error", message["content"]
        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=60)["content"]
        assert (reply["status"], reply["ename"]) == ("error", "Stopped")
        assert "checkpoint is saved" in reply["evalue"]
        assert reply["traceback"] == [reply["evalue"]]  # the sentence alone
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert len(list((outputs / "stopped" / "checkpoints").iterdir())) == 1


def test_a_killed_run_keeps_its_last_chart_in_the_notebook(outputs):
    """SIGKILL to papermill and its kernel during training."""
    pairs = {
        "output_dir": outputs,
        "run_name": "killed",
        "total_steps": 10**6,
        "eval_every": 10**6,
        "checkpoint_every": 10**6,
    }
    command = [sys.executable, "-m", "lmlib", "notebook", str(SMOKE), "-p", "log_every", "100"]
    command += [word for name, value in pairs.items() for word in ("-p", name, str(value))]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    executed = outputs / "killed" / "train.ipynb"

    def points() -> int:
        """Count the points of the training loss in the chart on disk."""
        book = nbformat.read(executed, 4) if executed.exists() else nbformat.v4.new_notebook()
        outs = [o.get("data", {}) for cell in book.cells for o in cell.get("outputs", [])]
        charts = [data["application/vnd.plotly.v1+json"] for data in outs if "image/png" in data]
        return len(charts[0]["data"][0]["x"]) if charts else 0

    with subprocess.Popen(command, start_new_session=True, cwd=PROJECT_ROOT, **quiet) as process:
        try:
            deadline = time.monotonic() + 120
            while points() < 2 and time.monotonic() < deadline:
                time.sleep(0.02)  # often enough to catch a half-written notebook
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert points() >= 2


def _smoke() -> dict:
    import yaml

    return yaml.safe_load(SMOKE.read_text())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_complete_and_name_no_machine(path):
    """Every code cell ran, in order, and no error and no path of the machine is in the outputs."""
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    content = json.dumps([cell.outputs for cell in cells])
    assert '"output_type": "error"' not in content
    assert str(PROJECT_ROOT) not in content and "widget-view" not in content


def test_on_colab_the_notebook_gets_lmlib_first(tmp_path):
    """Executed where `google.colab` is imported and lmlib is not installed, against this commit."""
    python, book = tmp_path / "venv" / "bin" / "python", tmp_path / "book.ipynb"
    subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    [packages] = python.parents[1].glob("lib/*/site-packages")
    # All packages of this environment, but those that are links, as lmlib is.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    cells = code_cells(PROJECT_ROOT / "notebooks" / "train.ipynb")
    [setup] = [cell.source for cell in cells if "google.colab" in cell.source]
    colab = """
import sys, types
colab = sys.modules["google.colab"] = types.ModuleType("google.colab")
colab.output = types.SimpleNamespace(enable_custom_widget_manager=lambda: print("widgets"))
"""
    after = "from lmlib import files; print(files.PROJECT_ROOT)"
    new = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "3"}}
    )
    new.cells = [nbformat.v4.new_code_cell(source) for source in (colab, setup, after)]
    nbformat.write(new, book)
    script = "import nbclient, nbformat, sys; book = nbformat.read(sys.argv[1], 4); "
    script += "nbclient.execute(book); nbformat.write(book, sys.argv[1])"
    variables = {**os.environ, "LMLIB_REPOSITORY": str(PROJECT_ROOT), "PYTHONPATH": ""}
    subprocess.run([python, "-c", script, book], cwd=tmp_path, env=variables, check=True)
    done = nbformat.read(book, 4)
    assert "ERROR" not in texts(done) and "widgets" in texts(done), texts(done)
    assert done.cells[-1].outputs[0].text.strip() == str(tmp_path / "lmlib")
    installed = [python, "-c", "import lmlib; print(lmlib.__file__)"]  # in a new process too
    said = subprocess.run(installed, cwd="/", env=variables, capture_output=True, text=True).stdout
    assert said.strip() == str(tmp_path / "lmlib" / "lmlib" / "__init__.py")
