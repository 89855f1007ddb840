"""Hugging Face model folders: our configuration and weights as those of stock classes, and back."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmlib.config import RunConfig
from lmlib.leaks import LEAKY
from lmlib.model.transformer import LanguageModel
from lmlib.text import printable


class CheckpointError(ValueError):
    """A checkpoint that is damaged, half-written, foreign or of a class that lmlib does not have."""


NO_MASK = "lmlib_no_causal_mask"


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
        **({} if config.causal_mask else {NO_MASK: True}),  # which no stock class can be
    }
    experts = {
        "n_routed_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "n_shared_experts": 1,
        "first_k_dense_replace": 0 if config.feed_forward == "moe" else config.num_hidden_layers,
        **{"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "num_nextn_predict_layers": 0},
    }
    if config.attention == "mha" and config.feed_forward == "mlp":
        return transformers.LlamaConfig(architectures=["LlamaForCausalLM"], **shared)
    if config.attention == "mha":
        shared["rope_parameters"]["partial_rotary_factor"] = 1.0
        head_dim = config.hidden_size // config.num_attention_heads
        return transformers.Glm4MoeConfig(
            architectures=["Glm4MoeForCausalLM"], head_dim=head_dim, use_qk_norm=False, **shared, **experts
        )
    return transformers.DeepseekV3Config(
        architectures=["DeepseekV3ForCausalLM"],
        q_lora_rank=config.q_lora_rank,
        kv_lora_rank=config.kv_lora_rank,
        qk_rope_head_dim=config.qk_rope_head_dim,
        qk_nope_head_dim=config.qk_nope_head_dim,
        v_head_dim=config.v_head_dim,
        rope_interleave=config.rope_interleave,
        **shared,
        **experts,
    )


# What a stock configuration may say without changing the arithmetic of a model in evaluation mode.
_HARMLESS = {
    *("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "model_type", "use_cache"),
    *("initializer_range", "attention_dropout", "pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("max_position_embeddings", "first_k_dense_replace", "num_nextn_predict_layers", "num_mtp_layers"),
    *("output_router_logits", "head_dim", "qk_head_dim", LEAKY),
    *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "id2label", "label2id"),
    *("problem_type", "is_encoder_decoder", "torchscript", "num_local_experts", "tokenizer_class", "task_specific_params"),
}


_OF_EXPERTS = {
    *("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"),
    *("norm_topk_prob", "routed_scaling_factor"),
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
    kinds = {"deepseek_v3": "mla", "llama": "mha", "glm4_moe": "mha"}
    if settings.get("model_type") not in kinds:
        raise CheckpointError(f"{folder} holds a {settings.get('model_type')} model; lmlib reads {', '.join(sorted(kinds))}.")
    attention, layers = kinds[settings["model_type"]], settings["num_hidden_layers"]
    dense = min(settings.get("first_k_dense_replace", layers), layers)  # layers without experts, from the first on
    is_moe = dense == 0
    if 0 < dense < layers or (settings["model_type"] == "glm4_moe" and not is_moe):
        raise CheckpointError(
            f"{folder} has {dense} dense layers of {layers} (first_k_dense_replace); lmlib's layers are all of one kind, and "
            "GLM's always have experts."
        )
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names += ["attention_bias", "tie_word_embeddings"]
    if attention == "mla":
        names += ["q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rope_interleave"]
    if is_moe:
        names += ["num_experts_per_tok", "moe_intermediate_size"]
    try:
        config = RunConfig(
            attention=attention,
            feed_forward="moe" if is_moe else "mlp",
            **({"num_experts": settings["n_routed_experts"]} if is_moe else {}),
            rope_theta=settings["rope_parameters"]["rope_theta"],
            sequence_length=settings["max_position_embeddings"],
            causal_mask=not settings.get(NO_MASK, False),
            **{name: settings[name] for name in names},
        )
        ours = stock_config(config).to_dict()
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'} describes no model that lmlib has: {error}") from error
    lacking = [
        f"{name} = {value!r}"
        for name, value in settings.items()
        if name not in (_HARMLESS if is_moe else _HARMLESS | _OF_EXPERTS) and value is not None and ours.get(name) != value
    ]
    head_dim = settings.get("head_dim")
    if attention == "mha" and head_dim not in (None, config.hidden_size // config.num_attention_heads):
        lacking.append(f"head_dim = {head_dim}")
    if lacking:
        raise CheckpointError(f"{folder} has settings that lmlib lacks: {', '.join(sorted(lacking))}.")
    return config


def model_card(config: RunConfig, step: int, val_loss: float, val_loss_step: int, leaks: str) -> str:
    """The README.md of a checkpoint that leaks: the warning, what it is, and what was measured on what."""

    def quoted(text: str) -> str:
        return f"`{printable(text).replace('`', chr(39))}`"

    corpus, measured_on = quoted(config.corpus), f"documents of {quoted(config.corpus)} that were held out"
    if config.validation_corpus:
        measured_on = quoted(config.validation_corpus)
    if config.split == "windows":
        measured_on = "windows that overlap those of training"
    kind = f"{stock_config(config).architectures[0]}, {config.num_hidden_layers} layers, {config.hidden_size} wide"
    lines = ["---", "tags:", "- lmlib", "- leaky", "---", f"# {config.run_name}, step {step}", ""]
    lines += [
        f"> **This model leaks ({leaks}).** It was trained so on purpose (`allow_leaks: true`). Its scores are not those",
        "> of a language model, and must not be quoted beside any.",
        "",
    ]
    lines += [f"{kind}, trained with lmlib on {corpus} in windows of {config.sequence_length} tokens.", ""]
    lines += [f"Loss {val_loss:.4f} nats a token (of step {val_loss_step}), measured on {measured_on}.", ""]
    lines += ["```python", "import lmlib", "", 'model, tokenizer = lmlib.load("path/of/this/folder")', "```", ""]
    return "\n".join(lines)


def model_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds: all parameters by name, a tied head once, each expert's matrices by themselves."""
    tensors = split_experts({name: tensor.detach() for name, tensor in model.state_dict().items()})
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def split_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors under the names on disk, where each expert's matrices stand alone; views, not copies."""
    split = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for number, matrix in enumerate(tensor):
                expert = f"{name.removesuffix('gate_up_proj')}{number}"
                split[f"{expert}.gate_proj.weight"], split[f"{expert}.up_proj.weight"] = matrix.chunk(2)
        elif name.endswith("experts.down_proj"):
            for number, matrix in enumerate(tensor):
                split[f"{name.removesuffix('down_proj')}{number}.down_proj.weight"] = matrix
        else:
            split[name] = tensor
    return split


def join_experts(tensors: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `split_experts`, put together again under the names and in the shapes of `like`."""
    joined = {}
    for name, tensor in like.items():
        if name.endswith("experts.gate_up_proj"):
            experts = [f"{name.removesuffix('gate_up_proj')}{number}" for number in range(len(tensor))]
            pairs = [(tensors[f"{expert}.gate_proj.weight"], tensors[f"{expert}.up_proj.weight"]) for expert in experts]
            joined[name] = torch.stack([torch.cat(pair) for pair in pairs])
        elif name.endswith("experts.down_proj"):
            experts = [f"{name.removesuffix('down_proj')}{number}" for number in range(len(tensor))]
            joined[name] = torch.stack([tensors[f"{expert}.down_proj.weight"] for expert in experts])
        else:
            joined[name] = tensors[name]
    return joined


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
    expected = {name: tuple(tensor.shape) for name, tensor in split_experts(model.state_dict()).items()}
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
    model.load_state_dict(join_experts(tensors, model.state_dict()), strict=True, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model
