"""Launch the runs of a sweep, each in a process of its own."""

import logging
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import yaml

from lmlib.config import RunConfig
from lmlib.files import PROJECT_ROOT
from lmlib.parameters import absolute_paths
from lmlib.run.lock import HELD, PARENT, hangup_signals, lock_holder, run_holder, run_status
from lmlib.run.start import finished_results, merge_recorded

PAUSE = 5.0  # seconds between two looks at the runs that others train


@dataclass(frozen=True)
class Outcome:
    """How a run of a sweep ended."""
    config: RunConfig
    state: str  # "finished", "finished before" (or by others), "stopped" or "failed"
    message: str  # the last error or line of its output


def sweep(configs: list[RunConfig], jobs: int | None = None) -> Iterator[Outcome]:
    """Train every run by papermill in a process of its own; yield each outcome as the run ends.

    Finished runs are left alone, interrupted ones resume, and one that fails does not stop the
    others: its output is in `sweep.log` in its folder. Ctrl-C lets the running ones save, and no
    more are started. `jobs` run at once (None: as many as the CUDA devices suffice for, else one);
    on a CPU they share the threads.

    The same sweep may run on several machines over one output folder. A run that another process
    trains is looked at again at the end, until it is finished or that process has ended.
    """
    processes = max((config.processes for config in configs), default=1)
    shares = deque(_shares(jobs, processes))  # of the machine, not in use
    waiting, running, held = deque(configs), {}, HeldRuns()
    try:
        while waiting or running or held.configs:
            if not waiting:
                waiting.extend(held.due())
            if waiting and shares:
                config = waiting.popleft()
                with _ctrl_c_deferred():  # a process that is not in `running` would train on
                    started = _start(config, shares[0])
                    if isinstance(started, subprocess.Popen):
                        running[started] = config, shares.popleft()
                if isinstance(started, Outcome):
                    yield started
                elif started is None:
                    held.add(config)
                continue
            time.sleep(0.05)
            for process in [process for process in running if process.poll() is not None]:
                config, share = running.pop(process)
                shares.append(share)
                failed = process.returncode not in (0, 130)
                if process.returncode == HELD or failed and _is_held(config):
                    held.add(config)  # another process was first
                else:
                    yield _outcome(config, process.returncode)
    finally:  # after Ctrl-C, or when the consumer has closed this generator, some are running
        for process in running:
            process.send_signal(signal.SIGINT)
        for process in running:
            process.wait()


class HeldRuns:
    """The runs of a sweep that other processes train, and when to look at them again."""

    def __init__(self):
        self.configs: list[RunConfig] = []
        self.known: set[str] = set()  # holders that the user has been told of
        self.looked = time.monotonic()

    def add(self, config: RunConfig):
        """Keep a run for later; tell the user once of each process that holds it."""
        self.configs.append(config)
        self.looked = time.monotonic()
        news = f"{config.run_name} is trained by process {run_holder(config.run_dir)}"
        if news not in self.known:
            logging.getLogger(__name__).warning("%s; this sweep looks at it again later.", news)
        self.known.add(news)

    def due(self) -> list[RunConfig]:
        """Return the runs to look at again now, and forget them."""
        if time.monotonic() < self.looked + PAUSE:
            return []
        due, self.configs = self.configs, []
        return due


@contextmanager
def _ctrl_c_deferred() -> Iterator[None]:
    """Raise what Ctrl-C, SIGTERM or SIGHUP raises at the end of the block, not inside it."""
    caught, signals = [], (signal.SIGINT, signal.SIGTERM, *hangup_signals())
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        signals = ()
    before = {number: signal.signal(number, lambda *given: caught.append(given))
              for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number, _ in caught[:1]:
        signal.raise_signal(number)


def _start(config: RunConfig, share: dict[str, str]) -> subprocess.Popen | Outcome | None:
    """Start a run's process; None if another process trains the run."""
    try:
        if finished_results(merge_recorded(config)):
            return Outcome(config, "finished before", "")
        if _is_held(config):
            if run_holder(config.run_dir) != f"{os.getpid()} on {platform.node()}":
                return None
            return Outcome(config, "failed", "this process itself is training it")
        config.run_dir.mkdir(parents=True, exist_ok=True)
        recipe = config.run_dir.absolute() / "sweep.yaml"
        parameters = absolute_paths(config.to_dict())  # the process starts in the project's root
        recipe.write_text(yaml.safe_dump(parameters, sort_keys=False), "utf-8")
        with open(config.run_dir / "sweep.log", "w", encoding="utf-8") as log:
            # A session of its own: the terminal's Ctrl-C would reach it a second time, which
            # interrupts a run without saving.
            return subprocess.Popen([sys.executable, "-m", "lmlib", "notebook", str(recipe)],
                                    cwd=PROJECT_ROOT, stdout=log, stderr=log,
                                    env={**os.environ, **share, PARENT: str(os.getpid())},
                                    start_new_session=True)
    except Exception as error:  # an unusable folder, a full disk: the other runs continue
        return Outcome(config, "failed", f"{type(error).__name__}: {error}")


def _is_held(config: RunConfig) -> bool:
    """Whether a process writes to a run, by its lock or, on another machine, its heartbeat."""
    return lock_holder(config.run_dir) is not None or run_status(config.run_dir) == "running"


def _outcome(config: RunConfig, status: int) -> Outcome:
    """Return how a run's process ended, with the last error in its log, else the last line."""
    log = config.run_dir / "sweep.log"
    text = log.read_text("utf-8", "replace") if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    message = next((line for line in lines[::-1] if "Error" in line), lines[-1])
    return Outcome(config, {0: "finished", 130: "stopped"}.get(status, "failed"), message)


def _shares(jobs: int | None, processes: int = 1) -> list[dict[str, str]]:
    """Return the environment variables that give each job its CUDA devices or its threads.

    A job needs a device for each of its processes.
    """
    count, given = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = given.split(",") if given else map(str, range(count))
    devices = [name.strip() for name in names][:count]
    jobs = jobs or max(1, len(devices) // processes)
    if devices:
        each = min(processes, len(devices))
        chosen = [[devices[(job * each + n) % len(devices)] for n in range(each)]
                  for job in range(jobs)]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(names)} for names in chosen]
    threads = str(max(1, torch.get_num_threads() // (jobs * processes)))
    return [{"OMP_NUM_THREADS": threads} if jobs > 1 else {} for _ in range(jobs)]
