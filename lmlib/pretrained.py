"""Hugging Face model folders: our configuration and weights as those of stock classes, and back."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmlib.config import RunConfig
from lmlib.model import LanguageModel


class CheckpointError(ValueError):
    """A checkpoint that is damaged, half-written, foreign or of a class that lmlib does not have."""


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
        stock = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
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


def model_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds: all parameters by name, a tied head once."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


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
    if len(layers) != config.num_hidden_layers or layers != set(range(len(layers))):
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
