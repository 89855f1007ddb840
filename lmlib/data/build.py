"""A corpus -> the files of a token store, by way of shards that outlive a killed preparation.

Shards are merged in the order of the corpus, up to the limits of max_tokens, so that the store is
the same however many processes built them. Only one shard per process is in memory.
"""

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import numpy as np

from lmlib.config import RunConfig
from lmlib.data import shards
from lmlib.data.corpus import documents, split_rules, text_size
from lmlib.data.shards import Encoder, Shard, Text
from lmlib.data.verify import DOCUMENTS, SPLITS, STREAMS, damage
from lmlib.errors import UserError
from lmlib.files import read_mapping, write_json
from lmlib.text import format_duration

BATCH = 64  # documents between two looks at whether a corpus with max_tokens has given enough
BLOCK = 2**22  # documents that are sorted or counted together
NOTICE = 10.0  # seconds between lines of progress
# What is known of a document that is in the store.
ROW = np.dtype([("hash", "<u8"), ("number", "<u8"), ("tokens", "<u8"), ("file", "<i8")])


def encoder_of(tokenizer: Any) -> Encoder:
    """Return what tokenizes documents; text that spells a special token stays text."""
    tokenizer.backend_tokenizer.encode_special_tokens = True
    return Encoder(tokenizer.backend_tokenizer, tokenizer.eos_token_id,
                   np.min_scalar_type(len(tokenizer) - 1))


def write_splits(config: RunConfig, tokenizer: Any, folder: Path, kept: Path,
                 workers: int | None) -> dict[str, Any]:
    """Write the tokens and documents of every split; return what store.json says of them.

    `kept` is the folder of the shards, of which those that an earlier call has finished are used.
    `workers` processes (None: one per core) build the others.
    """
    encoder = encoder_of(tokenizer)
    _check_space(config, encoder, kept)
    evaluated = config.validation_windows * config.sequence_length + 1
    limit = config.max_tokens or sys.maxsize
    enough = {"training": limit, "validation": evaluated if config.split == "documents" else 0,
              "test": evaluated if config.has_test else 0}
    rules, table, progress = split_rules(config), [], Progress(config)
    with ExitStack() as stack:
        splits = {name: Split(stack.enter_context(open(folder / STREAMS[name], "wb")),
                              stack.enter_context(TemporaryFile(dir=folder)),
                              limit if name == "training" else sys.maxsize, enough[name])
                  for name in SPLITS}
        builder = stack.enter_context(closing(shards.Builder(encoder, workers or _cores())))
        for number, (corpus, rule) in enumerate(rules):
            names = SPLITS if len(rules) == 1 else SPLITS[:1] if number == 0 else SPLITS[1:]
            part = Part({name: splits[name] for name in names}, config.max_tokens is not None)
            texts = (Text(*pieces, rule, part.wanted())
                     for pieces in shards.cut_shards(documents(corpus, config), shards.SIZE))
            find = partial(_find, kept, number, encoder)
            for text, shard, is_new in shards.in_order(texts, find, builder):
                name = _name(number, len(part.table))
                if is_new:
                    shards.write_shard(kept / f"{name}.bin", text, shard)
                is_enough = part.append(shard, {"shard": name, "text": text})
                progress.add(int(shard.documents["bytes"].sum()))
                if is_enough:
                    break
            table += part.table
        total = sum(split.tokens for split in splits.values())
        if total == 0:
            raise UserError(f"The corpus {config.corpus} holds no text.")
        splits["training"].write_hashes(folder / DOCUMENTS["training"])
        for name in SPLITS[1:]:
            # Validation windows that overlap training windows are cut from the training text.
            own = config.split == "windows" and name == "validation"
            part.write_units(splits["training" if own else name], folder / DOCUMENTS[name])
    write_json(folder / "shards.json", {"size": shards.SIZE, "shards": table}, indent=None)
    return {"dtype": encoder.dtype.name,
            **{name: split.counts() for name, split in splits.items()},
            "held_out_share": 1 - splits["training"].tokens / total, "unit": part.unit}


def _find(kept: Path, part: int, encoder: Encoder, number: int, text: str) -> Shard | None:
    return shards.read_shard(kept / f"{_name(part, number)}.bin", text, encoder.dtype)


def _name(part: int, number: int) -> str:
    return f"{part}-{number:05}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Split:
    """The tokens of a split, on their way to its file, and what is known of its documents."""
    def __init__(self, file: BinaryIO, rows: BinaryIO, limit: int, enough: int):
        self.file, self.rows = file, rows  # of tokens, and of ROW per document
        self.limit, self.enough = limit, enough  # of tokens
        self.tokens, self.bytes, self.documents = 0, 0, 0

    def append(self, documents: np.ndarray, numbers: np.ndarray, tokens: np.ndarray) -> int:
        """Append documents until the limit; returns how many of their tokens were taken."""
        lengths = documents["tokens"].astype(np.int64)
        before = self.tokens + np.cumsum(lengths) - lengths
        count = int((before < self.limit).sum())  # a prefix
        documents, before, lengths = documents[:count], before[:count], lengths[:count]
        rows = np.empty(count, ROW)
        rows["hash"], rows["file"], rows["number"] = (
            documents["hash"], documents["file"], numbers[:count])
        rows["tokens"] = np.minimum(lengths, self.limit - before)
        rows.tofile(self.rows)
        taken = int(rows["tokens"].sum())
        tokens[:taken].tofile(self.file)
        self.tokens += taken
        self.bytes += int(documents["bytes"].sum(dtype=np.int64))
        self.documents += count
        return taken

    def counts(self) -> dict[str, int]:
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the rows of all documents, some at a time."""
        self.rows.seek(0)
        while len(rows := np.fromfile(self.rows, ROW, BLOCK)):
            yield rows

    def write_hashes(self, file: Path):
        """Write the sorted hashes of the documents, each once, range by range of their values."""
        ranges = -(-self.documents // BLOCK)
        with open(file, "wb") as out:
            for number in range(ranges):
                low, high = (n * 2**64 // ranges for n in (number, number + 1))
                found = [np.unique(rows["hash"][(rows["hash"] >= np.uint64(low))
                                                & (rows["hash"] <= np.uint64(high - 1))])
                         for rows in self.blocks()]
                np.unique(np.concatenate(found)).tofile(out)


@dataclass
class Part:
    """One of a run's corpora on its way to its splits."""
    splits: dict[str, Split]
    is_limited: bool  # by max_tokens: the corpus may have no end of its own
    count: int = 0  # of its documents so far
    first: dict[int, int] = field(default_factory=dict)  # hash of each .txt file's first document
    is_whole: bool = False  # it has documents that were not cut from .txt files
    table: list[dict[str, Any]] = field(default_factory=list)  # for shards.json

    def wanted(self) -> set[str]:
        """Name the splits that take more tokens."""
        return {name for name, split in self.splits.items() if split.tokens < split.limit}

    def append(self, shard: Shard, entry: dict[str, Any]) -> bool:
        """Append the documents of the next shard; True once every split has enough."""
        taken, start, is_enough = dict.fromkeys(self.splits, 0), 0, False
        while start < len(shard.documents) and not is_enough:
            stop = len(shard.documents)
            if self.is_limited:
                stop = min(stop, start + BATCH - self.count % BATCH)
            documents = shard.documents[start:stop]
            self._note(documents)
            for name, split in self.splits.items():
                own = np.flatnonzero(documents["split"] == SPLITS.index(name))
                tokens = shard.tokens[SPLITS.index(name)][taken[name] :]
                taken[name] += split.append(documents[own], own + self.count, tokens)
            self.count, start = self.count + len(documents), stop
            is_enough = self.is_limited and self.count % BATCH == 0 and all(
                split.tokens >= split.enough for split in self.splits.values())
        self.table.append({**entry, "tokens": taken, "sha256": {
            name: hashlib.sha256(shard.tokens[SPLITS.index(name)][:count]).hexdigest()
            for name, count in taken.items()}})
        return is_enough

    def _note(self, documents: np.ndarray):
        files, places = np.unique(documents["file"], return_index=True)
        for file, place in zip(files.tolist(), places.tolist(), strict=True):
            self.first.setdefault(file, int(documents["hash"][place]))
        self.is_whole |= bool((documents["file"] < 0).any())

    @property
    def unit(self) -> str:
        """What its statistical units are."""
        if self.is_whole:
            return "documents"
        return "tenths of one file" if len(self.first) == 1 else "files"

    def write_units(self, split: Split, file: Path):
        """Write hash, key of the statistical unit and number of tokens of each document."""
        # A unit is the document itself, the .txt file that it was cut from, or a tenth of the only
        # file, whose key leaves room for the tenth.
        with open(file, "wb") as out:
            for rows in split.blocks():
                files, places = np.unique(rows["file"], return_inverse=True)
                first = np.array([self.first[of] for of in files.tolist()], np.uint64)
                keys = np.where(rows["file"] < 0, rows["hash"], first[places])
                if self.unit == "tenths of one file":
                    keys = keys // np.uint64(16) * np.uint64(16) + (
                        rows["number"] * np.uint64(10) // np.uint64(self.count))
                np.stack([rows["hash"], keys, rows["tokens"]], axis=1).tofile(out)


class Progress:
    """Lines on stderr that say how far a long preparation is."""
    def __init__(self, config: RunConfig):
        sizes = [text_size(corpus, config.text_column) for corpus, _ in split_rules(config)]
        is_known = None not in sizes and config.max_tokens is None
        self.total = sum(sizes) if is_known else None  # bytes of text, about
        self.done, self.began, self.noticed = 0, time.monotonic(), time.monotonic()

    def add(self, size: int):
        """Count bytes of text that are tokenized."""
        self.done, now = self.done + size, time.monotonic()
        if now - self.noticed < NOTICE:
            return
        self.noticed, speed = now, self.done / (now - self.began)
        line = f"Tokenized {self.done / 1e6:,.0f} MB of text at {speed / 1e6:.1f} MB/s"
        if self.total:
            left = format_duration(max(0, self.total - self.done) / speed)
            line += f", about {min(1, self.done / self.total):.0%}; about {left} left"
        print(f"{line}.", file=sys.stderr, flush=True)


def _check_space(config: RunConfig, encoder: Encoder, kept: Path):
    """Raise a UserError if the tokens of local files will not fit the disk, shards included."""
    needed = -sum(file.stat().st_size for file in kept.glob("*.bin"))  # they are there already
    for corpus, _ in split_rules(config):
        size = text_size(corpus, config.text_column)
        sample = next((text for text, _ in documents(corpus, config)), "") if size else ""
        sample = sample[:100_000]
        if sample:
            ids = encoder.tokenizer.encode(sample, add_special_tokens=False).ids
            tokens = size * len(ids) / len(sample.encode("utf-8", "replace"))
            needed += 2 * encoder.dtype.itemsize * min(tokens, 2 * (config.max_tokens or tokens))
    free = shutil.disk_usage(kept).free
    if needed > free:
        raise UserError(
            f"The tokens of {config.corpus} need about {needed / 1e9:.1f} GB more while they are "
            f"prepared, and {kept.parent} has {free / 1e9:.1f} GB free: free some space, choose "
            "another output_dir, or set max_tokens.")


# ---- Repair ----

def repair(config: RunConfig, tokenizer: Any, folder: Path) -> list[str] | None:
    """Build the damaged shards of a store again, in place; returns their names.

    None if that is impossible: the corpus has changed, or the shards are not known.
    """
    table, info = read_mapping(folder / "shards.json"), read_mapping(folder / "store.json")
    if table.get("size") != shards.SIZE:
        return None
    encoder, damaged, place = encoder_of(tokenizer), {}, dict.fromkeys(SPLITS, 0)
    for split, name in STREAMS.items():
        with open(folder / name, "ab") as file:
            file.truncate(info[split]["tokens"] * encoder.dtype.itemsize)
    for entry in table["shards"]:
        for split, count in entry["tokens"].items():
            tokens = np.fromfile(folder / STREAMS[split], encoder.dtype, count,
                                 offset=place[split] * encoder.dtype.itemsize)
            if hashlib.sha256(tokens).hexdigest() != entry["sha256"][split]:
                damaged.setdefault(entry["shard"], (entry["text"], []))[1].append(
                    (split, place[split], count))
            place[split] += count
    for number, (corpus, rule) in enumerate(split_rules(config)):
        left = {name for name in damaged if name.startswith(f"{number}-")}
        texts = shards.cut_shards(documents(corpus, config), shards.SIZE)
        for index, pieces in enumerate(texts if left else ()):
            name = _name(number, index)
            if name in left:
                text, parts = Text(*pieces, rule, set(SPLITS)), damaged[name][1]
                if text.sha256 != damaged[name][0]:
                    return None
                shard = shards.build_shard(text, encoder)
                for split, start, count in parts:
                    with open(folder / STREAMS[split], "r+b") as file:
                        file.seek(start * encoder.dtype.itemsize)
                        shard.tokens[SPLITS.index(split)][:count].tofile(file)
                        os.fsync(file.fileno())
                left.remove(name)
                if not left:
                    break  # with max_tokens the corpus may have no end
    (folder / "damaged").unlink(missing_ok=True)
    return None if damage(folder) else sorted(damaged)
