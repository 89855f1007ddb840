"""From documents to batches: tokenizer, token store, batch(step).

The tokens of each side, every document followed by the end-of-text token, lie in one memory-mapped array. Window i of T tokens
is tokens[i * T : i * T + T + 1]: inputs and, one further, their targets.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmlib.config import RunConfig, resolve_path
from lmlib.corpus import corpus_files, sided_documents

END_OF_TEXT = "<|endoftext|>"
STORE_FORMAT = 1
SPLIT = 2**32 - 1  # no epoch's number


# ---------------------------------------------------------------------------------------------------
# Documents -> tokenizer


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


# ---------------------------------------------------------------------------------------------------
# Tokens -> store -> batches


@dataclass(frozen=True)
class TokenStore:
    """The tokens of a run, memory-mapped, and how to draw from them.

    `info` is store.json: counts of tokens, documents and bytes on each side, and the sha256 of every file.
    """

    config: RunConfig
    folder: Path
    train: np.ndarray  # (tokens,) uint8, uint16 or uint32
    validation: np.ndarray
    tokenizer: Any
    info: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        """Embedding rows: what was asked, or the tokenizer's size."""
        return self.config.vocab_size or len(self.tokenizer)

    def describe(self) -> str:
        """The two sides in a few lines of text."""
        lines = [f"{self.config.corpus}, in tokens of a vocabulary of {len(self.tokenizer):,}"]
        for side in ("training", "held-out"):
            count = self.info[side]
            lines.append(
                f"{side:>9}: {count['documents']:>9,} documents {count['bytes']:>15,} bytes {count['tokens']:>13,} tokens"
            )
        return "\n".join([*lines, f"{self.info['held_out_share']:.1%} of the tokens are held out."])

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of update `step` (1, 2, ...): two (batch_size, sequence_length) int64.

        Each epoch takes every window once, in an order that (seed, epoch) decides; the cost does not grow with
        the step, so resuming at any step needs no other state.
        """
        rows = windows(self.train, self.starts(self.drawn(step)), self.config.sequence_length)
        return rows[:, :-1], rows[:, 1:]

    def drawn(self, step: int) -> np.ndarray:
        """The numbers of the windows in that batch: (batch_size,)."""
        c = self.config
        count = self.window_count()
        epochs, draws = np.divmod(np.arange((step - 1) * c.batch_size, step * c.batch_size), count)
        return np.concatenate([permute(draws[epochs == e], count, c.seed, e) for e in np.unique(epochs)])

    def validation_windows(self) -> Tensor:
        """The held-out windows of every evaluation, drawn once by the seed: (W, sequence_length + 1) int64."""
        c = self.config
        count = self.window_count(held_out=True)
        drawn = permute(np.arange(min(c.validation_windows, count)), count, c.seed, 0)
        return windows(self.validation, sorted(self.starts(drawn, held_out=True)), c.sequence_length)

    def texts(self, held_out: bool) -> list[str]:
        """The documents of a side, as text again; with `split: windows` both sides are the same."""
        tokens, end = np.asarray(self.validation if held_out else self.train), self.tokenizer.eos_token_id
        documents = np.split(tokens, np.flatnonzero(tokens == end) + 1)
        return [self.tokenizer.decode(ids[ids != end].tolist()) for ids in documents if len(ids)]

    def window_count(self, held_out: bool = False) -> int:
        """Whole windows on a side."""
        c = self.config
        if c.split == "documents":
            return window_count(self.validation if held_out else self.train, c.sequence_length)
        count = max(0, len(self.train) - c.sequence_length)  # one beginning at each token
        share = round(count * c.validation_fraction)
        return share if held_out else count - share

    def starts(self, numbers: np.ndarray, held_out: bool = False) -> np.ndarray:
        """The tokens at which the windows with these numbers begin; with `split: windows`, any token of the one text, and
        chance alone decides which window is called held out (SPLIT in place of an epoch)."""
        c = self.config
        if c.split == "documents":
            return numbers * c.sequence_length
        training = self.window_count()
        numbers = numbers + training if held_out else numbers
        return permute(numbers, training + self.window_count(held_out=True), c.seed, SPLIT)


def window_count(tokens: np.ndarray, sequence_length: int) -> int:
    """Whole windows in `tokens`; each needs one token more, its last target."""
    return max(0, (len(tokens) - 1) // sequence_length)


def windows(tokens: np.ndarray, starts: Iterable[int], sequence_length: int) -> Tensor:
    """The windows that begin at these tokens: (W, sequence_length + 1) int64."""
    rows = [tokens[start : start + sequence_length + 1] for start in starts]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def permute(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Where a pseudo-random permutation of range(size), fixed by (seed, epoch), takes each index: (n,) -> (n,).

    A Feistel network over the next power of four, walked until the value falls inside the range, costs
    the same for any size and needs no table (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(bits)) - 1)
    keys = np.random.SeedSequence([seed, int(epoch)]).generate_state(8, np.uint64)
    values, outside = index.astype(np.uint64), np.ones(len(index), dtype=bool)
    while outside.any():
        left, right = values[outside] >> bits, values[outside] & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)  # multiply and fold, as splitmix64 does
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(29))) & mask)
        values[outside] = (left << bits) | right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def prepare(config: RunConfig, tokenizer: str | None = None) -> TokenStore:
    """The token store of a run, built if no run before built the same, under output_dir/.tokens.

    Args:
        tokenizer: folder or Hugging Face id that replaces `config.tokenizer`.

    Raises:
        ValueError: the corpus or tokenizer cannot be used, or a side is shorter than one window.
    """
    tokenizer = tokenizer or config.tokenizer
    if tokenizer == "train" and (config.vocab_size or 0) < 257:
        raise ValueError(
            f"vocab_size is {config.vocab_size}; a tokenizer trained here needs 257 or more (every byte, and the end of a text)."
        )
    identity = store_identity(config, tokenizer)
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    folder = resolve_path(config.output_dir) / ".tokens" / key
    if not _complete(folder):
        _build(config, tokenizer, identity, folder)
    store = _open(config, folder)

    if store.vocab_size < len(store.tokenizer):
        raise ValueError(
            f"vocab_size {store.vocab_size} is less than the tokenizer's {len(store.tokenizer)} tokens; "
            "write that or more, or null."
        )
    for side, tokens in (("training", store.train), ("held-out", store.validation)):
        if store.window_count(side == "held-out") < 1:
            raise ValueError(
                f"The {side} side of {config.corpus} has {len(tokens):,} tokens in "
                f"{store.info[side]['documents']} documents, less than one window of sequence_length "
                f"{config.sequence_length}: use more text, shorter windows, or another validation_fraction "
                "or validation_corpus."
            )
    return store


def store_identity(config: RunConfig, tokenizer: str) -> dict[str, Any]:
    """Everything that determines a store's content; local files count by their sha256."""
    import tokenizers

    def source(corpus: str) -> Any:
        files = corpus_files(corpus)
        if files is None:
            return [corpus, config.corpus_config, config.corpus_split]
        return [len(files), hashlib.sha256("".join(file.suffix + file_sha256(file) for file in files).encode()).hexdigest()]

    def maker() -> Any:
        if tokenizer == "train":
            return ["byte-level BPE", config.vocab_size, tokenizers.__version__]
        loaded = load_tokenizer(tokenizer)
        return [hashlib.sha256(loaded.backend_tokenizer.to_str().encode()).hexdigest(), loaded.eos_token_id]

    held_out_share = 0.0 if config.split == "windows" else config.validation_fraction
    return {
        "format": STORE_FORMAT,
        "corpus": source(config.corpus),
        "text_column": config.text_column,
        "validation": source(config.validation_corpus) if config.validation_corpus else held_out_share,
        "tokenizer": maker(),
        "limits": [config.max_tokens, config.validation_windows * config.sequence_length] if config.max_tokens else None,
    }


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(config: RunConfig, tokenizer_name: str, identity: dict, folder: Path):
    """Write the store beside its place and rename it there; if another run was faster, keep that one's."""
    draft = folder.parent / f"{folder.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        if tokenizer_name == "train":
            training = (text for stream in sided_documents(config) for held_out, text in stream if not held_out)
            tokenizer = train_tokenizer(_up_to(training, characters=200_000_000), config.vocab_size)
        else:
            tokenizer = load_tokenizer(tokenizer_name)
        draft.mkdir(parents=True)
        tokenizer.save_pretrained(draft)
        info = _write_tokens(config, tokenizer, draft)
        info["identity"] = identity
        info["sha256"] = {file.name: file_sha256(file) for file in sorted(draft.iterdir())}
        with open(draft / "store.json", "w") as file:
            json.dump(info, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        if folder.exists() and not _complete(folder):
            folder.rename(draft.with_suffix(".damaged"))
            shutil.rmtree(draft.with_suffix(".damaged"))
        try:
            draft.rename(folder)
        except OSError:
            if not _complete(folder):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _up_to(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


def _write_tokens(config: RunConfig, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Tokenise document by document into train.bin and validation.bin; returns the counts of store.json."""
    dtype = np.dtype(next(t for t in (np.uint8, np.uint16, np.uint32) if len(tokenizer) - 1 <= np.iinfo(t).max))
    tokenizer.backend_tokenizer.encode_special_tokens = True  # text that spells a special token stays text
    limit = {False: config.max_tokens, True: None}
    counts = {side: {"tokens": 0, "documents": 0, "bytes": 0} for side in (False, True)}
    needed = config.validation_windows * config.sequence_length + 1 if config.split == "documents" else 0
    streams = sided_documents(config)
    with open(folder / "train.bin", "wb") as train, open(folder / "validation.bin", "wb") as validation:
        files = {False: train, True: validation}
        for number, stream in enumerate(streams):
            awaited = (False, True) if len(streams) == 1 else (bool(number),)
            while chunk := list(islice(stream, 64)):
                wanted = [(side, text) for side, text in chunk if limit[side] is None or counts[side]["tokens"] < limit[side]]
                encoded = tokenizer.backend_tokenizer.encode_batch_fast([t for _, t in wanted], add_special_tokens=False)
                for (side, text), encoding in zip(wanted, encoded, strict=True):
                    count, ids = counts[side], [*encoding.ids, tokenizer.eos_token_id]
                    if limit[side] is not None:
                        ids = ids[: limit[side] - count["tokens"]]
                    if ids:
                        np.array(ids, dtype=dtype).tofile(files[side])
                        count["tokens"] += len(ids)
                        count["documents"] += 1
                        count["bytes"] += len(text.encode("utf-8", "replace"))
                enough = {False: config.max_tokens, True: needed}
                if config.max_tokens and all(counts[side]["tokens"] >= enough[side] for side in awaited):
                    break  # a stream may have no end
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    tokenizer.backend_tokenizer.encode_special_tokens = False
    total = counts[False]["tokens"] + counts[True]["tokens"]
    if total == 0:
        raise ValueError(f"The corpus {config.corpus} holds no text.")
    return {
        "dtype": dtype.name,
        "training": counts[False],
        "held-out": counts[True],
        "held_out_share": counts[True]["tokens"] / total,
    }


def _complete(folder: Path) -> bool:
    """Whether a store stands there with all its tokens; store.json is written last."""
    try:
        info = json.loads((folder / "store.json").read_text())
        size = np.dtype(info["dtype"]).itemsize
        return all((folder / file).is_file() for file in info["sha256"]) and all(
            (folder / file).stat().st_size == info[side]["tokens"] * size
            for file, side in (("train.bin", "training"), ("validation.bin", "held-out"))
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _open(config: RunConfig, folder: Path) -> TokenStore:
    info = json.loads((folder / "store.json").read_text())

    def tokens(name: str, count: int) -> np.ndarray:  # an empty file cannot be mapped
        return np.memmap(folder / name, info["dtype"], "r") if count else np.empty(0, info["dtype"])

    train, validation = tokens("train.bin", info["training"]["tokens"]), tokens("validation.bin", info["held-out"]["tokens"])
    return TokenStore(
        config=config,
        folder=folder,
        train=train,
        validation=train if config.split == "windows" else validation,
        tokenizer=load_tokenizer(str(folder)),
        info=info,
    )
