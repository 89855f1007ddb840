"""Checkpoints on disk: write, verify, choose, read.

A checkpoint is a Hugging Face model folder. Its manifest, checkpoint.json, has the size and SHA-256
of the model and tokenizer files and is written after them. training_state/ holds what resuming
needs, with a manifest of its own (state.json). Tensors are safetensors and the rest is JSON, so
nothing is ever unpickled.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmlib.config import RunConfig
from lmlib.data.tokenizer import load_tokenizer
from lmlib.files import file_sha256, read_mapping, resolve_path, sync_folder, utc_now, write_json
from lmlib.leaks import LEAKY
from lmlib.model import huggingface
from lmlib.model.huggingface import CheckpointError
from lmlib.model.transformer import LanguageModel

Tensors = dict[str, Tensor]

FORMAT = 1
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
            copies = ({name: tensor.clone() for name, tensor in tensors.items()}
                      for tensors in (weights, optimizer))
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


def save_checkpoint(run_dir: Path, weights: Tensors, optimizer: Tensors, *, config: RunConfig,
                    tokenizer: Any, state: dict[str, Any], scheduled: bool, leaks: str = ""):
    """Write checkpoints/checkpoint_step_<step>, all of it or nothing, and prune old ones.

    Everything is written and flushed to a draft folder, which is renamed into place at the end.

    Args:
        weights, optimizer: from `huggingface.model_tensors` and `optim.state_tensors`.
        state: the fields of `run.prepare.Progress`, for state.json.
        scheduled: False for a checkpoint made on interruption, which a later one replaces.
        leaks: the failed checks that `allow_leaks` let pass; they mark every file people read.

    Raises a CheckpointError if a weight is not finite or the disk refuses; older ones are intact.
    """
    step, parent = state["step"], run_dir / "checkpoints"
    final, draft = parent / f"checkpoint_step_{step}", parent / f".draft_step_{step}"
    if broken := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise CheckpointError(
            f"The weights of step {step} are not all finite ({', '.join(broken[:3])}), so they are "
            "not saved. The earlier checkpoints are intact: start a run with another run_name and "
            "a lower learning_rate.")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        parent.mkdir(exist_ok=True)
        check_space(parent, sum(t.nbytes for t in (*weights.values(), *optimizer.values())))
        (draft / "training_state").mkdir(parents=True)
        model = _write_model(draft, weights, config, tokenizer, state, scheduled, leaks)
        save_file(_on_cpu(optimizer), draft / "training_state" / "optimizer.safetensors")
        write_manifest(draft / "training_state", "state.json", {
            "run": model["run"], "model_sha256": model["files"]["model.safetensors"]["sha256"],
            **state})
        sync_folder(draft / "training_state")
        sync_folder(draft)
        if final.exists():  # corrupted: the run resumed from an earlier one
            shutil.rmtree(final)
        draft.rename(final)  # atomic: a kill leaves a whole checkpoint or none
        sync_folder(parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(
            f"The checkpoint of step {step} could not be written to {parent}: {error}. Free some "
            "space or choose another output_dir; the earlier checkpoints are intact.") from error
    prune(run_dir)


def _write_model(folder: Path, weights: Tensors, config: RunConfig, tokenizer: Any,
                 state: dict[str, Any], scheduled: bool, leaks: str) -> dict[str, Any]:
    """Write the Hugging Face folder and its manifest, which is returned."""
    step, val_loss, val_loss_step = state["step"], state["scores"]["val_loss"], state["scored"]
    save_file(_on_cpu(weights), folder / "model.safetensors", metadata={"format": "pt"})
    stock = huggingface.stock_config(config, tokenizer)
    if leaks:
        setattr(stock, LEAKY, leaks)
    stock.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special = {name: getattr(tokenizer, name) for name in names}
    write_json(folder / "generation_config.json",
               {name: token for name, token in special.items() if token is not None})
    manifest = write_manifest(folder, "checkpoint.json", {
        "run": config.key(), "step": step, "val_loss": val_loss, "val_loss_step": val_loss_step,
        **({LEAKY: leaks} if leaks else {}), "timestamp": utc_now(), "scheduled": scheduled})
    if leaks:  # after the manifest, since people may edit a model card
        card = huggingface.model_card(config, step, val_loss, val_loss_step, leaks)
        (folder / "README.md").write_text(card, "utf-8")
    return manifest


def write_manifest(folder: Path, name: str, content: dict[str, Any]) -> dict[str, Any]:
    """Flush the files of `folder` to disk, then write `name`: content, and their size and hash."""
    files = {}
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())  # a manifest must not outlive its files in a power cut
        files[file.name] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
    manifest = {"format": FORMAT, **content, "files": files}
    manifest["digest"] = _digest(manifest)
    write_json(folder / name, manifest)
    return manifest


def check_space(folder: Path, needed: int):
    """Raise a CheckpointError if the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    if free < needed:
        raise CheckpointError(
            f"The checkpoints need {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB "
            "free: free some space, raise checkpoint_every, or choose another output_dir.")


def prune(run_dir: Path):
    """Delete drafts, superseded checkpoints of interruptions, and all but the newest states."""
    parent = run_dir / "checkpoints"
    for leftover in parent.glob(".*_step_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for step in checkpoint_steps(run_dir)[:-1]:
        folder = parent / f"checkpoint_step_{step}"
        if read_mapping(folder / "checkpoint.json").get("scheduled") is False:
            _remove(folder, parent / f".deleted_step_{step}")
    for step in checkpoint_steps(run_dir)[:-STATES_KEPT]:
        state = parent / f"checkpoint_step_{step}" / "training_state"
        if state.exists():
            _remove(state, parent / f".deleted_step_{step}")


def _remove(folder: Path, doomed: Path):
    """Delete a folder after renaming it to `doomed`, so that nobody finds it half-deleted."""
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _on_cpu(tensors: Tensors) -> Tensors:
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---- Verify and choose ----

def checkpoint_steps(run_dir: Path) -> list[int]:
    """Return the steps of a run's checkpoints, corrupted ones too, in ascending order."""
    names = (path.name for path in (run_dir / "checkpoints").glob("checkpoint_*"))
    return sorted(int(match[1]) for match in map(STEP_FOLDER.fullmatch, names) if match)


def verify(folder: Path, name: str = "checkpoint.json") -> dict[str, Any]:
    """Return the manifest of `folder` if every file has the size and SHA-256 that it lists.

    Raises a CheckpointError that names the file otherwise.
    """
    try:
        manifest = json.loads((folder / name).read_bytes())
        if manifest.pop("digest") != _digest(manifest):
            raise CheckpointError(f"{folder} is corrupted: {name} does not match its own digest.")
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{folder} has format {manifest['format']}; this version of "
                                  f"lmlib reads format {FORMAT}.")
        for file, expected in manifest["files"].items():
            path = folder / Path(file).name  # a manifest cannot point out of its folder
            if not path.is_file():
                raise CheckpointError(f"{folder} is corrupted: {file} is missing.")
            if path.stat().st_size != expected["size"] or file_sha256(path) != expected["sha256"]:
                raise CheckpointError(f"{folder} is corrupted: {file} has changed.")
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is incomplete: {name} is missing.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} is corrupted: {name} cannot be read "
                              f"({type(error).__name__}).") from None
    if (match := STEP_FOLDER.fullmatch(folder.name)) and int(match[1]) != manifest.get("step"):
        raise CheckpointError(f"{folder} is misnamed: it contains step {manifest.get('step')}.")
    return manifest


def verify_state(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint's training state, if it belongs to these weights."""
    model, state = verify(folder), verify(folder / "training_state", "state.json")
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
    failures = []
    for step in reversed(checkpoint_steps(run_dir)):
        folder = run_dir / "checkpoints" / f"checkpoint_step_{step}"
        try:
            _verify_of_run(folder, run, verify_state if with_state else verify)
        except CheckpointError as error:
            failures.append(str(error))
        else:
            for failure in failures:
                warnings.warn(f"{failure} Falling back to step {step}.", stacklevel=2)
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
    if run is not None and manifest.get("run", run) != run:
        raise CheckpointError(f"{folder} belongs to another run than the folder it is in.")


def find_checkpoint(path: str | Path, step: int | None = None) -> Path:
    """Return the model folder that `path` names: itself, or a checkpoint of that run.

    Without a `step` that is the newest that verifies. Raises a CheckpointError if there is none, it
    is corrupted, or the step is unknown (those of the run are listed).
    """
    folder = resolve_path(path)
    if not folder.exists():
        raise CheckpointError(f"There is no folder {path}. `lmlib runs` lists the runs.")
    if any((folder / f"model.safetensors{end}").exists() for end in ("", ".index.json")):
        if step is not None:
            raise CheckpointError(f"{path} is a single model, so step={step} does not apply; give "
                                  "the run's folder.")
        if (folder / "checkpoint.json").exists():
            verify(folder)
        return folder
    if not (folder / "checkpoints").is_dir():
        raise CheckpointError(f"{path} is neither a run with checkpoints nor a model folder.")
    if step is None:
        if newest := newest_good(folder):
            return newest
        raise CheckpointError(f"{path} has no checkpoint yet.")
    if step not in (steps := checkpoint_steps(folder)):
        known = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"{path} has no checkpoint of step {step}; it has: {known}.")
    found = folder / "checkpoints" / f"checkpoint_step_{step}"
    _verify_of_run(found)
    return found


# ---- Read ----

def load(path: str | Path, step: int | None = None,
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
