"""Launch the runs of a sweep, each in a process of its own."""

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field

import torch
import yaml

from lmlib.config import RunConfig
from lmlib.files import PROJECT_ROOT
from lmlib.run.lock import lock_holder
from lmlib.run.start import find_start


@dataclass(frozen=True)
class Outcome:
    """How a run of a sweep ended."""

    config: RunConfig
    state: str  # "finished", "finished before", "stopped" or "failed"
    said: str  # the last error or line of its output


def sweep(configs: list[RunConfig], jobs: int | None = None) -> Iterator[Outcome]:
    """Train every run by papermill in a process of its own; yield each outcome as the run ends.

    Finished runs are left alone, interrupted ones resume, and one that fails does not stop the
    others: its output is in `sweep.log` in its folder. Ctrl-C lets the running ones save, and no
    more are started.

    Args:
        jobs: runs at once. None: one per CUDA device, else one. On a CPU they share the threads.
    """
    devices = _devices()
    jobs = jobs or max(1, len(devices))
    shares: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for job in range(jobs):
        shares.put(_share(job, jobs, devices))
    processes = _Processes()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            runs = [pool.submit(_outcome, config, shares, processes) for config in configs]
            for run in as_completed(runs):
                yield run.result()
        except BaseException:  # Ctrl-C, or the consumer has closed this generator
            processes.stop()
            raise


@dataclass
class _Processes:
    """The running processes of a sweep. After `stop` no other starts."""

    running: set[subprocess.Popen] = field(default_factory=set)
    stopping: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def train(self, config: RunConfig, share: dict[str, str]) -> int | None:
        """Train a run to its end; return the exit status, or None if it was not started."""
        with self.lock:
            if self.stopping:
                return None
            process = _spawn(config, share)
            self.running.add(process)
        status = process.wait()
        with self.lock:
            self.running.discard(process)
        return status

    def stop(self):
        with self.lock:
            self.stopping = True
            for process in self.running:
                process.send_signal(signal.SIGINT)


def _spawn(config: RunConfig, share: dict[str, str]) -> subprocess.Popen:
    config.run_dir.mkdir(parents=True, exist_ok=True)
    recipe = config.run_dir / "sweep.yaml"
    recipe.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), "utf-8")
    command = [sys.executable, "-m", "lmlib", "notebook", str(recipe)]
    with open(config.run_dir / "sweep.log", "w", encoding="utf-8") as log:
        # A session of its own: the terminal's Ctrl-C would reach it a second time, which
        # interrupts a run without saving.
        return subprocess.Popen(command, cwd=PROJECT_ROOT, env={**os.environ, **share},
                                stdout=log, stderr=log, start_new_session=True)


def _outcome(config: RunConfig, shares: queue.SimpleQueue, processes: _Processes) -> Outcome:
    """Train one run with a share of the machine, unless it is finished or already running."""
    share = shares.get()
    try:
        if holder := lock_holder(config.run_dir):
            return Outcome(config, "failed", f"process {holder} is training it; start the sweep "
                                             "again when that has ended")
        if find_start(config).results:
            return Outcome(config, "finished before", "")
        status = processes.train(config, share)
        if status is None:
            return Outcome(config, "stopped", "not started")
        state = {0: "finished", 130: "stopped"}.get(status, "failed")
        return Outcome(config, state, _last_error(config))
    except Exception as error:  # an unusable folder, a full disk: the other runs continue
        return Outcome(config, "failed", f"{type(error).__name__}: {error}")
    finally:
        shares.put(share)


def _last_error(config: RunConfig) -> str:
    """Return the last line with an error in a run's output, else its last line."""
    log = (config.run_dir / "sweep.log").read_text("utf-8", "replace")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in lines[::-1] if "Error" in line), lines[-1] if lines else "")


def _devices() -> list[str]:
    """Return the CUDA devices this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count, given = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = given.split(",") if given else map(str, range(count))
    return [name.strip() for name in names][:count]


def _share(job: int, jobs: int, devices: list[str]) -> dict[str, str]:
    """Return the environment variables that give a job its device or its threads."""
    if devices:
        return {"CUDA_VISIBLE_DEVICES": devices[job % len(devices)]}
    return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))} if jobs > 1 else {}
