"""Checkpoints on disk: write, verify, choose, read.

A checkpoint is a Hugging Face model folder. Its manifest, checkpoint.json, has the size and SHA-256
of the model and tokenizer files and is written after them. lineage.bin has the hashes of all
documents that the model or an ancestor trained on (sorted, little-endian uint64). training_state/
holds what resuming needs, with a manifest of its own (state.json). Tensors are safetensors and the
rest is JSON or plain integers, so nothing is ever unpickled.
"""

import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmlib.config import RunConfig
from lmlib.data.tokenizer import load_tokenizer
from lmlib.errors import UserError
from lmlib.files import read_mapping, sync_folder, utc_now
from lmlib.leaks import LEAKY
from lmlib.model import huggingface
from lmlib.model.card import write_card
from lmlib.model.huggingface import CheckpointError
from lmlib.model.manifest import verify_manifest, write_manifest
from lmlib.model.transformer import LanguageModel
from lmlib.parameters import existing_folder

Tensors = dict[str, Tensor]
Step = int | Literal["best"] | None  # None: the newest; "best": of the lowest validation loss

STATES_KEPT = 2  # the newest checkpoints keep their training state: twice as large as the weights
STEP_FOLDER = re.compile(r"checkpoint_step_(\d+)")


# ---- Write ----

class Saver:
    """Save checkpoints one at a time; on CUDA in the background, from a copy on the device.

    A background save that failed raises its error at the next call of any method.
    """
    def __init__(self, background: bool):
        self.pool = ThreadPoolExecutor(1) if background else None
        self.pending: Future | None = None

    def save(self, run_dir: Path, weights: Tensors, optimizer: Tensors, **rest: Any):
        """Call `save_checkpoint`; returns once the tensors may change again."""
        self.wait()
        if self.pool is None:
            save_checkpoint(run_dir, weights, optimizer, **rest)
        else:
            copies = copy_tensors(weights, optimizer)
            self.pending = self.pool.submit(save_checkpoint, run_dir, *copies, **rest)

    def check(self):
        """Raise the error of a background save that has failed."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self):
        """Return when the last save is on disk."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()


def copy_tensors(*groups: Tensors) -> list[Tensors]:
    """Copy tensors on their device, which is quick, or to host memory if the device is full."""
    try:
        return [{name: tensor.clone() for name, tensor in group.items()} for group in groups]
    except torch.cuda.OutOfMemoryError:
        pass
    torch.cuda.empty_cache()  # after the handler, whose traceback holds the clones
    return [{name: tensor.to("cpu", copy=True) for name, tensor in group.items()}
            for group in groups]


def save_checkpoint(run_dir: Path, weights: Tensors, optimizer: Tensors, *, config: RunConfig,
                    tokenizer: Any, state: dict[str, Any], scheduled: bool,
                    provenance: dict[str, Any], lineage: np.ndarray, leaks: str = ""):
    """Write checkpoints/checkpoint_step_<step>, all of it or nothing, and prune old ones.

    Everything is written and flushed to a draft folder, which is renamed into place at the end.
    Then results.json, which is of fewer steps, is deleted.

    Args:
        weights, optimizer: from `huggingface.model_tensors` and `optim.state_tensors`.
        state: the fields of `run.prepare.Progress`, for state.json.
        scheduled: False for a checkpoint made on interruption, which a later one replaces.
        provenance: for the manifest: "data" (hash of the run's tokens), "lineage" ("complete" or
            "unknown") and "streams" (hashes of the training tokens of the run and its ancestors).
        lineage: hashes of the training documents of the run and its ancestors, sorted uint64.
        leaks: the failed checks that `allow_leaks` let pass; they mark every file people read.

    Raises a CheckpointError if a weight is not finite or the disk refuses; older ones are intact.
    """
    step, parent = state["step"], run_dir / "checkpoints"
    final, draft = parent / f"checkpoint_step_{step}", parent / f".draft_step_{step}"
    weights = _on_cpu(weights)  # first, since checking them where they are would take memory there
    if broken := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise CheckpointError(
            f"The weights of step {step} are not all finite ({', '.join(broken[:3])}), so they are "
            "not saved. The earlier checkpoints are intact: start a run with another run_name and "
            "a lower learning_rate.")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        parent.mkdir(exist_ok=True)
        tensors = (*weights.values(), *optimizer.values(), lineage)
        check_space(parent, sum(tensor.nbytes for tensor in tensors))
        (draft / "training_state").mkdir(parents=True)
        lineage.astype("<u8").tofile(draft / "lineage.bin")
        huggingface.save_model(draft, weights, config, tokenizer, leaks)
        model = write_manifest(draft, "checkpoint.json", {
            "run": config.key(), "step": step, "val_loss": state["scores"]["val_loss"],
            "val_loss_step": state["scored"], **provenance, **({LEAKY: leaks} if leaks else {}),
            "timestamp": utc_now(), "scheduled": scheduled})
        write_card(draft, config, state["scores"])  # after the manifest: people may edit it
        save_file(_on_cpu(optimizer), draft / "training_state" / "optimizer.safetensors")
        write_manifest(draft / "training_state", "state.json", {
            "run": model["run"], "model_sha256": model["files"]["model.safetensors"]["sha256"],
            **state})
        sync_folder(draft / "training_state")
        sync_folder(draft)
        if final.exists():  # corrupted: the run resumed from an earlier one
            final.rename(parent / f".deleted_step_{step}")
        draft.rename(final)  # atomic: a kill leaves a whole checkpoint or none
        sync_folder(parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(
            f"The checkpoint of step {step} could not be written to {parent}: {error}. Free some "
            "space or choose another output_dir; the earlier checkpoints are intact.") from error
    _try_to_delete(run_dir / "results.json")
    prune(run_dir, config.keep_checkpoints)


def check_space(folder: Path, needed: int):
    """Raise a CheckpointError if the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    if free < needed:
        raise CheckpointError(
            f"The checkpoints need {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB "
            "free: free some space, raise checkpoint_every, or choose another output_dir.")


def prune(run_dir: Path, keep: int | None = None):
    """Delete what is no longer needed, and warn of what cannot be deleted: the next save retries.

    That is drafts, superseded checkpoints of interruptions, all but the newest states, and all
    scheduled checkpoints but the best and the newest `keep` (None: all stay).
    """
    parent, steps = run_dir / "checkpoints", checkpoint_steps(run_dir)
    for leftover in parent.glob(".*_step_*"):
        _try_to_delete(leftover)
    manifests = read_manifests(run_dir)
    superseded = [step for step in steps[:-1] if manifests[step].get("scheduled") is False]
    scheduled = {step: manifest for step, manifest in manifests.items()
                 if manifest.get("scheduled") is True}
    surplus = [] if keep is None else [*scheduled][:-keep]
    for step in {*superseded, *surplus} - {*best_steps(scheduled)[:1]}:
        _try_to_delete(parent / f"checkpoint_step_{step}", parent / f".deleted_step_{step}")
    for step in checkpoint_steps(run_dir)[:-STATES_KEPT]:
        state = parent / f"checkpoint_step_{step}" / "training_state"
        _try_to_delete(state, parent / f".deleted_step_{step}")


def _try_to_delete(path: Path, doomed: Path | None = None):
    """Delete a file or folder if it exists; warn if that fails.

    A folder is renamed to `doomed` first, so that nobody finds it half-deleted.
    """
    try:
        if path.is_dir():
            shutil.rmtree(path.rename(doomed) if doomed else path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"{path} cannot be deleted ({error}); the next checkpoint tries again.",
                      stacklevel=2)


def _on_cpu(tensors: Tensors) -> Tensors:
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


# ---- Verify and choose ----

def checkpoint_steps(run_dir: Path) -> list[int]:
    """Return the steps of a run's checkpoints, corrupted ones too, in ascending order."""
    names = (path.name for path in (run_dir / "checkpoints").glob("checkpoint_*"))
    return sorted(int(match[1]) for match in map(STEP_FOLDER.fullmatch, names) if match)


def read_manifests(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Return the manifest of each step's checkpoint, unverified; {} for one that is unreadable."""
    parent = run_dir / "checkpoints"
    return {step: read_mapping(parent / f"checkpoint_step_{step}" / "checkpoint.json")
            for step in checkpoint_steps(run_dir)}


def best_steps(manifests: dict[int, dict[str, Any]]) -> list[int]:
    """Return the steps that have a validation loss, the lowest first.

    Of equal ones a loss measured at its own step comes first, then the later step.
    """
    losses = {step: manifest.get("val_loss") for step, manifest in manifests.items()}
    scored = [step for step, loss in losses.items()
              if isinstance(loss, int | float) and math.isfinite(loss)]
    return sorted(scored, key=lambda step: (
        losses[step], manifests[step].get("val_loss_step") != step, -step))


def verify(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint whose files are those that it lists.

    Raises a CheckpointError that names the file otherwise.
    """
    manifest = verify_manifest(folder, "checkpoint.json")
    if (match := STEP_FOLDER.fullmatch(folder.name)) and int(match[1]) != manifest.get("step"):
        raise CheckpointError(f"{folder} is misnamed: it contains step {manifest.get('step')}.")
    return manifest


def verify_state(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint's training state, if it belongs to these weights."""
    model, state = verify(folder), verify_manifest(folder / "training_state", "state.json")
    weights = model["step"], model["files"]["model.safetensors"]["sha256"]
    if (state.get("step"), state.get("model_sha256")) != weights:
        raise CheckpointError(f"{folder} is corrupted: its training state has other weights.")
    return state


def newest_good(run_dir: Path, with_state: bool = False, run: str | None = None) -> Path | None:
    """Return the newest checkpoint that verifies and belongs to this run; None if there are none.

    Warns of each one passed over; raises a CheckpointError if none is usable.

    Args:
        with_state: it must have a training state that verifies too.
        run: the run's `RunConfig.key()`; None takes that of the config.json in its folder.
    """
    steps = reversed(checkpoint_steps(run_dir))
    return _first_good(run_dir, steps, verify_state if with_state else verify, run)


def _first_good(run_dir: Path, steps: Iterable[int], check: Callable,
                run: str | None = None) -> Path | None:
    failures = []
    for step in steps:
        folder = run_dir / "checkpoints" / f"checkpoint_step_{step}"
        try:
            _verify_of_run(folder, run, check)
        except CheckpointError as error:
            failures.append(str(error))
        else:
            for failure in failures:
                warnings.warn(f"{failure} Falling back to step {step}.", stacklevel=3)
            return folder
    if failures:
        lines = "\n  - ".join(["No checkpoint is usable:", *failures])
        raise CheckpointError(f"{lines}\nRestore a copy of one of these folders, or start a run "
                              "with another run_name.")
    return None


def _verify_of_run(folder: Path, run: str | None = None, check: Callable = verify):
    """Verify a checkpoint, and that it belongs to its folder's run, whose key `run` may give."""
    manifest = check(folder)
    if run is None and (recorded := RunConfig.recorded(folder.parent.parent)):
        run = recorded.key()
    if manifest["format"] > 1 and run is not None and manifest.get("run", run) != run:
        raise CheckpointError(f"{folder} belongs to another run than the folder it is in.")


def find_checkpoint(path: str | Path, step: Step = None) -> Path:
    """Return the model folder that `path` names: itself, or a checkpoint of that run.

    Without a `step` that is the newest that verifies. Raises a CheckpointError if there is none, it
    is corrupted, or the step is unknown (those of the run are listed).
    """
    try:
        folder = existing_folder(path)
    except UserError as error:
        raise CheckpointError(str(error)) from None
    if any((folder / f"model.safetensors{end}").exists() for end in ("", ".index.json")):
        if step is not None:
            raise CheckpointError(f"{path} is a single model, so step={step} does not apply; give "
                                  "the run's folder.")
        if (folder / "checkpoint.json").exists():
            verify(folder)
        return folder
    if not (folder / "checkpoints").is_dir():
        raise CheckpointError(f"{path} is neither a run with checkpoints nor a model folder.")
    if step in (None, "best"):
        steps = best_steps(read_manifests(folder))
        if found := newest_good(folder) if step is None else _first_good(folder, steps, verify):
            return found
        what = "checkpoint" if step is None else "checkpoint with a validation loss"
        raise CheckpointError(f"{path} has no {what} yet.")
    if step not in (steps := checkpoint_steps(folder)):
        known = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"{path} has no checkpoint of step {step}; it has: {known}.")
    found = folder / "checkpoints" / f"checkpoint_step_{step}"
    _verify_of_run(found)
    return found


# ---- Read ----

def load(path: str | Path, step: Step = None,
         device: str = "cpu") -> tuple[LanguageModel, Any]:
    """Load a model, in float32 and evaluation mode, and its tokenizer.

    `path` is a run's folder (without a `step`: its newest checkpoint that verifies), a checkpoint,
    or a Hugging Face folder of a class that lmlib reads. Raises a CheckpointError if nothing usable
    is there or the model has settings that lmlib lacks.
    """
    folder = find_checkpoint(path, step)
    model = huggingface.load_weights(folder, huggingface.read_config(folder))
    return model.to(device).eval(), load_tokenizer(str(folder))


def read_state(folder: Path) -> dict[str, Any]:
    """Return state.json of a verified checkpoint."""
    return json.loads((folder / "training_state" / "state.json").read_bytes())


def read_optimizer(folder: Path) -> Tensors:
    """Return the optimizer tensors of a verified checkpoint."""
    return load_file(folder / "training_state" / "optimizer.safetensors")


def read_lineage(folder: Path) -> np.ndarray | None:
    """Return the sorted hashes (uint64) in a verified checkpoint's lineage.bin; None without it."""
    file = folder / "lineage.bin"
    return np.fromfile(file, "<u8").astype(np.uint64) if file.is_file() else None
