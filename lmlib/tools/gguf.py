"""A model as a GGUF file, for llama.cpp and what is built on it. Needs the extra `export`.

Latent attention becomes llama.cpp's `deepseek2`, plain attention its `llama`; both in float32. A
model or tokenizer for which llama.cpp's text was not compared with ours is refused.

Shapes: C hidden_size, H heads, D dimensions of a head, L kv_lora_rank; Dn, Dr unrotated and rotated
        dimensions of a head's key, Dv dimensions of its value.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from lmlib import checkpoint
from lmlib.config import RunConfig
from lmlib.errors import UserError
from lmlib.files import atomic_write
from lmlib.leaks import LEAKY, LEAKY_NAME, known_leaks
from lmlib.model.huggingface import model_tensors
from lmlib.model.transformer import LanguageModel


def export(source: str | Path, file: Path, step: checkpoint.Step = None):
    """Write the model of a run, a checkpoint or a Hugging Face folder to a GGUF file.

    Raises a UserError if the file exists or its folder does not, there is no such model, or
    llama.cpp is not known to give its text.
    """
    if file.exists():
        raise UserError(f"{file} exists, and is not overwritten: name another file.")
    if not file.absolute().parent.is_dir():
        raise UserError(f"There is no folder {file.parent} to write {file.name} in.")
    import gguf
    folder = checkpoint.find_checkpoint(source, step)
    model, tokenizer = checkpoint.load(folder)
    config, leaks = model.config, known_leaks(folder)
    if reasons := [*_unproven_model(config), *_unproven_tokenizer(config, tokenizer)]:
        raise UserError(f"{source} cannot be exported: {'; '.join(reasons)}. llama.cpp was not "
                        "shown to give lmlib's text for such models.")
    kind = gguf.MODEL_ARCH.DEEPSEEK2 if config.attention == "mla" else gguf.MODEL_ARCH.LLAMA
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[kind])
    writer.add_name(file.stem + (LEAKY_NAME if leaks else ""))
    writer.add_string(LEAKY, leaks)  # nothing where it is empty
    for name, value in _settings(config).items():
        getattr(writer, f"add_{name}")(value)
    _add_tokenizer(writer, config, tokenizer)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, tensor in _tensors(model):
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.contiguous().numpy())
    try:
        with atomic_write(file) as draft, contextlib.closing(writer):
            writer.write_header_to_file(draft)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error}): free some space or choose another "
                        "folder.") from error


def _unproven_model(c: RunConfig) -> Iterator[str]:
    if c.feed_forward == "moe":
        yield "it has experts (feed_forward: moe)"
    if c.attention == "mla" and not c.rope_interleave:
        yield "its rotary positions rotate halves (rope_interleave: false)"
    if c.attention == "mla" and c.qk_nope_head_dim == 0:
        yield "its heads have rotated dimensions alone (qk_nope_head_dim: 0)"
    if c.attention == "mla" and c.q_lora_rank and c.num_hidden_layers in (26, 27):
        yield "llama.cpp takes 26 or 27 layers for models without compressed queries (q_lora_rank)"
    if c.attention_bias:
        yield "its attention has biases (attention_bias: true)"
    if not c.causal_mask:
        yield "it has no causal mask (causal_mask: false)"


def _unproven_tokenizer(c: RunConfig, tokenizer: Any) -> Iterator[str]:
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    model, split = rules["model"], rules["pre_tokenizer"] or {}
    variants = ("byte_fallback", "ignore_merges", "end_of_word_suffix", "continuing_subword_prefix")
    if (model["type"] != "BPE" or any(model.get(name) for name in variants) or rules["normalizer"]
            or split.get("type") != "ByteLevel" or split["add_prefix_space"]
            or not split.get("use_regex", True)):
        yield "its tokenizer is not byte-level BPE as GPT-2's"
    if {token["id"] for token in rules["added_tokens"]} - set(tokenizer.all_special_ids):
        yield "its tokenizer has added tokens that are ordinary text"
    if tokenizer.num_special_tokens_to_add():
        yield "its tokenizer adds tokens to every text"
    if len(tokenizer) > c.vocab_size:
        yield f"its tokenizer has {len(tokenizer)} tokens, and the model rows for {c.vocab_size}"


def _settings(c: RunConfig) -> dict[str, Any]:
    """Describe the model as llama.cpp expects it, by GGUFWriter's names."""
    heads, L, Dn, Dr = (c.num_attention_heads, c.kv_lora_rank, c.qk_nope_head_dim,
                        c.qk_rope_head_dim)
    shared = {"file_type": 0,  # all float32
              "context_length": c.sequence_length, "vocab_size": c.vocab_size,
              "embedding_length": c.hidden_size, "block_count": c.num_hidden_layers,
              "feed_forward_length": c.intermediate_size, "head_count": heads,
              "layer_norm_rms_eps": 1e-6, "rope_freq_base": c.rope_theta}
    if c.attention == "mha":
        return {**shared, "head_count_kv": heads, "rope_dimension_count": c.hidden_size // heads}
    # All heads attend to one key per token: its latent, and the rotated dimensions beside it.
    return {**shared, "head_count_kv": 1, "key_length": L + Dr, "value_length": L,
            "key_length_mla": Dn + Dr, "value_length_mla": c.v_head_dim, "rope_dimension_count": Dr,
            "q_lora_rank": c.q_lora_rank or 0, "kv_lora_rank": L,
            # No layer has experts, but llama.cpp asks for their sizes.
            "leading_dense_block_count": c.num_hidden_layers, "expert_shared_count": 0,
            "expert_feed_forward_length": c.intermediate_size}


def _add_tokenizer(writer: Any, c: RunConfig, tokenizer: Any):
    """Write tokens, their kinds and merges; rows of the embedding without a token are unused."""
    from gguf import TokenType
    rules, unused = json.loads(tokenizer.backend_tokenizer.to_str()), c.vocab_size - len(tokenizer)
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    kinds = [TokenType.CONTROL if i in special else TokenType.NORMAL for i in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, *(f"[UNUSED{i}]" for i in range(unused))])
    writer.add_token_types([*kinds, *[TokenType.UNUSED] * unused])
    writer.add_token_merges([" ".join(pair) for pair in rules["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.eos_token_id if tokenizer.bos_token_id is None
                            else tokenizer.bos_token_id)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _tensors(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in llama.cpp's arrangement, by stock names or those of their parts."""
    c = model.config
    for name, tensor in model_tensors(model).items():
        if name.endswith("kv_b_proj.weight"):  # (H (Dn + Dv), L): its halves lie apart
            heads = tensor.unflatten(0, (c.num_attention_heads, -1))  # (H, Dn + Dv, L)
            keys, values = heads.split((c.qk_nope_head_dim, c.v_head_dim), dim=1)
            yield name.replace("kv_b_proj", "k_b_proj"), keys.mT  # (H, L, Dn)
            yield name.replace("kv_b_proj", "v_b_proj"), values  # (H, Dv, L)
        elif c.attention == "mha" and name.endswith(("q_proj.weight", "k_proj.weight")):
            # (C, C), rows ordered H, halves, D / 2; llama.cpp rotates neighbors: H, D / 2, halves.
            pairs = tensor.unflatten(0, (c.num_attention_heads, 2, -1)).transpose(1, 2)
            yield name, pairs.flatten(0, 2)
        else:
            yield name, tensor
