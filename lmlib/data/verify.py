"""The files of a token store, and their hashes: a store whose content has changed is not used.

A split's identity is the hash of the SHA-256s of its token stream's pieces of PIECE bytes, however
the stream is divided into files.
"""

import hashlib
import os
import platform
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from lmlib.files import file_sha256, flush, json_sha256, read_mapping, sync_folder, write_json

SPLITS = ("training", "validation", "test")
STREAMS = {"training": "train.bin", "validation": "validation.bin", "test": "test.bin"}
# Of training: the sorted hashes. Of the others: a row of (hash, key of its statistical unit,
# tokens) per document. All are little-endian uint64.
DOCUMENTS = {split: f"{split}_documents.bin" for split in SPLITS}

SHARDS = ".draft-shards"  # ending of the folder with the shards of a store that is being built

PIECE = 256 * 2**20  # bytes
AT_ONCE = 4 * 10**9  # bytes that are verified before a run starts; more: while it trains


def write_info(folder: Path, info: dict[str, Any]):
    """Flush a store's files to disk, then write store.json: `info`, and the hashes of them all."""
    for split, name in STREAMS.items():
        pieces = list(_piece_hashes(folder / name))
        info[split] |= {"pieces": pieces, "hash": _stream_hash(pieces)}
    others = [file for file in sorted(folder.iterdir()) if file.name not in STREAMS.values()]
    hashes = {file.name: file_sha256(file) for file in others}
    for file in folder.iterdir():
        flush(file)
    info = {**info, "sha256": hashes}
    write_json(folder / "store.json", {**info, "digest": json_sha256(info)})
    sync_folder(folder)


def data_hash(info: dict[str, Any]) -> str:
    """Return the identity of a store's tokens: of all splits together."""
    return _stream_hash([info[split]["hash"] for split in SPLITS])


def damage(folder: Path) -> str:
    """Name what is missing or changed in a store; "" if nothing is.

    Token streams of more than AT_ONCE bytes are compared by size alone: see `verify_later`.
    """
    info = read_mapping(folder / "store.json")
    try:
        if info.pop("digest") != json_sha256(info):
            return "store.json"
        sizes = {split: info[split]["tokens"] * np.dtype(info["dtype"]).itemsize
                 for split in SPLITS}
        for name, expected in info["sha256"].items():
            if file_sha256(folder / name) != expected:
                return name
        for split, name in STREAMS.items():
            if (folder / name).stat().st_size != sizes[split]:
                return name
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, KeyError, TypeError, AttributeError):
        return "store.json"
    if sum(sizes.values()) <= AT_ONCE:
        return _changed_stream(folder, info)
    with suppress(OSError):
        return (folder / "damaged").read_text()  # by `verify_later`
    return ""


def verify_later(folder: Path, info: dict[str, Any]) -> Future | None:
    """Verify a store of more than AT_ONCE bytes in a thread, once per machine.

    The result is the name of a changed file, or "". None: it is verified already, or by the first
    process of a launcher on this machine.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return None
    sizes = [(folder / name).stat() for name in STREAMS.values()]
    if sum(size.st_size for size in sizes) <= AT_ONCE:
        return None
    verified = folder / f"verified-{platform.node()}.json"
    now = {"files": [[size.st_size, size.st_mtime_ns] for size in sizes]}
    if read_mapping(verified) == now:
        return None

    def verify() -> str:
        if changed := _changed_stream(folder, info):
            (folder / "damaged").write_text(changed)
        else:
            write_json(verified, now)
        return changed

    pool = ThreadPoolExecutor(1)
    result = pool.submit(verify)
    pool.shutdown(wait=False)
    return result


def _changed_stream(folder: Path, info: dict[str, Any]) -> str:
    return next((name for split, name in STREAMS.items()
                 if list(_piece_hashes(folder / name)) != info[split]["pieces"]), "")


def _piece_hashes(file: Path) -> Iterator[str]:
    with open(file, "rb") as stream:
        while True:
            piece, left = hashlib.sha256(), PIECE
            while left and (chunk := stream.read(min(left, 2**20))):
                piece.update(chunk)
                left -= len(chunk)
            if left == PIECE:
                return
            yield piece.hexdigest()


def _stream_hash(hashes: list[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()
