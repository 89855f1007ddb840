"""Paths and files: the project's root, atomic writes, tolerant reads. Standard library only."""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmlib.errors import UserError

_REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT_ROOT = _REPOSITORY if (_REPOSITORY / "pyproject.toml").is_file() else Path.cwd()


def resolve_path(path: str | Path) -> Path:
    """Return `path` if it exists, else take it from the project's root."""
    # Kernels start in notebooks/ and users anywhere, yet "outputs/quickstart" must mean one folder.
    path = Path(path).expanduser()
    return path if path.is_absolute() or path.exists() else PROJECT_ROOT / path


def display_path(path: Path) -> str:
    """Return `path` for a message: relative to the project's root where it lies inside."""
    return str(path.relative_to(PROJECT_ROOT) if path.is_relative_to(PROJECT_ROOT) else path)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a draft to write, flush it to disk and rename it to `path`: all of it or nothing."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        yield draft
        flush(draft)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)  # on a full disk its space is wanted
        raise


def write_json(path: Path, content: Any, indent: int | None = 1):
    """Write a JSON file atomically."""
    with atomic_write(path) as draft:
        draft.write_text(json.dumps(content, indent=indent) + "\n", "utf-8")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, None if there is none; ValueError if it is corrupted."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file, or {} if it is missing, corrupted or not a mapping."""
    try:
        content = read_json(path)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def flush(path: Path):
    """Flush a file to disk."""
    with open(path, "r+b") as file:  # Windows flushes only what may be written
        os.fsync(file.fileno())


def sync_folder(folder: Path):
    """Flush a folder's entries to disk, so that a rename survives a power cut."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@contextmanager
def os_errors_as_value_errors(folder: Path) -> Iterator[None]:
    """Turn OSErrors (a full disk, a read-only folder) into a ValueError that says what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder} cannot be used ({error}): free some space or choose another "
                        "output_dir.") from error
