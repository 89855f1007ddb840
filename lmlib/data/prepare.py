"""Documents -> token store on disk, built once."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lmlib.config import RunConfig
from lmlib.data.corpus import corpus_files, split_documents
from lmlib.data.tokenizer import load_tokenizer, train_tokenizer
from lmlib.data.tokens import TokenStore
from lmlib.files import file_sha256, resolve_path

STORE_FORMAT = 1


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


def _build(config: RunConfig, tokenizer_name: str, identity: dict, folder: Path):
    """Write the store beside its place and rename it there; if another run was faster, keep that one's."""
    draft = folder.parent / f"{folder.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        if tokenizer_name == "train":
            training = (text for stream in split_documents(config) for held_out, text in stream if not held_out)
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
    streams = split_documents(config)
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
