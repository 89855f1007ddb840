"""Documents -> tokenizer, and how many bytes of text each token stands for."""

import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lmlib.errors import UserError
from lmlib.files import json_sha256, resolve_path

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Train byte-level BPE of up to `vocab_size` tokens, the end-of-text token included."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # all bytes, so that no text is unknown
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT],
                                  initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer in a folder or of a Hugging Face id; ValueError if it is unusable."""
    import transformers
    source = resolve_path(name) if resolve_path(name).is_dir() else name
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"The tokenizer {name} cannot be loaded from a folder or from "
                        f"Hugging Face: {error}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"The tokenizer {name} has no end-of-text token (eos_token), which must "
                        "end each document.")
    return tokenizer


def tokenizer_identity(tokenizer: Any) -> str:
    """Hash what a tokenizer does: its rules and its end-of-text token, wherever its files lie."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {**backend, "truncation": None, "padding": None}  # settings of a call
    return json_sha256([rules, tokenizer.eos_token_id])


def token_bytes(tokenizer: Any, vocab_size: int) -> Tensor:
    """Count the UTF-8 bytes of each token's text, 0 for special and unused ids: (vocab_size,)."""
    sizes, special = torch.zeros(vocab_size, dtype=torch.int64), set(tokenizer.all_special_ids)
    decoder = tokenizer.backend_tokenizer.decoder
    byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    ordinary = {i: t for i, t in enumerate(tokens) if i not in special and t is not None}
    # Some decoders strip a leading space, so each token is decoded after another one.
    anchor = next(iter(ordinary.values()))
    anchor_bytes = len(tokenizer.convert_tokens_to_string([anchor]).encode())
    for i, token in ordinary.items():
        if byte_level:  # one character of its alphabet stands for one byte
            sizes[i] = len(token)
        elif token.startswith("<0x"):  # a byte that has no token of its own
            sizes[i] = 1
        else:
            pair = tokenizer.convert_tokens_to_string([anchor, token])
            sizes[i] = len(pair.encode()) - anchor_bytes
    return sizes
