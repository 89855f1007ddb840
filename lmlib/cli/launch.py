"""lmlib train --processes: start a run's processes by torch's elastic agent, and start them again.

Each attempt has an agent of its own: one that restarts its processes itself may wait for minutes
for those that died. A run resumes from its newest checkpoint, as after any kill.
"""

import argparse
import logging
import os
import signal
import sys

from lmlib.cli.display import show
from lmlib.cli.train import LOST, draw_curves
from lmlib.config import RunConfig
from lmlib.errors import UserError
from lmlib.run.lock import PARENT, hangup_signals

SHUTDOWN = 120  # seconds that processes have to finish their step and save
FAILED, STOPPED = 1, 130  # how `lmlib train` ends after a UserError, and when it was asked to stop
SIGNALS = "SIGTERM,SIGINT,SIGQUIT"  # that the agent passes on


def launch(config: RunConfig, options: argparse.Namespace) -> int:
    """Train in several processes on this machine; returns the exit status."""
    count, restarts = config.processes, options.restarts
    if restarts < 0:
        raise UserError(f"--restarts is {restarts}; it must be 0 or more.")
    import torch
    if torch.cuda.is_available() and config.device != "cpu" and count > torch.cuda.device_count():
        raise UserError(f"processes is {count}, but torch finds {torch.cuda.device_count()} CUDA "
                        "devices here: use that many, or set device to cpu.")
    if count > 1:
        from lmlib.run.together import check_processes
        check_processes(config, count)
    command = ["-m", "lmlib", "train", str(options.params)]
    command += [word for pair in options.p for word in ("-p", *pair)]
    for attempt in range(restarts + 1):
        status = run_processes(count, command)
        if status == STOPPED and config.run_dir.is_dir():
            draw_curves(config.run_dir)
        if status in (0, FAILED, STOPPED):  # finished, or starting again would not help
            return status
        show(_describe(status) + (
            f"Starting again from the newest checkpoint (restart {attempt + 1} of {restarts})."
            if attempt < restarts else
            "Run the same command to resume from the newest checkpoint."), stream="stderr")
    return FAILED


def _describe(status: int) -> str:
    """Say how a process ended, as the beginning of a line."""
    if status < 0:
        return f"A process was killed by {signal.Signals(-status).name}. "
    if status == LOST:
        return "The processes lost each other: one hangs or has died, or the network is down. "
    return f"A process ended with status {status}. "


def run_processes(count: int, command: list[str]) -> int:
    """Run `python command` in so many processes; returns 0, or the status that says why not."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    if "OMP_NUM_THREADS" not in os.environ:  # torchrun takes 1, which wastes the cores
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    os.environ[PARENT] = str(os.getpid())  # they stop when this process dies
    agent = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=f"lmlib-{os.getpid()}",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="127.0.0.1", max_restarts=0,
        monitor_interval=0.1, logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        signals_to_handle=SIGNALS + (",SIGHUP" if hangup_signals() else ""),
        shutdown_timeout=int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN)))
    try:
        elastic_launch(agent, sys.executable)(*command)
    except ChildFailedError as error:
        statuses = [failure.exitcode for failure in error.failures.values()]
        # One process that dies takes the others with it: they are lost, or ended by the agent.
        told = [status for status in statuses if status in (FAILED, STOPPED)]
        own = [status for status in statuses if status not in (LOST, -signal.SIGTERM)]
        return [*told, *own, *statuses][0]
    except SignalException:  # the agent was asked to stop, and has passed that on
        return STOPPED
    return 0
