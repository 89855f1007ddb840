"""Many runs: a grid of them, trained one after another or several at once; and the search for a learning rate."""

import itertools
import math
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from lmlib import audit, checkpoint, feed_forward, optim, run_folder, session
from lmlib.config import PROJECT_ROOT, RunConfig, read_parameters, shown
from lmlib.training import clip, gradients


@dataclass(frozen=True)
class Outcome:
    """How a run of a sweep ended: "finished", "finished before", "stopped" or "failed"; the last line it said."""

    config: RunConfig
    state: str
    said: str


def plan(recipes: Iterable[str | Path], grid: dict[str, list[Any]]) -> list[RunConfig]:
    """Every recipe with every combination of the grid's values: run_name says which (`mlp-seed0-learning_rate0.01`).

    Runs that would be the same but for their name, because a parameter of the grid is not used, are planned once.

    Raises:
        ValueError: a recipe or value is wrong, each is listed; or two runs would share a folder.
    """
    configs, mistakes, seen = [], [], []
    in_name = [name for name, values in grid.items() if name != "run_name" and (len(values) > 1 or name == "seed")]
    for recipe in recipes:
        try:
            given = read_parameters(recipe)
        except ValueError as error:
            mistakes.append(str(error))
            continue
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            base = chosen.get("run_name") or given.get("run_name") or Path(recipe).stem
            name = "-".join([str(base), *(f"{key}{chosen[key]}" for key in in_name)])
            try:
                config = RunConfig(**{**given, **chosen, "run_name": re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100]})
            except ValueError as error:
                mistakes += [f"{recipe}: {line.strip(' -')}" for line in str(error).splitlines()[1:]]
                continue
            ignored = run_folder.unused(config.attention, config.feed_forward) | {"run_name"}
            used = {key: value for key, value in config.to_dict().items() if key not in ignored}
            if used not in seen:
                configs.append(config)
            seen.append(used)
    folders = [config.run_dir for config in configs]
    mistakes += [f"two runs would share the folder {shown(f)}" for f in dict.fromkeys(folders) if folders.count(f) > 1]
    if mistakes:
        raise ValueError("The sweep needs mending:\n" + "\n".join(f"  - {mistake}" for mistake in dict.fromkeys(mistakes)))
    if not configs:
        raise ValueError("The sweep is empty: name at least one recipe.")
    return configs


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
            if run_folder.finished(run_folder.continued(config)):
                return Outcome(config, "finished before", "")
            if holder := run_folder.writer(config.run_dir):
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


# ---------------------------------------------------------------------------------------------------
# A learning rate


@dataclass(frozen=True)
class RangeTest:
    """Losses at rates that grow step by step; `factor` times the recipe's rates is what the curve suggests."""

    config: RunConfig
    factors: list[float]  # of the recipe's learning_rate and muon_learning_rate
    losses: list[float]  # nats, smoothed
    factor: float | None  # None: the loss never fell

    @property
    def suggestion(self) -> dict[str, float]:
        return rates(self.config, self.factor) if self.factor else {}


def rates(config: RunConfig, factor: float) -> dict[str, float]:
    """The recipe's learning rates times `factor`, to two digits."""
    names = ["learning_rate", "muon_learning_rate"] if config.optimizer == "muon" else ["learning_rate"]
    return {name: float(f"{getattr(config, name) * factor:.2g}") for name in names}


def find_learning_rate(config: RunConfig, steps: int = 100, low: float = 1e-3, high: float = 30.0) -> RangeTest:
    """A range test (Smith, arXiv:1506.01186; fastai's `lr_find`): train a copy of the model while its rates grow from `low`
    to `high` times the recipe's, until the loss leaves its lowest by half a nat; suggest where it falls most steeply.

    Nothing is written but the tokens' cache, and no state that training would use is touched.

    Raises:
        ValueError: the device, the corpus or the parent that `init_from` names cannot be used, or the run leaks.
    """
    device = session.pick_device(config.device)
    dtype = session.pick_dtype(config.dtype, device)
    with session.numerics(config, device):
        store = session.open_store(config)
        parent = checkpoint.find_checkpoint(config.init_from, config.init_step) if config.init_from else None
        whole = replace(config, vocab_size=store.vocab_size)
        model = session.build_model(whole, parent).to(device)
        audit.before_training(whole, model, store, store.validation_windows(), parent)
        optimizers = optim.build_optimizers(model, config)
        micro, factors, losses, mean = config.micro_batch_size or config.batch_size, [], [], 0.0
        for step in range(1, steps + 1):
            factor = low * (high / low) ** ((step - 1) / max(1, steps - 1))
            optim.set_rate(optimizers, factor)
            loss = gradients(model, *store.batch(step), micro, config.seed, step, dtype)
            norm = clip(model, config.grad_clip)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                break
            for optimizer in optimizers:
                optimizer.step()
            feed_forward.balance(model)
            mean = 0.9 * mean + 0.1 * loss
            factors.append(factor)
            losses.append(mean / (1 - 0.9**step))
            if losses[-1] > min(losses) + 0.5 and step > 10:
                break
    return RangeTest(config, factors, losses, _steepest(factors, losses))


def _steepest(factors: list[float], losses: list[float]) -> float | None:
    """The factor at which the loss falls fastest per doubling, before its lowest point."""
    lowest = losses.index(min(losses)) if losses else 0
    slopes = [losses[i + 1] - losses[i - 1] for i in range(1, lowest)]
    if not slopes or min(slopes) >= 0:
        return None
    return factors[slopes.index(min(slopes)) + 1]


def candidates(found: RangeTest, steps: int) -> list[RunConfig]:
    """Short runs, in a folder of their own, that confirm a suggestion: a third of it, itself and three times it, and the
    recipe's own rates."""
    factors = sorted({1.0, *((found.factor / 3, found.factor, found.factor * 3) if found.factor else ())})
    choices = {tuple(rates(found.config, factor).items()) for factor in factors}
    short = {"total_steps": steps, "eval_every": steps, "checkpoint_every": steps}
    short["output_dir"] = f"{found.config.output_dir}/{found.config.run_name}-rates"
    return [
        replace(found.config, **short, run_name=f"{steps}steps-rate" + "-".join(f"{r:g}" for _, r in chosen), **dict(chosen))
        for chosen in sorted(choices)
    ]
