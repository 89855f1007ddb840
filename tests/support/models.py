"""Model folders with random weights, whose text depends on every one of them."""

from pathlib import Path
from typing import Any

import torch

from lmlib.config import RunConfig
from lmlib.data.tokenizer import train_tokenizer
from lmlib.model.huggingface import model_tensors, save_model
from lmlib.model.transformer import LanguageModel

SMALL = {
    "vocab_size": 320,
    "sequence_length": 64,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 20,
}


def write_model(
    folder: Path, text: str, tokenizer: Any = None, leaks: str = "", **parameters
) -> Path:
    """Write a model with a tokenizer that is trained on `text`; returns its folder."""
    model = LanguageModel(RunConfig(**{**SMALL, **parameters}))
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5, generator=draw)
        else:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5, generator=draw)
    tokenizer = tokenizer or train_tokenizer([text], 300)
    folder.mkdir()
    save_model(folder, model_tensors(model), model.config, tokenizer, leaks)
    return folder
