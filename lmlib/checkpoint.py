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

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmlib.config import RunConfig, resolve_path
from lmlib.data import file_sha256, load_tokenizer
from lmlib.model import LanguageModel
from lmlib.run_folder import now, write_json

FORMAT = 1
STATES_KEPT = 2  # the newest so many checkpoints keep their training state


class CheckpointError(ValueError):
    """A checkpoint that is damaged, half-written, foreign or of a class that lmlib does not have."""


# ---------------------------------------------------------------------------------------------------
# Writing


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
    val_loss: float | None,
    state: dict[str, Any],
) -> Path:
    """Write checkpoints/checkpoint_step_<step>, whole or not at all, and prune old training states.

    Everything is written and flushed to disk in a folder beside, which is renamed into place at the end.

    Args:
        weights: what `model_tensors` gives.
        optimizer: what `optim.state_tensors` gives.
        state: what else continuing needs; goes into training_state/state.json.

    Raises:
        CheckpointError: it could not be written (the disk is full, say); older checkpoints are untouched.
    """
    parent = run_dir / "checkpoints"
    final, draft = parent / f"checkpoint_step_{step}", parent / f".draft_step_{step}"
    state_dir = draft / "training_state"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        state_dir.mkdir(parents=True)
        save_file(_on_cpu(weights), draft / "model.safetensors", metadata={"format": "pt"})
        stock_config(config, tokenizer).save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        write_json(draft / "generation_config.json", _generation_config(tokenizer))
        manifest = write_manifest(draft, {"step": step, "val_loss": val_loss, "timestamp": now()}, "checkpoint.json")
        save_file(_on_cpu(optimizer), state_dir / "optimizer.safetensors")
        model_sha256 = manifest["files"]["model.safetensors"]["sha256"]
        write_manifest(state_dir, {"step": step, "model_sha256": model_sha256, **state}, "state.json")
        for folder in (state_dir, draft):
            _sync_folder(folder)
        if final.exists():  # a damaged one that this run was resumed behind
            shutil.rmtree(final)
        draft.rename(final)
        _sync_folder(parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(
            f"The checkpoint of step {step} could not be written to {parent}: {error}. Free some space or choose "
            "another output_dir; the earlier checkpoints are untouched."
        ) from error
    prune(run_dir)
    return final


def check_space(run_dir: Path, weights: dict[str, Tensor], optimizer_bytes: int, checkpoints: int) -> int:
    """Bytes that `checkpoints` more checkpoints will take, their training states included.

    Raises:
        CheckpointError: the disk has less than that free.
    """
    each = sum(tensor.nbytes for tensor in weights.values())
    needed = checkpoints * (each + 1_000_000) + min(checkpoints, STATES_KEPT + 1) * optimizer_bytes
    free = shutil.disk_usage(next(p for p in (run_dir, *run_dir.parents) if p.exists())).free
    if free < needed:
        raise CheckpointError(
            f"The {checkpoints} checkpoints of this run need {needed / 1e9:.2f} GB and {run_dir} has {free / 1e9:.2f} GB "
            "free: make room, or raise checkpoint_every."
        )
    return needed


def prune(run_dir: Path):
    """Keep training states for the newest checkpoints only; delete drafts and other leftovers of killed runs."""
    parent = run_dir / "checkpoints"
    for leftover in parent.glob(".*_step_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for step in checkpoint_steps(run_dir)[:-STATES_KEPT]:
        state_dir = parent / f"checkpoint_step_{step}" / "training_state"
        if state_dir.exists():  # out of sight first, so that a half-deleted state is never found
            doomed = parent / f".pruned_step_{step}"
            state_dir.rename(doomed)
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


def stock_config(config: RunConfig, tokenizer: Any = None) -> Any:
    """The transformers configuration of the stock class whose names and arithmetic ours are."""
    import transformers

    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "max_position_embeddings": config.sequence_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": config.attention_bias,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rms_norm_eps": 1e-6,
        "dtype": "float32",
        "bos_token_id": getattr(tokenizer, "bos_token_id", None),
        "eos_token_id": getattr(tokenizer, "eos_token_id", None),
        "pad_token_id": getattr(tokenizer, "pad_token_id", None),
    }
    if config.attention == "mha":
        return transformers.LlamaConfig(architectures=["LlamaForCausalLM"], **shared)
    return transformers.DeepseekV3Config(
        architectures=["DeepseekV3ForCausalLM"],
        q_lora_rank=config.q_lora_rank,
        kv_lora_rank=config.kv_lora_rank,
        qk_rope_head_dim=config.qk_rope_head_dim,
        qk_nope_head_dim=config.qk_nope_head_dim,
        v_head_dim=config.v_head_dim,
        rope_interleave=config.rope_interleave,
        first_k_dense_replace=config.num_hidden_layers,  # every layer dense
        num_nextn_predict_layers=0,
        **shared,
    )


def _generation_config(tokenizer: Any) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}


def model_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds: all parameters by name, a tied head once."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


# ---------------------------------------------------------------------------------------------------
# Verifying and choosing


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
            raise CheckpointError(f"{folder} is damaged: {name} does not match its own digest.")
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{folder} has format {manifest['format']}; this lmlib reads format {FORMAT}.")
        for file, expected in manifest["files"].items():
            path = folder / Path(file).name
            if not path.is_file():
                raise CheckpointError(f"{folder} is damaged: {file} is missing.")
            if path.stat().st_size != expected["size"] or file_sha256(path) != expected["sha256"]:
                raise CheckpointError(f"{folder} is damaged: {file} is not the file that was saved.")
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no finished checkpoint: {name} is missing.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} is damaged: {name} cannot be read ({type(error).__name__}).") from None
    if (match := re.fullmatch(r"checkpoint_step_(\d+)", folder.name)) and int(match[1]) != manifest.get("step"):
        raise CheckpointError(f"{folder} is mixed up: it holds step {manifest.get('step')}.")
    return manifest


def verify_state(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint's training state, once it is whole and belongs to these weights."""
    weights, state = verify(folder), verify(folder / "training_state", "state.json")
    if (state.get("step"), state.get("model_sha256")) != (
        weights["step"],
        weights["files"]["model.safetensors"]["sha256"],
    ):
        raise CheckpointError(f"{folder} is mixed up: its training state belongs to other weights.")
    return state


def newest_good(run_dir: Path, with_state: bool = False) -> Path | None:
    """The newest checkpoint that verifies, with its training state if asked. Each one passed over is warned of.

    Returns None if there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, and none is good.
    """
    failures = []
    for step in reversed(checkpoint_steps(run_dir)):
        folder = run_dir / "checkpoints" / f"checkpoint_step_{step}"
        try:
            (verify_state if with_state else verify)(folder)
        except CheckpointError as error:
            failures.append(str(error))
            continue
        for failure in failures:
            warnings.warn(f"{failure} Falling back to step {step}.", stacklevel=2)
        return folder
    if failures:
        raise CheckpointError("No checkpoint can be used:\n" + "\n".join(f"  - {failure}" for failure in failures))
    return None


def find_checkpoint(path: str | Path, step: int | None = None) -> Path:
    """The model folder that `path` means: itself, or the checkpoint of a run (the newest good one if step is None).

    Raises:
        CheckpointError: there is none, the step is unknown (those there are get listed), or it is damaged.
    """
    folder = resolve_path(path)
    if not folder.exists():
        raise CheckpointError(f"There is no folder {path}. `python -m lmlib runs` lists the runs.")
    if (folder / "model.safetensors").exists() or (folder / "model.safetensors.index.json").exists():
        if step is not None:
            raise CheckpointError(f"{path} is one model, so step={step} means nothing; give the run's folder.")
        if (folder / "checkpoint.json").exists():
            verify(folder)
        return folder
    if not (folder / "checkpoints").is_dir():
        raise CheckpointError(f"{path} is neither a run with checkpoints nor a model folder.")
    steps = checkpoint_steps(folder)
    if step is not None and step not in steps:
        raise CheckpointError(f"{path} has no checkpoint of step {step}; it has: {', '.join(map(str, steps)) or 'none'}.")
    if step is None:
        found = newest_good(folder)
        if found is None:
            raise CheckpointError(f"{path} has no checkpoint yet.")
        return found
    found = folder / "checkpoints" / f"checkpoint_step_{step}"
    verify(found)
    return found


# ---------------------------------------------------------------------------------------------------
# Reading


def load(path: str | Path, step: int | None = None, device: str = "cpu") -> tuple[LanguageModel, Any]:
    """A model in float32 and evaluation mode, and its tokenizer.

    Args:
        path: a run's folder, a checkpoint, or a Hugging Face folder of a class that lmlib saves.
        step: which checkpoint of the run; None takes the newest that verifies.

    Raises:
        CheckpointError: nothing usable there, or the folder has settings that lmlib lacks (named).
    """
    folder = find_checkpoint(path, step)
    config = config_of(folder)
    model = load_weights(folder, config).to(device).eval()
    return model, load_tokenizer(str(folder))


def load_weights(folder: Path, config: RunConfig) -> LanguageModel:
    """A LanguageModel of `config` with the weights in `folder`; names and shapes are compared before memory is taken."""
    index = folder / "model.safetensors.index.json"
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else []
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{index} points outside its folder.")
        files = [safe_open(folder / name, "pt") for name in names or ["model.safetensors"]]
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"The weights in {folder} cannot be read: {error}") from error
    holder = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (no mapping)
    layers = {int(match[1]) for name in holder if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    if layers != set(range(config.num_hidden_layers)):
        raise CheckpointError(f"{folder} has weights of {len(layers)} layers where {config.num_hidden_layers} are meant.")

    with torch.device("meta"):
        model = LanguageModel(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    found = {name: tuple(file.get_slice(name).get_shape()) for name, file in holder.items() if name in expected}
    wrong = [f"{name}: {found.get(name, 'missing')}, not {shape}" for name, shape in expected.items() if found.get(name) != shape]
    wrong += [f"{name} is unknown" for name in holder.keys() - expected.keys() - {"lm_head.weight"}]
    if wrong:
        raise CheckpointError(f"The weights in {folder} do not fit its configuration: {'; '.join(wrong[:5])}.")
    tensors = {name: holder[name].get_tensor(name).float() for name in expected}
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def read_optimizer(folder: Path) -> dict[str, Tensor]:
    """The optimiser's tensors of a verified training state."""
    return load_file(folder / "training_state" / "optimizer.safetensors")


# What a stock configuration may say without changing the arithmetic of a dense model in evaluation mode.
_HARMLESS = {
    *("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "model_type", "use_cache"),
    *("initializer_range", "attention_dropout", "pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("max_position_embeddings", "first_k_dense_replace", "num_nextn_predict_layers", "num_mtp_layers"),
    *("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"),
    *("norm_topk_prob", "routed_scaling_factor", "output_router_logits", "head_dim", "qk_head_dim", "use_cache"),
    *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "id2label", "label2id"),
    *("problem_type", "is_encoder_decoder", "torchscript", "num_local_experts", "tokenizer_class", "task_specific_params"),
}


def config_of(folder: Path) -> RunConfig:
    """The model's part of a RunConfig, read from a Hugging Face folder's config.json.

    Raises:
        CheckpointError: the class is not one of ours, or a setting has a value that ours lacks.
    """
    import transformers

    try:
        stock = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        settings = stock.to_dict()
    except Exception as error:  # transformers raises whatever a strange config.json makes it stumble over
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error}") from error
    kinds = {"deepseek_v3": "mla", "llama": "mha"}
    if settings.get("model_type") not in kinds:
        raise CheckpointError(f"{folder} holds a {settings.get('model_type')} model; lmlib reads {', '.join(sorted(kinds))}.")
    attention = kinds[settings["model_type"]]
    if attention == "mla" and settings["first_k_dense_replace"] < settings["num_hidden_layers"]:
        raise CheckpointError(f"{folder} has layers of experts (first_k_dense_replace), which this lmlib lacks.")
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names += ["attention_bias", "tie_word_embeddings"]
    if attention == "mla":
        names += ["q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rope_interleave"]
    try:
        config = RunConfig(
            attention=attention,
            rope_theta=settings["rope_parameters"]["rope_theta"],
            sequence_length=settings["max_position_embeddings"],
            **{name: settings[name] for name in names},
        )
        ours = stock_config(config).to_dict()
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'} describes no model that lmlib has: {error}") from error
    lacking = [
        f"{name} = {value!r}"
        for name, value in settings.items()
        if name not in _HARMLESS and value is not None and ours.get(name) != value
    ]
    head_dim = settings.get("head_dim")
    if attention == "mha" and head_dim not in (None, config.hidden_size // config.num_attention_heads):
        lacking.append(f"head_dim = {head_dim}")
    if lacking:
        raise CheckpointError(f"{folder} has settings that lmlib lacks: {', '.join(sorted(lacking))}.")
    return config


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync_folder(folder: Path):
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
