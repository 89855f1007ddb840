"""Many runs: a grid of them, trained one after another or several at once; and the search for a learning rate."""

import itertools
import math
import os
import queue
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from lmlib import feed_forward, optim, run_folder, session
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
    configs, mistakes, seen = [], [], set()
    varied = {name: values for name, values in grid.items() if len(values) > 1}
    for recipe in recipes:
        given = read_parameters(recipe)
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            base = chosen.get("run_name") or given.get("run_name") or Path(recipe).stem
            name = "-".join([str(base), *(f"{key}{chosen[key]}" for key in varied if key != "run_name")])
            try:
                config = RunConfig(**{**given, **chosen, "run_name": re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100]})
            except ValueError as error:
                mistakes += [f"{recipe}: {line.strip(' -')}" for line in str(error).splitlines()[1:]]
                continue
            key = run_folder.run_key(replace(config, run_name="any"))
            if key not in seen:
                configs.append(config)
            seen.add(key)
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
    cuda = torch.cuda.device_count()
    jobs = jobs or max(1, cuda)
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(jobs):
        slots.put(number)
    running: set[subprocess.Popen] = set()
    stopping: list[bool] = []

    def run(config: RunConfig) -> Outcome:
        if stopping:
            return Outcome(config, "stopped", "not started")
        try:
            if run_folder.finished(run_folder.continued(config)):
                return Outcome(config, "finished before", "")
        except ValueError as error:
            return Outcome(config, "failed", str(error))
        slot = slots.get()
        env = dict(os.environ, **_share(slot, jobs, cuda))
        config.run_dir.mkdir(parents=True, exist_ok=True)
        recipe, log = config.run_dir / "sweep.yaml", config.run_dir / "sweep.log"
        recipe.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), "utf-8")
        try:
            with open(log, "w", encoding="utf-8") as said:
                command = [sys.executable, "-m", "lmlib", "notebook", str(recipe)]
                # a session of its own: Ctrl-C in the terminal reaches it through us alone, once
                process = subprocess.Popen(command, cwd=PROJECT_ROOT, env=env, stdout=said, stderr=said, start_new_session=True)
                running.add(process)
                code = process.wait()
                running.discard(process)
        finally:
            slots.put(slot)
        lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        state = {0: "finished", 130: "stopped"}.get(code, "failed")
        return Outcome(config, state, next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else ""))

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for future in as_completed([pool.submit(run, config) for config in configs]):
                yield future.result()
        except BaseException:  # Ctrl-C, or whoever listens has gone
            stopping.append(True)
            for process in running:
                process.send_signal(signal.SIGINT)
            raise


def _share(slot: int, jobs: int, cuda: int) -> dict[str, str]:
    """What a job may use of the machine."""
    if cuda:
        return {"CUDA_VISIBLE_DEVICES": str(slot % cuda)}
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
    """
    device = session.pick_device(config.device)
    dtype = session.pick_dtype(config.dtype, device)
    with session.numerics(config, device):
        store = session.open_store(config)
        model = session.build_model(replace(config, vocab_size=store.vocab_size), session.parent_of(config)).to(device)
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
    short = {"total_steps": steps, "eval_every": steps, "checkpoint_every": steps}
    short["output_dir"] = f"{found.config.output_dir}/{found.config.run_name}-rates"
    return [replace(found.config, run_name=f"rate{factor:.2g}", **short, **rates(found.config, factor)) for factor in factors]
