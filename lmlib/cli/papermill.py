"""lmlib notebook: train by papermill, which leaves the executed notebook in the run's folder."""

import argparse
import contextlib
import os
import signal
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import papermill
from nbclient.exceptions import DeadKernelError
from papermill.iorw import LocalHandler, papermill_io
from traitlets.config import Config

from lmlib.cli.display import Output, show
from lmlib.cli.train import load_config
from lmlib.config import RunConfig
from lmlib.files import PROJECT_ROOT, atomic_write, display_path, read_mapping, resolve_path
from lmlib.parameters import absolute_paths
from lmlib.run.lock import HELD, SESSION, hangup_signals, stop_with_parent
from lmlib.text import printable


def notebook(options: argparse.Namespace) -> int:
    """Check every parameter, then execute notebooks/train.ipynb into the run's folder."""
    stop_with_parent()
    config = load_config(options)
    from lmlib.run.start import finished_results, merge_recorded  # imports torch
    run_dir = config.run_dir.absolute()  # papermill changes this process's folder
    executed = run_dir / "train.ipynb"
    if finished_results(merge_recorded(config)) and executed.exists():
        show(f"{run_dir} is finished: {config.total_steps} steps; {executed.name} is left "
             "as it is.\nTo continue, raise total_steps; to start over, choose another run_name.")
        return 0
    run_dir.mkdir(parents=True, exist_ok=True)
    papermill_io.register(str(executed), AtomicHandler())
    try:
        # Sockets in a private folder: other users of the machine could connect to TCP ports.
        with tempfile.TemporaryDirectory() as sockets, _stop_on_signals(run_dir):
            manager = {"transport": "ipc", "ip": f"{sockets}/kernel"}
            papermill.execute_notebook(
                PROJECT_ROOT / "notebooks" / "train.ipynb", executed,
                _injected(config, options.params), cwd=str(PROJECT_ROOT),
                config=Config({"KernelManager": manager}), progress_bar=False, log_output=True,
                stdout_file=Output("stdout"), stderr_file=Output("stderr"),
                autosave_cell_every=10,  # seconds; what a kill leaves of the notebook
                extra_arguments=["--log-level=50"])  # the kernel's end would be logged as a failure
    except papermill.PapermillExecutionError as error:
        is_sentence = error.traceback == [printable(error.evalue)]
        show(f"The notebook so far: {executed}", stream="stderr")
        show(f"{'' if is_sentence else f'{error.ename}: '}{printable(error.evalue)}",
             stream="stderr")
        return {"Stopped": 130, "Held": HELD}.get(error.ename, 1)
    except DeadKernelError:
        show("The notebook's kernel died (out of memory?). Run the same command to resume. "
             f"The notebook so far: {executed}", stream="stderr")
        return 1
    show(f"\nEverything is in {run_dir}: open train.ipynb or training_curves.html there.")
    return 0


def _injected(config: RunConfig, recipe: str) -> dict[str, Any]:
    """Return every parameter as train.ipynb reads it, and the recipe, which it names."""
    recipe = display_path(resolve_path(recipe).absolute())
    values = absolute_paths(config.to_dict()) | {"recipe": recipe}
    return {name: "null" if value is None else value for name, value in values.items()}


class AtomicHandler(LocalHandler):
    """Write a notebook whole or not at all: a kill during a save leaves the version before.

    An error (a full disk) costs the notebook, not the run: it is reported once.
    """
    has_failed = False

    def write(self, buf: str, path: str):
        try:
            with atomic_write(Path(path)) as draft:
                super().write(buf, str(draft))
        except OSError as error:
            if not self.has_failed:
                show(f"{path} cannot be written ({error}); training continues without it.",
                     stream="stderr")
            self.has_failed = True


@contextmanager
def _stop_on_signals(run_dir: Path) -> Iterator[None]:
    """Turn Ctrl-C, SIGTERM and SIGHUP into a request to save and stop; a second Ctrl-C interrupts.

    The kernel has a session of its own, so it gets none of the terminal's signals.
    """
    stop, asked, ended = run_dir / "stop", threading.Event(), threading.Event()
    os.environ[SESSION] = session = uuid.uuid4().hex

    def request_stop():
        asked.wait()
        # Again and again: a run that is only starting deletes a stop file as an old one.
        while not ended.wait(0.5):
            with contextlib.suppress(OSError):
                # Not where another process trains the run: that would stop.
                if read_mapping(run_dir / "heartbeat.json").get("session") == session:
                    stop.touch()

    def on_signal(number: int, frame: object):
        if asked.is_set():
            return
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        show("\nStopping after this step (Ctrl-C again: now).", stream="stderr")

    thread = threading.Thread(target=request_stop, daemon=True)
    thread.start()
    signals = (signal.SIGINT, signal.SIGTERM, *hangup_signals())
    before = {number: signal.signal(number, on_signal) for number in signals}
    try:
        yield
    finally:
        ended.set()
        asked.set()  # so that the thread ends
        thread.join()
        stop.unlink(missing_ok=True)
        for number, handler in before.items():
            signal.signal(number, handler)
