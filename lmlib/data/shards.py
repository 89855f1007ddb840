"""Text -> shards: stretches of a corpus, each tokenized by one pure function, in local processes.

Worker processes import this module, so it needs neither torch nor transformers.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from lmlib.data.corpus import SplitRule, content_hash
from lmlib.data.verify import SPLITS
from lmlib.errors import UserError
from lmlib.files import flush, read_mapping, write_json

PACKAGE = Path(__file__).resolve().parents[2]  # the folder that lmlib is in
SIZE = 8 * 2**20  # characters of a shard's text; its last document may exceed it

# What is known of a document. `tokens` is 0 where its split had reached max_tokens.
DOCUMENT = np.dtype([("hash", "<u8"), ("file", "<i4"), ("tokens", "<u4"), ("bytes", "<u4"),
                     ("split", "u1")])


class Text(NamedTuple):
    """The documents of a shard as they are read, and which of them are tokenized."""
    documents: list[str]
    files: list[int]  # number of the .txt file that each was cut from; -1: a whole document
    rule: SplitRule
    wanted: set[str]  # splits that still need tokens

    @property
    def sha256(self) -> str:
        content = hashlib.sha256(repr([self.files, list(map(len, self.documents))]).encode())
        content.update("".join(self.documents).encode("utf-8", "replace"))
        return content.hexdigest()


class Shard(NamedTuple):
    """What becomes of a shard's text."""
    documents: np.ndarray  # (D,) DOCUMENT
    tokens: list[np.ndarray]  # of each split, its documents in order

    @property
    def sha256(self) -> str:
        return hashlib.sha256(b"".join([self.documents, *self.tokens])).hexdigest()


class Encoder(NamedTuple):
    """A tokenizer, the token that ends each document, and the type of the tokens."""
    tokenizer: Tokenizer
    end: int
    dtype: np.dtype


def build_shard(text: Text, encoder: Encoder) -> Shard:
    """Split and tokenize the documents of a shard: a pure function."""
    hashes = list(map(content_hash, text.documents))
    splits = list(map(text.rule.split_of, hashes))
    lengths = [0] * len(splits)
    tokens = {split: [np.empty(0, encoder.dtype)] for split in SPLITS}
    wanted = [n for n, split in enumerate(splits) if split in text.wanted]
    for start in range(0, len(wanted), 64):
        chunk = wanted[start : start + 64]
        encoded = encoder.tokenizer.encode_batch_fast([text.documents[n] for n in chunk],
                                                      add_special_tokens=False)
        for n, encoding in zip(chunk, encoded, strict=True):
            ids = np.array([*encoding.ids, encoder.end], encoder.dtype)
            tokens[splits[n]].append(ids)
            lengths[n] = len(ids)
    sizes = [len(document.encode("utf-8", "replace")) for document in text.documents]
    rows = zip(hashes, text.files, lengths, sizes, map(SPLITS.index, splits), strict=True)
    return Shard(np.fromiter(rows, DOCUMENT, len(splits)),
                 [np.concatenate(tokens[split]) for split in SPLITS])


def cut_shards(documents: Iterable[tuple[str, int | None]], size: int
               ) -> Iterator[tuple[list[str], list[int]]]:
    """Divide a corpus into shards of `size` characters or a document more: texts and files."""
    texts, files, length = [], [], 0
    for text, file in documents:
        texts.append(text)
        files.append(-1 if file is None else file)
        length += len(text)
        if length >= size:
            yield texts, files
            texts, files, length = [], [], 0
    if texts:
        yield texts, files


def write_shard(file: Path, text_sha256: str, shard: Shard):
    """Write a shard, and then what it was made of beside it."""
    with open(file, "wb") as out:
        for array in (shard.documents, *shard.tokens):
            array.tofile(out)
    flush(file)
    write_json(file.with_suffix(".json"), {
        "text": text_sha256, "documents": len(shard.documents),
        "tokens": [len(tokens) for tokens in shard.tokens], "sha256": shard.sha256})


def read_shard(file: Path, text_sha256: str, dtype: np.dtype) -> Shard | None:
    """Return the shard of that text; None if it is not there, with a warning if it is damaged."""
    info = read_mapping(file.with_suffix(".json"))
    if info.get("text") != text_sha256:
        return None
    with suppress(OSError, KeyError, TypeError, ValueError):
        with open(file, "rb") as content:
            shard = Shard(np.fromfile(content, DOCUMENT, info["documents"]),
                          [np.fromfile(content, dtype, count) for count in info["tokens"]])
        if shard.sha256 == info["sha256"]:
            return shard
    warnings.warn(f"The shard {file} is damaged; it is built again.", stacklevel=2)
    return None


def in_order(texts: Iterable[Text], find: Callable[[int, str], Shard | None],
             builder: "Builder") -> Iterator[tuple[str, Shard, bool]]:
    """Build shards, a few at once; yield the SHA-256 of their texts, and them, in order.

    `find` returns the shard of a number and a SHA-256 if it is there. The last value says whether
    a shard is new.
    """
    pending: deque[tuple[str, Future, bool]] = deque()
    for number, text in enumerate(chain(texts, [None])):
        if text is not None:
            sha256 = text.sha256
            known = find(number, sha256)
            pending.append((sha256, _done(known) if known else builder.submit(text), not known))
        while pending and (text is None or len(pending) > builder.workers + 1
                           or pending[0][1].done()):
            sha256, shard, is_new = pending.popleft()
            yield sha256, shard.result(), is_new


def _done(result: Shard) -> Future:
    future = Future()
    future.set_result(result)
    return future


class Builder:
    """Builds shards: the first SIZE characters here, what follows in `workers` other processes.

    They are started when they are needed, and end when this object is closed or this process dies.
    """

    def __init__(self, encoder: Encoder, workers: int):
        self.encoder, self.workers, self.characters = encoder, workers, 0
        self.processes: list[subprocess.Popen] = []
        self.idle: SimpleQueue[subprocess.Popen] = SimpleQueue()
        self.threads = ThreadPoolExecutor(workers)  # each waits for one process

    def submit(self, text: Text) -> Future:
        if self.characters < SIZE:  # small corpora start no process
            self.characters += sum(map(len, text.documents))
            return _done(build_shard(text, self.encoder))
        if not self.processes:
            self._start()
        return self.threads.submit(self._ask, text)

    def _start(self):
        tokenizer, end, dtype = self.encoder
        # multiprocessing would import the caller's script again, or fork a process with threads.
        command = [sys.executable, "-c", "from lmlib.data.shards import work; work()"]
        threads = dict.fromkeys(("RAYON_NUM_THREADS", "OMP_NUM_THREADS"), "1")
        for _ in range(self.workers):
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=PACKAGE,
                env={**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false"})
            self.processes.append(process)
            try:
                _send(process.stdin, [tokenizer.to_str(), end, dtype.name])
            except OSError:
                raise _failure(process) from None
            self.idle.put(process)

    def _ask(self, text: Text) -> Shard:
        process = self.idle.get()
        try:
            _send(process.stdin, [text.documents, text.files, text.rule, sorted(text.wanted)])
            count, *sizes = _receive(process.stdout)
            arrays = [np.frombuffer(process.stdout.read(n * dtype.itemsize), dtype, n) for n, dtype
                      in ((count, DOCUMENT), *((n, self.encoder.dtype) for n in sizes))]
            return Shard(arrays[0], arrays[1:])
        except (OSError, EOFError, ValueError):
            raise _failure(process) from None
        finally:
            self.idle.put(process)

    def close(self):
        for process in self.processes:
            process.kill()
        self.threads.shutdown(cancel_futures=True)
        for process in self.processes:
            process.stdout.close()
            with suppress(OSError):  # what it still buffers has no reader
                process.stdin.close()
            process.wait()


def _failure(process: subprocess.Popen) -> UserError:
    status = process.wait()
    why = ("It was killed, perhaps for lack of memory: use fewer (lmlib data RECIPE --workers 1) "
           "or divide large documents." if status < 0 else "Its error is above.")
    return UserError(f"A process that tokenized text ended with status {status}. {why}")


def _send(stream: BinaryIO, value: Any, arrays: Iterable[np.ndarray] = ()):
    """Write a line of JSON, and after it the bytes of arrays."""
    stream.write(json.dumps(value).encode() + b"\n")
    for array in arrays:
        stream.write(array.tobytes())
    stream.flush()


def _receive(stream: BinaryIO) -> Any:
    if not (line := stream.readline()):
        raise EOFError
    return json.loads(line)


def work():
    """Build the shards that arrive on standard input, until nobody asks or waits for more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's to answer
    asked, answers = sys.stdin.buffer, sys.stdout.buffer
    try:
        definition, end, dtype = _receive(asked)
        encoder = Encoder(Tokenizer.from_str(definition), end, np.dtype(dtype))
        encoder.tokenizer.encode_special_tokens = True
        while True:
            documents, files, rule, wanted = _receive(asked)
            shard = build_shard(Text(documents, files, SplitRule(*rule), set(wanted)), encoder)
            arrays = shard.documents, *shard.tokens
            _send(answers, list(map(len, arrays)), arrays)
    except (EOFError, BrokenPipeError):
        os._exit(0)  # leaving as usual would flush to a broken pipe once more
