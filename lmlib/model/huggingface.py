"""Hugging Face model folders: our configuration and weights as those of stock classes, and back."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lmlib.config import MLA_ONLY, MLP_ONLY, MODEL, MOE_ONLY, RunConfig
from lmlib.errors import UserError
from lmlib.files import write_json
from lmlib.leaks import LEAKY
from lmlib.model.transformer import LanguageModel

NO_MASK = "lmlib_no_causal_mask"  # a setting of ours: no stock class can do without the mask

# Model parameters that a stock configuration holds in another form; the others keep their names.
_TRANSLATED = {"attention", "feed_forward", "rope_theta", "causal_mask", "num_experts"}
# Our stacked expert matrices, and the stock classes' matrices of one expert.
_STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# Settings of a stock configuration that change no output of a model in evaluation mode, or that
# are checked apart from the others.
_IGNORED = {
    "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "dtype",
    "chunk_size_feed_forward", "eos_token_id", "first_k_dense_replace", "head_dim", "id2label",
    "initializer_range", "is_encoder_decoder", "label2id", LEAKY, "max_position_embeddings",
    "model_type", "num_local_experts", "num_mtp_layers", "num_nextn_predict_layers",
    "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id",
    "pretraining_tp", "problem_type", "qk_head_dim", "return_dict", "task_specific_params",
    "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "use_cache"}


class CheckpointError(UserError):
    """A checkpoint that is corrupted, incomplete or of a model that lmlib does not support."""


def stock_config(config: RunConfig, tokenizer: Any = None) -> Any:
    """Return the transformers configuration of the stock class with our names and arithmetic."""
    import transformers
    token_ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    shared = {
        **_same_names(config, MODEL + MLP_ONLY), "num_key_value_heads": config.num_attention_heads,
        "max_position_embeddings": config.sequence_length, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "dtype": "float32", **{name: getattr(tokenizer, name, None) for name in token_ids}}
    if not config.causal_mask:
        shared[NO_MASK] = True
    if config.attention == "mla":
        return transformers.DeepseekV3Config(
            architectures=["DeepseekV3ForCausalLM"], **_same_names(config, MLA_ONLY),
            **_expert_settings(config), **shared)
    if config.feed_forward == "mlp":
        return transformers.LlamaConfig(architectures=["LlamaForCausalLM"], **shared)
    shared["rope_parameters"]["partial_rotary_factor"] = 1.0
    head_dim = config.hidden_size // config.num_attention_heads
    return transformers.Glm4MoeConfig(
        architectures=["Glm4MoeForCausalLM"], use_qk_norm=False, head_dim=head_dim,
        **_expert_settings(config), **shared)


def _same_names(config: RunConfig, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names if name not in _TRANSLATED}


def _expert_settings(config: RunConfig) -> dict[str, Any]:
    dense_layers = config.num_hidden_layers if config.feed_forward == "mlp" else 0
    return {**_same_names(config, MOE_ONLY), "n_routed_experts": config.num_experts,
            "n_shared_experts": 1, "first_k_dense_replace": dense_layers,
            "num_nextn_predict_layers": 0, "n_group": 1, "topk_group": 1,  # no groups of experts
            "norm_topk_prob": True, "routed_scaling_factor": 1.0}


def read_config(folder: Path) -> RunConfig:
    """Read a model's parameters from its config.json; CheckpointError if lmlib lacks a setting."""
    import transformers
    file = folder / "config.json"
    try:
        settings = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False).to_dict()
    except Exception as error:  # a corrupted config.json makes transformers raise almost anything
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    attention, feed_forward = _kind(folder, settings)
    mla, moe = attention == "mla", feed_forward == "moe"
    names = {*MODEL, *MLP_ONLY, *(MLA_ONLY if mla else ()), *(MOE_ONLY if moe else ())}
    try:
        config = RunConfig(
            attention=attention, feed_forward=feed_forward,
            rope_theta=settings["rope_parameters"]["rope_theta"],
            sequence_length=settings["max_position_embeddings"],
            causal_mask=not settings.get(NO_MASK, False),
            **({"num_experts": settings["n_routed_experts"]} if moe else {}),
            **{name: settings[name] for name in names - _TRANSLATED})
        ours = stock_config(config).to_dict()
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} describes no model that lmlib supports: {error}") from error
    ignored = _IGNORED if moe else _IGNORED | _expert_settings(config).keys()
    unsupported = [f"{name} = {value!r}" for name, value in settings.items()
                   if name not in ignored and value is not None and ours.get(name) != value]
    head_dim = config.hidden_size // config.num_attention_heads
    if not mla and settings.get("head_dim") not in (None, head_dim):
        unsupported.append(f"head_dim = {settings['head_dim']}")
    if unsupported:
        names = ", ".join(sorted(unsupported))
        raise CheckpointError(f"{folder} has settings that lmlib does not support: {names}.")
    return config


def _kind(folder: Path, settings: dict[str, Any]) -> tuple[str, str]:
    """Return a stock model's `attention` and `feed_forward`."""
    model_type = settings.get("model_type")
    attentions = {"deepseek_v3": "mla", "glm4_moe": "mha", "llama": "mha"}
    if model_type not in attentions:
        names = ", ".join(attentions)
        raise CheckpointError(f"{folder} holds a {model_type} model; lmlib reads {names}.")
    layers = settings["num_hidden_layers"]
    dense = min(settings.get("first_k_dense_replace", layers), layers)
    if 0 < dense < layers or (model_type == "glm4_moe" and dense > 0):
        raise CheckpointError(
            f"{folder} has {dense} dense layers of {layers} (first_k_dense_replace); in lmlib all "
            "layers are of one kind, and those of GLM have experts.")
    return attentions[model_type], "moe" if dense == 0 else "mlp"


def save_model(folder: Path, weights: dict[str, Tensor], config: RunConfig, tokenizer: Any,
               leaks: str = ""):
    """Write a model folder: weights, which lie in host memory, configurations and tokenizer."""
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    stock = stock_config(config, tokenizer)
    if leaks:
        setattr(stock, LEAKY, leaks)
    stock.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special = {name: getattr(tokenizer, name) for name in names}
    write_json(folder / "generation_config.json",
               {name: token for name, token in special.items() if token is not None})


def model_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by their stock names, a tied head once."""
    tensors = _split_experts({name: t.detach() for name, t in model.state_dict().items()})
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def _expert_names(name: str, tensor: Tensor) -> list[list[str]]:
    """List the stock names of each expert's matrices in a stack; [] for any other tensor."""
    experts, _, stack = name.rpartition(".")
    return [[f"{experts}.{e}.{part}.weight" for part in _STACKS[stack]]
            for e in range(len(tensor) if stack in _STACKS else 0)]


def _split_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split stacked experts into the matrices of each, as the files have them; views, no copies."""
    split = {}
    for name, tensor in tensors.items():
        experts = _expert_names(name, tensor)
        if not experts:
            split[name] = tensor
        for e, names in enumerate(experts):
            split.update(zip(names, tensor[e].chunk(len(names)), strict=True))
    return split


def _join_experts(tensors: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `_split_experts`: stack experts into the names and shapes of `like`."""
    def joined(experts: list[list[str]]) -> Tensor:
        return torch.stack([torch.cat([tensors[name] for name in names]) for names in experts])

    experts = {name: _expert_names(name, tensor) for name, tensor in like.items()}
    return {name: joined(names) if names else tensors[name] for name, names in experts.items()}


def load_weights(folder: Path, config: RunConfig) -> LanguageModel:
    """Load the weights in `folder` in float32; CheckpointError if they do not match `config`."""
    files = _open_weights(folder)
    layers = {int(m[1]) for name in files if (m := re.match(r"model\.layers\.(\d+)\.", name))}
    # Checked first: a corrupted number of layers could take all memory even on the meta device.
    if len(layers) != config.num_hidden_layers or layers != set(range(len(layers))):
        raise CheckpointError(f"The weights in {folder} have {len(layers)} layers, "
                              f"but its configuration {config.num_hidden_layers}.")
    with torch.device("meta"):  # names and shapes are compared before any memory is taken
        model = LanguageModel(config)
    expected = {name: [*tensor.shape] for name, tensor in model_tensors(model).items()}
    found = {name: file.get_slice(name).get_shape() for name, file in files.items()}
    wrong = [f"{name}: {found.get(name, 'missing')}, not {shape}"
             for name, shape in expected.items() if found.get(name) != shape]
    wrong += [f"{name} is unknown" for name in files.keys() - expected.keys() - {"lm_head.weight"}]
    if wrong:
        first = "; ".join(wrong[:5])
        raise CheckpointError(f"The weights in {folder} do not match its configuration: {first}.")
    tensors = {name: files[name].get_tensor(name).float() for name in expected}
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])  # a tied head
    model.load_state_dict(_join_experts(tensors, model.state_dict()), assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def _open_weights(folder: Path) -> dict[str, Any]:
    """Map each tensor's name to the open safetensors file that holds it."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    try:
        if index.exists() and not (folder / names[0]).exists():  # as transformers decides
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{index} points outside its folder.")
        files = [safe_open(folder / name, "pt") for name in names]
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"The weights in {folder} cannot be read: {error}") from error
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118 (no mapping)
