"""Paths and files: the project's root, whole-file writes, tolerant reads."""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).resolve().parent.parent


PROJECT_ROOT = _REPOSITORY if (_REPOSITORY / "pyproject.toml").is_file() else Path.cwd()


def resolve_path(path: str | Path) -> Path:
    """`path` as it stands if that exists, else counted from the project's root (kernels start in notebooks/)."""
    path = Path(path).expanduser()
    return path if path.is_absolute() or path.exists() else PROJECT_ROOT / path


def display_path(path: Path) -> str:
    """`path` as a reader of a notebook or terminal wants it: from the project's root where it lies inside."""
    return str(path.relative_to(PROJECT_ROOT) if path.is_relative_to(PROJECT_ROOT) else path)


def write_json(path: Path, content: Any):
    """Write a file whole or not at all."""
    draft = path.with_name(f".{path.name}.draft")
    with open(draft, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file of the run, None if there is none.

    Raises:
        ValueError: it is there and damaged.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def read_mapping(file: Path) -> dict[str, Any]:
    """A JSON file's mapping, empty where it cannot be read."""
    try:
        content = read_json(file)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path):
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def os_errors_as_value_errors(run_dir: Path) -> Iterator[None]:
    """Turn the system's refusals (a full disk, a folder that may not be written) into a ValueError that says what to do."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{run_dir} cannot be used ({error}): free some space or choose another output_dir.") from error
