"""lmlib notebook: train by papermill, which leaves the executed notebook in the run's folder."""

import argparse
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import papermill
from nbclient.exceptions import DeadKernelError
from papermill.iorw import LocalHandler, papermill_io
from traitlets.config import Config

from lmlib.cli.train import load_config
from lmlib.files import PROJECT_ROOT, atomic_write
from lmlib.text import printable


def notebook(options: argparse.Namespace) -> int:
    """Check every parameter, then execute notebooks/train.ipynb into the run's folder."""
    config = load_config(options)
    from lmlib.run.start import finished_results, merge_recorded  # imports torch
    executed = config.run_dir.absolute() / "train.ipynb"
    if finished_results(merge_recorded(config)) and executed.exists():
        print(f"{config.run_dir} is finished: {config.total_steps} steps; {executed.name} is left "
              "as it is.\nTo continue, raise total_steps; to start over, choose another run_name.")
        return 0
    config.run_dir.mkdir(parents=True, exist_ok=True)
    papermill_io.register(str(executed), AtomicHandler())
    try:
        # Sockets in a private folder: other users of the machine could connect to TCP ports.
        with tempfile.TemporaryDirectory() as sockets, _stop_on_ctrl_c(config.run_dir):
            manager = {"transport": "ipc", "ip": f"{sockets}/kernel"}
            papermill.execute_notebook(
                PROJECT_ROOT / "notebooks" / "train.ipynb", executed, config.to_dict(),
                cwd=str(PROJECT_ROOT), config=Config({"KernelManager": manager}),
                progress_bar=False, log_output=True, stdout_file=sys.stdout, stderr_file=sys.stderr,
                autosave_cell_every=10,  # seconds; what a kill leaves of the notebook
                extra_arguments=["--log-level=50"])  # the kernel's end would be logged as a failure
    except papermill.PapermillExecutionError as error:
        print(f"{error.ename}: {printable(error.evalue)}\nThe notebook so far: {executed}",
              file=sys.stderr)
        return 130 if error.ename == "Stopped" else 1
    except DeadKernelError:
        print("The notebook's kernel died (out of memory?). Run the same command to resume. "
              f"The notebook so far: {executed}", file=sys.stderr)
        return 1
    print(f"\nEverything is in {config.run_dir}: open train.ipynb or training_curves.html there.")
    return 0


class AtomicHandler(LocalHandler):
    """Write a notebook whole or not at all: a kill during a save leaves the version before."""

    def write(self, buf: str, path: str):
        with atomic_write(Path(path)) as draft:
            super().write(buf, str(draft))


@contextmanager
def _stop_on_ctrl_c(run_dir: Path) -> Iterator[None]:
    """Turn the first Ctrl-C into a request to save and stop; a second one interrupts."""
    stop, ended = run_dir / "stop", threading.Event()

    def request_stop():
        # Again and again: a run that is only starting deletes a stop file as an old one.
        while not ended.wait(0.5):
            stop.touch()

    def on_interrupt(*_: object):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nStopping after this step (Ctrl-C again: now).", file=sys.stderr)
        threading.Thread(target=request_stop, daemon=True).start()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        ended.set()
        stop.unlink(missing_ok=True)
        signal.signal(signal.SIGINT, before)
