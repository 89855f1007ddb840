"""Many runs, each in a process of its own."""

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import torch
import yaml

from lmlib.config import RunConfig
from lmlib.files import PROJECT_ROOT
from lmlib.run.lock import lock_holder
from lmlib.run.start import finished_results, merge_recorded


@dataclass(frozen=True)
class Outcome:
    """How a run of a sweep ended: "finished", "finished before", "stopped" or "failed"; the last line it said."""

    config: RunConfig
    state: str
    said: str


def sweep(configs: list[RunConfig], jobs: int | None = None) -> Iterator[Outcome]:
    """Train every run by papermill in a process of its own; yields each as it ends.

    Finished runs are left alone, runs cut off are resumed, and one that fails does not stop the others: its words are in
    `sweep.log` in its folder. `jobs` at once: one a CUDA device, else one; on a CPU they share the cores.
    Ctrl-C lets the running ones save, and starts no more.
    """
    devices = _devices()
    jobs = jobs or max(1, len(devices))
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(jobs):
        slots.put(number)
    running: set[subprocess.Popen] = set()
    stopping, lock = threading.Event(), threading.Lock()

    def spawn(config: RunConfig, share: dict[str, str]) -> subprocess.Popen | None:
        """The process that trains a run, unless the sweep is stopping."""
        with lock:
            if stopping.is_set():
                return None
            config.run_dir.mkdir(parents=True, exist_ok=True)
            recipe = config.run_dir / "sweep.yaml"
            recipe.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), "utf-8")
            with open(config.run_dir / "sweep.log", "w", encoding="utf-8") as said:
                command, env = [sys.executable, "-m", "lmlib", "notebook", str(recipe)], {**os.environ, **share}
                # a session of its own: Ctrl-C in the terminal reaches it through us alone, once
                process = subprocess.Popen(command, cwd=PROJECT_ROOT, env=env, stdout=said, stderr=said, start_new_session=True)
            running.add(process)
        return process

    def run(config: RunConfig) -> Outcome:
        slot = slots.get()
        try:
            if finished_results(merge_recorded(config)):
                return Outcome(config, "finished before", "")
            if holder := lock_holder(config.run_dir):
                return Outcome(config, "failed", f"process {holder} is training it; start the sweep again when that has ended")
            process = spawn(config, _share(slot, jobs, devices))
            if process is None:
                return Outcome(config, "stopped", "not started")
            code = process.wait()
            with lock:
                running.discard(process)
            state = {0: "finished", 130: "stopped"}.get(code, "failed")
            said = (config.run_dir / "sweep.log").read_text("utf-8", "replace")
            lines = [line.strip() for line in said.splitlines() if line.strip()]
            return Outcome(config, state, next((line for line in lines[::-1] if "Error" in line), lines[-1] if lines else ""))
        except Exception as error:  # a strange folder, a full disk: the other runs go on
            return Outcome(config, "failed", f"{type(error).__name__}: {error}")
        finally:
            slots.put(slot)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for future in as_completed([pool.submit(run, config) for config in configs]):
                yield future.result()
        except BaseException:  # Ctrl-C, or whoever listens has gone
            with lock:
                stopping.set()
                for process in running:
                    process.send_signal(signal.SIGINT)
            raise


def _devices() -> list[str]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count, given = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name.strip() for name in given.split(",")][:count] if given else [str(number) for number in range(count)]


def _share(slot: int, jobs: int, devices: list[str]) -> dict[str, str]:
    """What a job may use of the machine."""
    if devices:
        return {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]}
    return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))} if jobs > 1 else {}
