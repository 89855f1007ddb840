"""lmlib notebook."""

import argparse
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, get_type_hints

from lmlib.config import RunConfig
from lmlib.files import PROJECT_ROOT
from lmlib.parameters import parse_overrides, read_parameters
from lmlib.text import printable


def notebook(options: argparse.Namespace):
    """Check every parameter, then let papermill run train.ipynb into the run's folder."""
    given = {**read_parameters(options.params), **parse_overrides(options.p, get_type_hints(RunConfig))}
    config = RunConfig(**given)
    from lmlib.run.start import finished_results, merge_recorded

    executed = config.run_dir.absolute() / "train.ipynb"
    if finished_results(merge_recorded(config)) and executed.exists():
        print(
            f"{config.run_dir} is finished: {config.total_steps} steps, and {executed.name} is left as it is.\n"
            'To go on, raise total_steps (ARGS="-p total_steps N"); to start anew, choose another run_name.'
        )
        return 0
    import papermill
    import papermill.iorw
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    ended = threading.Event()

    class Whole(papermill.iorw.LocalHandler):
        """Writes a draft and renames it: a kill while the notebook is saved leaves the one before, not half of this one."""

        def write(self, buf: str, path: str):
            draft = Path(path).with_name(f".{Path(path).name}.draft")
            super().write(buf, str(draft))
            draft.replace(path)

    papermill.iorw.papermill_io.register(str(executed), Whole())

    def keep_asking():
        """A run that is only starting would take a `stop` for an earlier session's."""
        while not ended.wait(0.5):
            (config.run_dir / "stop").touch()

    def ask_to_stop(number: int, frame: Any):
        """Ctrl-C lets the step at hand end and be saved, as in the terminal; a second one interrupts."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nStopping after the step at hand (Ctrl-C again: at once).", file=sys.stderr)
        threading.Thread(target=keep_asking, daemon=True).start()

    config.run_dir.mkdir(parents=True, exist_ok=True)
    before = signal.signal(signal.SIGINT, ask_to_stop)
    try:
        with tempfile.TemporaryDirectory() as sockets:  # no port that other users of the machine could reach
            papermill.execute_notebook(
                PROJECT_ROOT / "notebooks" / "train.ipynb",
                executed,
                parameters=config.to_dict(),
                cwd=str(PROJECT_ROOT),
                log_output=True,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                progress_bar=False,
                autosave_cell_every=10,  # seconds: what a kill leaves of the notebook
                extra_arguments=["--log-level=50"],  # else ending the kernel reads like a failure
                config=Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}}),
            )
    except papermill.PapermillExecutionError as error:
        print(f"{error.ename}: {printable(error.evalue)}\nThe notebook so far: {executed}", file=sys.stderr)
        return 130 if error.ename == "Stopped" else 1
    except DeadKernelError:
        print(f"The notebook's kernel died (out of memory?). Start again to go on. So far: {executed}", file=sys.stderr)
        return 1
    finally:
        ended.set()
        (config.run_dir / "stop").unlink(missing_ok=True)
        signal.signal(signal.SIGINT, before)
    print(f"\nEverything is in {config.run_dir}: open train.ipynb or training_curves.html there.")
    return 0
