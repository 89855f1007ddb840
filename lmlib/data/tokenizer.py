"""Documents -> tokenizer, and what its tokens stand for."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lmlib.files import resolve_path

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Byte-level BPE of up to `vocab_size` tokens, the end-of-text token among them."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def load_tokenizer(name: str) -> Any:
    """The tokenizer in a folder or of a Hugging Face id.

    Raises:
        ValueError: there is none, or it has no end-of-text token to put between documents.
    """
    import transformers

    folder = resolve_path(name)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder if folder.is_dir() else name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"The tokenizer {name} cannot be loaded from a folder or from Hugging Face: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer {name} has no end-of-text token (eos_token) to put between documents.")
    return tokenizer


def token_bytes(tokenizer: Any, vocab_size: int) -> Tensor:
    """UTF-8 bytes of the text each token stands for, 0 for special tokens and unused rows: (vocab_size,) int64."""
    sizes = torch.zeros(vocab_size, dtype=torch.int64)
    special = set(tokenizer.all_special_ids)
    decoder = tokenizer.backend_tokenizer.decoder
    byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
    anchor = tokenizer.convert_ids_to_tokens(next(i for i in range(len(tokenizer)) if i not in special))
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if i in special or token is None:
            continue
        if byte_level:  # its alphabet has one character a byte
            sizes[i] = len(token)
        elif token.startswith("<0x"):
            sizes[i] = 1
        else:  # some decoders strip a leading space, so put the token behind another
            pair, alone = (tokenizer.convert_tokens_to_string(ts) for ts in ([anchor, token], [anchor]))
            sizes[i] = len(pair.encode()) - len(alone.encode())
    return sizes
