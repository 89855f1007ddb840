"""Checkpoints on disk: write, verify, read.

A checkpoint is a Hugging Face model folder with checkpoint.json beside the model's files: their sizes and sha256,
written last. training_state/ holds what continuing needs, under a manifest of its own. Tensors are
safetensors and the rest JSON; nothing is ever unpickled.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmlib.config import RunConfig
from lmlib.data.tokenizer import load_tokenizer
from lmlib.files import file_sha256, resolve_path, sync_folder, utc_now, write_json
from lmlib.leaks import LEAKY
from lmlib.model import huggingface
from lmlib.model.transformer import LanguageModel

FORMAT = 1


STATES_KEPT = 2  # the newest so many checkpoints keep their training state


class Saver:
    """Saves checkpoints one at a time; in the background if asked, from a copy that stays on the device.

    A save that failed in the background is raised by the next call, whichever it is.
    """

    def __init__(self, background: bool):
        self.pool = ThreadPoolExecutor(1) if background else None
        self.pending: Future | None = None

    def save(self, run_dir: Path, step: int, weights: dict[str, Tensor], optimizer: dict[str, Tensor], **rest: Any):
        """As `save_checkpoint`; returns once the tensors may change again."""
        self.wait()
        if self.pool is None:
            save_checkpoint(run_dir, step, weights, optimizer, **rest)
            return
        weights, optimizer = ({k: t.clone() for k, t in tensors.items()} for tensors in (weights, optimizer))
        self.pending = self.pool.submit(save_checkpoint, run_dir, step, weights, optimizer, **rest)

    def check(self):
        """Raise what a background save has failed of, if one has."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self):
        """Return when the last save is on disk."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()


def save_checkpoint(
    run_dir: Path,
    step: int,
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    *,
    config: RunConfig,
    tokenizer: Any,
    val_loss: float,
    val_loss_step: int,
    scheduled: bool,
    state: dict[str, Any],
    leaks: str = "",
) -> Path:
    """Write checkpoints/checkpoint_step_<step>, whole or not at all, and prune old training states.

    Everything is written and flushed to disk in a folder beside, which is renamed into place at the end.

    Args:
        weights: what `model_tensors` gives.
        optimizer: what `optim.state_tensors` gives.
        val_loss_step: the step that was last evaluated, on or before this one.
        scheduled: False for one made on interruption, which goes when a later one is saved.
        state: what else continuing needs; goes into training_state/state.json.
        leaks: the checks that the run failed and was allowed to; marks the model's config.json, the manifest and the card.

    Raises:
        CheckpointError: it could not be written (the disk is full, say), or a weight is not finite; older
            checkpoints are untouched.
    """
    parent = run_dir / "checkpoints"
    final, draft = parent / f"checkpoint_step_{step}", parent / f".draft_step_{step}"
    state_dir = draft / "training_state"
    if broken := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise huggingface.CheckpointError(
            f"The weights of step {step} are not all finite ({', '.join(broken[:3])}), so they are not saved. The earlier "
            "checkpoints are untouched: start a run of another name with a lower learning_rate."
        )
    try:
        shutil.rmtree(draft, ignore_errors=True)
        parent.mkdir(exist_ok=True)
        check_space(parent, sum(tensor.nbytes for tensor in (*weights.values(), *optimizer.values())))
        state_dir.mkdir(parents=True)
        save_file(_on_cpu(weights), draft / "model.safetensors", metadata={"format": "pt"})
        stock = huggingface.stock_config(config, tokenizer)
        if leaks:
            setattr(stock, LEAKY, leaks)
        stock.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        write_json(draft / "generation_config.json", _generation_config(tokenizer))
        origin = {"run": config.key(), "step": step}
        score = {"val_loss": val_loss, "val_loss_step": val_loss_step, **({LEAKY: leaks} if leaks else {})}
        manifest = write_manifest(draft, {**origin, **score, "timestamp": utc_now(), "scheduled": scheduled}, "checkpoint.json")
        if leaks:  # in no manifest, so that people may add to it
            (draft / "README.md").write_text(huggingface.model_card(config, step, val_loss, val_loss_step, leaks), "utf-8")
        save_file(_on_cpu(optimizer), state_dir / "optimizer.safetensors")
        model_sha256 = manifest["files"]["model.safetensors"]["sha256"]
        write_manifest(state_dir, {**origin, "model_sha256": model_sha256, **state}, "state.json")
        for folder in (state_dir, draft):
            sync_folder(folder)
        if final.exists():  # a damaged one that this run was resumed behind
            shutil.rmtree(final)
        draft.rename(final)
        sync_folder(parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise huggingface.CheckpointError(
            f"The checkpoint of step {step} could not be written to {parent}: {error}. Free some space or choose "
            "another output_dir; the earlier checkpoints are untouched."
        ) from error
    prune(run_dir)
    return final


def check_space(folder: Path, needed: int):
    """Raise a CheckpointError if the disk that holds `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if free < needed:
        raise huggingface.CheckpointError(
            f"The checkpoints need {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free: "
            "make room, raise checkpoint_every, or choose another output_dir."
        )


def disk_needed(weights: dict[str, Tensor], optimizer_bytes: int, checkpoints: int) -> int:
    """Bytes that so many more checkpoints take, with the training states of the newest and one being written."""
    each = sum(tensor.nbytes for tensor in weights.values()) + 1_000_000  # the tokenizer, roughly
    return checkpoints * each + min(checkpoints, STATES_KEPT + 1) * optimizer_bytes


def prune(run_dir: Path):
    """Delete drafts, checkpoints of interruptions that a later one supersedes, and all but the newest training states."""
    parent = run_dir / "checkpoints"
    for leftover in parent.glob(".*_step_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for step in checkpoint_steps(run_dir)[:-1]:
        folder = parent / f"checkpoint_step_{step}"
        if _is_superseded(folder):
            _remove(folder)
    for step in checkpoint_steps(run_dir)[:-STATES_KEPT]:
        _remove(parent / f"checkpoint_step_{step}" / "training_state")


def _is_superseded(folder: Path) -> bool:
    try:
        return json.loads((folder / "checkpoint.json").read_bytes())["scheduled"] is False
    except (OSError, ValueError, KeyError, TypeError):  # damaged, or another version's: left alone
        return False


def _remove(folder: Path):
    """Delete a folder, out of sight first, so that it is never found half-deleted."""
    if folder.exists():
        doomed = next(path for path in folder.parents if path.name == "checkpoints") / f".doomed_step_{folder.parent.name}"
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def write_manifest(folder: Path, content: dict[str, Any], name: str) -> dict[str, Any]:
    """Flush every file of `folder` to disk, then write `name`: content, and each file's size and sha256."""
    files = {}
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
        files[file.name] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
    manifest = {"format": FORMAT, **content, "files": files}
    manifest["digest"] = _digest(manifest)
    write_json(folder / name, manifest)
    return manifest


def _generation_config(tokenizer: Any) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def checkpoint_steps(run_dir: Path) -> list[int]:
    """The steps of the checkpoints that stand in a run's folder, damaged ones too, ascending."""
    names = (re.fullmatch(r"checkpoint_step_(\d+)", path.name) for path in (run_dir / "checkpoints").glob("checkpoint_*"))
    return sorted(int(match[1]) for match in names if match)


def verify(folder: Path, name: str = "checkpoint.json") -> dict[str, Any]:
    """The manifest of `folder`, once each file it lists has the size and sha256 it says.

    Raises:
        CheckpointError: what is wrong, with the file's name.
    """
    try:
        manifest = json.loads((folder / name).read_bytes())
        digest = manifest.pop("digest")
        if digest != _digest(manifest):
            raise huggingface.CheckpointError(f"{folder} is damaged: {name} does not match its own digest.")
        if manifest["format"] != FORMAT:
            raise huggingface.CheckpointError(f"{folder} has format {manifest['format']}; this lmlib reads format {FORMAT}.")
        for file, expected in manifest["files"].items():
            path = folder / Path(file).name
            if not path.is_file():
                raise huggingface.CheckpointError(f"{folder} is damaged: {file} is missing.")
            if path.stat().st_size != expected["size"] or file_sha256(path) != expected["sha256"]:
                raise huggingface.CheckpointError(f"{folder} is damaged: {file} is not the file that was saved.")
    except huggingface.CheckpointError:
        raise
    except FileNotFoundError:
        raise huggingface.CheckpointError(f"{folder} is no finished checkpoint: {name} is missing.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise huggingface.CheckpointError(f"{folder} is damaged: {name} cannot be read ({type(error).__name__}).") from None
    if (match := re.fullmatch(r"checkpoint_step_(\d+)", folder.name)) and int(match[1]) != manifest.get("step"):
        raise huggingface.CheckpointError(f"{folder} is mixed up: it holds step {manifest.get('step')}.")
    return manifest


def verify_state(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint's training state, once it is whole and belongs to these weights."""
    weights, state = verify(folder), verify(folder / "training_state", "state.json")
    if (state.get("step"), state.get("model_sha256")) != (
        weights["step"],
        weights["files"]["model.safetensors"]["sha256"],
    ):
        raise huggingface.CheckpointError(f"{folder} is mixed up: its training state belongs to other weights.")
    return state


def _recorded_key(run_dir: Path) -> str | None:
    config = RunConfig.recorded(run_dir)
    return config and config.key()


def _check_origin(folder: Path, manifest: dict[str, Any], run: str | None):
    if run is not None and manifest.get("run", run) != run:
        raise huggingface.CheckpointError(
            f"{folder} is foreign: it was saved by another run than the one whose folder it lies in."
        )


def newest_good(run_dir: Path, with_state: bool = False, run: str | None = None) -> Path | None:
    """The newest checkpoint that is whole and of this run, with its training state if asked. Each one passed over is
    warned of.

    Args:
        run: the run's `run_key`; None takes that of the config.json in its folder.

    Returns None if there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, and none is good.
    """
    failures, run = [], run or _recorded_key(run_dir)
    for step in reversed(checkpoint_steps(run_dir)):
        folder = run_dir / "checkpoints" / f"checkpoint_step_{step}"
        try:
            _check_origin(folder, (verify_state if with_state else verify)(folder), run)
        except huggingface.CheckpointError as error:
            failures.append(str(error))
            continue
        for failure in failures:
            warnings.warn(f"{failure} Falling back to step {step}.", stacklevel=2)
        return folder
    if failures:
        raise huggingface.CheckpointError(
            "No checkpoint can be used:\n"
            + "\n".join(f"  - {failure}" for failure in failures)
            + "\nBring back a copy of one of these folders, or start a run of another name."
        )
    return None


def find_checkpoint(path: str | Path, step: int | None = None) -> Path:
    """The model folder that `path` means: itself, or the checkpoint of a run (the newest good one if step is None).

    Raises:
        CheckpointError: there is none, the step is unknown (those there are get listed), or it is damaged.
    """
    folder = resolve_path(path)
    if not folder.exists():
        raise huggingface.CheckpointError(f"There is no folder {path}. `python -m lmlib runs` lists the runs.")
    if (folder / "model.safetensors").exists() or (folder / "model.safetensors.index.json").exists():
        if step is not None:
            raise huggingface.CheckpointError(f"{path} is one model, so step={step} means nothing; give the run's folder.")
        if (folder / "checkpoint.json").exists():
            verify(folder)
        return folder
    if not (folder / "checkpoints").is_dir():
        raise huggingface.CheckpointError(f"{path} is neither a run with checkpoints nor a model folder.")
    steps = checkpoint_steps(folder)
    if step is not None and step not in steps:
        raise huggingface.CheckpointError(
            f"{path} has no checkpoint of step {step}; it has: {', '.join(map(str, steps)) or 'none'}."
        )
    if step is None:
        found = newest_good(folder)
        if found is None:
            raise huggingface.CheckpointError(f"{path} has no checkpoint yet.")
        return found
    found = folder / "checkpoints" / f"checkpoint_step_{step}"
    _check_origin(found, verify(found), _recorded_key(folder))
    return found


def load(path: str | Path, step: int | None = None, device: str = "cpu") -> tuple[LanguageModel, Any]:
    """A model in float32 and evaluation mode, and its tokenizer.

    Args:
        path: a run's folder, a checkpoint, or a Hugging Face folder of a class that lmlib saves.
        step: which checkpoint of the run; None takes the newest that verifies.

    Raises:
        CheckpointError: nothing usable there, or the folder has settings that lmlib lacks (named).
    """
    folder = find_checkpoint(path, step)
    config = huggingface.config_of(folder)
    model = huggingface.load_weights(folder, config).to(device).eval()
    return model, load_tokenizer(str(folder))


def read_state(folder: Path) -> dict[str, Any]:
    """What a verified training state says beside its tensors."""
    return json.loads((folder / "training_state" / "state.json").read_bytes())


def read_optimizer(folder: Path) -> dict[str, Tensor]:
    """The optimiser's tensors of a verified training state."""
    return load_file(folder / "training_state" / "optimizer.safetensors")


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
