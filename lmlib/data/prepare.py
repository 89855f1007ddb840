"""Documents -> token store on disk, built once for all runs with the same text and tokenizer.

A store is a folder with the tokenizer, train.bin, validation.bin and store.json.
"""

import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lmlib.config import RunConfig
from lmlib.data.corpus import corpus_files, split_documents
from lmlib.data.tokenizer import load_tokenizer, train_tokenizer
from lmlib.data.tokens import TokenStore
from lmlib.files import file_sha256, read_json, resolve_path, write_json

STORE_FORMAT = 1
FILES = {"training": "train.bin", "held-out": "validation.bin"}  # by their keys in store.json


def prepare(config: RunConfig, tokenizer: str | None = None) -> TokenStore:
    """Open the token store of a run under output_dir/.tokens; build it first if there is none.

    `tokenizer` (a folder or Hugging Face id) replaces `config.tokenizer`. Raises ValueError where
    the corpus or tokenizer cannot be used, or a split is shorter than one window.
    """
    tokenizer = tokenizer or config.tokenizer
    if tokenizer == "train" and (config.vocab_size or 0) < 257:
        raise ValueError(f"vocab_size is {config.vocab_size}; a tokenizer trained here needs 257 "
                         "or more: one for every byte, and the end-of-text token.")
    identity = store_identity(config, tokenizer)
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    folder = resolve_path(config.output_dir) / ".tokens" / key
    if not _is_complete(folder):
        _build(config, tokenizer, identity, folder)
    store = _open(config, folder)
    if store.vocab_size < len(store.tokenizer):
        raise ValueError(f"vocab_size {store.vocab_size} is less than the tokenizer's "
                         f"{len(store.tokenizer)} tokens; write that or more, or null.")
    for split, tokens, name in (("training", store.train, "training"),
                                ("held-out", store.validation, "validation")):
        if store.window_count(split == "held-out") < 1:
            raise ValueError(
                f"The {name} split of {config.corpus} has {len(tokens):,} tokens in "
                f"{store.info[split]['documents']} documents, less than one window of "
                f"sequence_length {config.sequence_length}: use more text, shorter windows, or "
                "another validation_fraction or validation_corpus.")
    return store


def store_identity(config: RunConfig, tokenizer: str) -> dict[str, Any]:
    """Return everything that determines a store's content; local files count by their SHA-256."""
    validation = 0.0 if config.split == "windows" else config.validation_fraction
    if config.validation_corpus:
        validation = _corpus_identity(config, config.validation_corpus)
    limits = [config.max_tokens, config.validation_windows * config.sequence_length]
    return {"format": STORE_FORMAT, "corpus": _corpus_identity(config, config.corpus),
            "text_column": config.text_column, "validation": validation,
            "tokenizer": _tokenizer_identity(config, tokenizer),
            "limits": limits if config.max_tokens else None}


def _corpus_identity(config: RunConfig, corpus: str) -> list[Any]:
    files = corpus_files(corpus)
    if files is None:
        return [corpus, config.corpus_config, config.corpus_split]
    contents = "".join(file.suffix + file_sha256(file) for file in files)
    return [len(files), hashlib.sha256(contents.encode()).hexdigest()]


def _tokenizer_identity(config: RunConfig, name: str) -> list[Any]:
    if name == "train":  # another version of the library may train another tokenizer
        import tokenizers
        return ["byte-level BPE", config.vocab_size, tokenizers.__version__]
    loaded = load_tokenizer(name)
    rules = loaded.backend_tokenizer.to_str().encode()
    return [hashlib.sha256(rules).hexdigest(), loaded.eos_token_id]


def _build(config: RunConfig, tokenizer_name: str, identity: dict[str, Any], folder: Path):
    """Write a draft beside `folder` and rename it; another run's store that came first is kept."""
    draft = folder.parent / f"{folder.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        if tokenizer_name == "train":
            training = (text for stream in split_documents(config)
                        for held_out, text in stream if not held_out)
            # 200 million characters are plenty for merges, and bound the memory.
            tokenizer = train_tokenizer(_up_to(200_000_000, training), config.vocab_size)
        else:
            tokenizer = load_tokenizer(tokenizer_name)
        draft.mkdir(parents=True)
        tokenizer.save_pretrained(draft)
        info = _write_tokens(config, tokenizer, draft)
        sha256 = {file.name: file_sha256(file) for file in sorted(draft.iterdir())}
        # Written last: a store without store.json is incomplete.
        write_json(draft / "store.json", {**info, "identity": identity, "sha256": sha256})
        if folder.exists() and not _is_complete(folder):
            shutil.rmtree(folder.rename(draft.with_suffix(".damaged")))
        try:
            draft.rename(folder)
        except OSError:
            if not _is_complete(folder):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _up_to(characters: int, texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


def _write_tokens(config: RunConfig, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Tokenize all documents into train.bin and validation.bin; return the counts."""
    tokenizer.backend_tokenizer.encode_special_tokens = True  # text that spells one stays text
    dtype = np.min_scalar_type(len(tokenizer) - 1)
    counts = {held_out: {"tokens": 0, "documents": 0, "bytes": 0} for held_out in (False, True)}
    limits = {False: config.max_tokens or sys.maxsize, True: sys.maxsize}
    # With max_tokens a stream is left as soon as each split has enough: it may have no end.
    evaluated = config.validation_windows * config.sequence_length + 1
    enough = {False: limits[False], True: evaluated if config.split == "documents" else 0}
    streams = split_documents(config)
    with open(folder / FILES["training"], "wb") as train, \
            open(folder / FILES["held-out"], "wb") as validation:
        for number, stream in enumerate(streams):
            splits = (False, True) if len(streams) == 1 else (bool(number),)
            while chunk := list(islice(stream, 64)):
                _write_chunk(chunk, tokenizer, limits, dtype, (train, validation), counts)
                if config.max_tokens and all(counts[s]["tokens"] >= enough[s] for s in splits):
                    break
        os.fsync(train.fileno())  # ndarray.tofile leaves nothing in Python's buffers
        os.fsync(validation.fileno())
    total = counts[False]["tokens"] + counts[True]["tokens"]
    if total == 0:
        raise ValueError(f"The corpus {config.corpus} holds no text.")
    return {"dtype": dtype.name, "training": counts[False], "held-out": counts[True],
            "held_out_share": counts[True]["tokens"] / total}


def _write_chunk(chunk: list[tuple[bool, str]], tokenizer: Any, limits: dict[bool, int],
                 dtype: np.dtype, files: tuple[BinaryIO, BinaryIO], counts: dict[bool, dict]):
    """Append documents to the file of their split, up to its limit of tokens."""
    chunk = [(held_out, text) for held_out, text in chunk
             if counts[held_out]["tokens"] < limits[held_out]]
    texts = [text for _, text in chunk]
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    for (held_out, text), encoding in zip(chunk, encoded, strict=True):
        count = counts[held_out]
        ids = [*encoding.ids, tokenizer.eos_token_id][: limits[held_out] - count["tokens"]]
        if ids:
            np.array(ids, dtype=dtype).tofile(files[held_out])
            count["tokens"] += len(ids)
            count["documents"] += 1
            count["bytes"] += len(text.encode("utf-8", "replace"))


def _is_complete(folder: Path) -> bool:
    """Check whether a store has its store.json, all its files, and all its tokens."""
    try:
        info = read_json(folder / "store.json")
        size = np.dtype(info["dtype"]).itemsize
        return all((folder / name).is_file() for name in info["sha256"]) and all(
            (folder / name).stat().st_size == info[split]["tokens"] * size
            for split, name in FILES.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _open(config: RunConfig, folder: Path) -> TokenStore:
    info = read_json(folder / "store.json")
    # An empty file cannot be memory-mapped.
    train, held_out = (np.memmap(folder / name, info["dtype"], "r") if info[split]["tokens"] else
                       np.empty(0, info["dtype"]) for split, name in FILES.items())
    validation = train if config.split == "windows" else held_out
    return TokenStore(config, folder, train, validation, load_tokenizer(str(folder)), info)
