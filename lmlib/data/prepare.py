"""Documents -> token store on disk, built once for all runs with the same text and tokenizer.

A store is a folder with the tokenizer, train.bin, validation.bin and store.json.
"""

import hashlib
import json
import os
import shutil
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
from lmlib.files import file_sha256, resolve_path

STORE_FORMAT = 1


def prepare(config: RunConfig, tokenizer: str | None = None) -> TokenStore:
    """Open the token store of a run under output_dir/.tokens; build it first if there is none.

    Args:
        tokenizer: folder or Hugging Face id that replaces `config.tokenizer`.

    Raises:
        ValueError: the corpus or tokenizer cannot be used, or a split is shorter than one window.
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
    for split, tokens, key in (("training", store.train, "training"),
                               ("validation", store.validation, "held-out")):
        if store.window_count(split == "validation") < 1:
            raise ValueError(
                f"The {split} split of {config.corpus} has {len(tokens):,} tokens in "
                f"{store.info[key]['documents']} documents, less than one window of "
                f"sequence_length {config.sequence_length}: use more text, shorter windows, or "
                "another validation_fraction or validation_corpus.")
    return store


def store_identity(config: RunConfig, tokenizer: str) -> dict[str, Any]:
    """Return everything that determines a store's content; local files count by their SHA-256."""
    held_out_share = 0.0 if config.split == "windows" else config.validation_fraction
    validation, limits = config.validation_corpus, None
    if config.max_tokens:
        limits = [config.max_tokens, config.validation_windows * config.sequence_length]
    return {
        "format": STORE_FORMAT,
        "corpus": _corpus_identity(config, config.corpus),
        "text_column": config.text_column,
        "validation": _corpus_identity(config, validation) if validation else held_out_share,
        "tokenizer": _tokenizer_identity(config, tokenizer),
        "limits": limits,
    }


def _corpus_identity(config: RunConfig, corpus: str) -> list[Any]:
    files = corpus_files(corpus)
    if files is None:
        return [corpus, config.corpus_config, config.corpus_split]
    contents = "".join(file.suffix + file_sha256(file) for file in files)
    return [len(files), hashlib.sha256(contents.encode()).hexdigest()]


def _tokenizer_identity(config: RunConfig, name: str) -> list[Any]:
    import tokenizers

    if name == "train":  # another version of the library may train another tokenizer
        return ["byte-level BPE", config.vocab_size, tokenizers.__version__]
    loaded = load_tokenizer(name)
    rules = loaded.backend_tokenizer.to_str()
    return [hashlib.sha256(rules.encode()).hexdigest(), loaded.eos_token_id]


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
        info["identity"] = identity
        info["sha256"] = {file.name: file_sha256(file) for file in sorted(draft.iterdir())}
        with open(draft / "store.json", "w") as file:  # last: a store without it is incomplete
            json.dump(info, file, indent=1)
            _sync(file)
        if folder.exists() and not _is_complete(folder):
            folder.rename(draft.with_suffix(".damaged"))
            shutil.rmtree(draft.with_suffix(".damaged"))
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
    dtypes = (np.uint8, np.uint16, np.uint32)
    dtype = np.dtype(next(t for t in dtypes if len(tokenizer) - 1 <= np.iinfo(t).max))
    counts = {split: {"tokens": 0, "documents": 0, "bytes": 0} for split in (False, True)}
    # With max_tokens a stream is left as soon as each split has enough: it may have no end.
    enough = {False: config.max_tokens, True: 0}
    if config.split == "documents":
        enough[True] = config.validation_windows * config.sequence_length + 1
    streams = split_documents(config)
    with open(folder / "train.bin", "wb") as train, \
            open(folder / "validation.bin", "wb") as validation:
        files = {False: train, True: validation}
        for number, stream in enumerate(streams):
            splits = (False, True) if len(streams) == 1 else (bool(number),)
            while chunk := list(islice(stream, 64)):
                _write_chunk(chunk, tokenizer, config.max_tokens, dtype, files, counts)
                if config.max_tokens and all(counts[s]["tokens"] >= enough[s] for s in splits):
                    break
        _sync(train)
        _sync(validation)
    total = counts[False]["tokens"] + counts[True]["tokens"]
    if total == 0:
        raise ValueError(f"The corpus {config.corpus} holds no text.")
    return {"dtype": dtype.name, "training": counts[False], "held-out": counts[True],
            "held_out_share": counts[True]["tokens"] / total}


def _write_chunk(chunk: list[tuple[bool, str]], tokenizer: Any, max_tokens: int | None,
                 dtype: np.dtype, files: dict[bool, BinaryIO], counts: dict[bool, dict[str, int]]):
    """Append documents to the file of their split, training text up to `max_tokens`."""
    limits = {False: max_tokens, True: None}
    chunk = [(held_out, text) for held_out, text in chunk
             if limits[held_out] is None or counts[held_out]["tokens"] < limits[held_out]]
    encoder = tokenizer.backend_tokenizer
    encoder.encode_special_tokens = True  # text that spells a special token stays text
    encoded = encoder.encode_batch_fast([text for _, text in chunk], add_special_tokens=False)
    encoder.encode_special_tokens = False
    for (held_out, text), encoding in zip(chunk, encoded, strict=True):
        count, ids = counts[held_out], [*encoding.ids, tokenizer.eos_token_id]
        if limits[held_out] is not None:
            ids = ids[: limits[held_out] - count["tokens"]]
        if ids:
            np.array(ids, dtype=dtype).tofile(files[held_out])
            count["tokens"] += len(ids)
            count["documents"] += 1
            count["bytes"] += len(text.encode("utf-8", "replace"))


def _sync(file: Any):
    file.flush()
    os.fsync(file.fileno())


def _is_complete(folder: Path) -> bool:
    """Check whether a store has its store.json, all its files, and all its tokens."""
    try:
        info = json.loads((folder / "store.json").read_text())
        size = np.dtype(info["dtype"]).itemsize
        files = {"train.bin": "training", "validation.bin": "held-out"}
        return all((folder / name).is_file() for name in info["sha256"]) and all(
            (folder / name).stat().st_size == info[split]["tokens"] * size
            for name, split in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _open(config: RunConfig, folder: Path) -> TokenStore:
    info = json.loads((folder / "store.json").read_text())

    def tokens(file: str, split: str) -> np.ndarray:
        if info[split]["tokens"] == 0:  # an empty file cannot be memory-mapped
            return np.empty(0, info["dtype"])
        return np.memmap(folder / file, info["dtype"], "r")

    train, validation = tokens("train.bin", "training"), tokens("validation.bin", "held-out")
    return TokenStore(config=config, folder=folder, train=train,
                      validation=train if config.split == "windows" else validation,
                      tokenizer=load_tokenizer(str(folder)), info=info)
