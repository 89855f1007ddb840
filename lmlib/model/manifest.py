"""The manifest of a folder: the size and SHA-256 of each of its files, written after them."""

import json
import re
from pathlib import Path
from typing import Any

from lmlib.files import file_sha256, flush, json_sha256, write_json
from lmlib.model.huggingface import CheckpointError

FORMAT = 2
READABLE = (1, 2)  # format 1 has no data hash and no lineage, and its run's key cannot be computed
# What transformers, peft and tokenizers may read from a model folder without being told its name.
LOADABLE = re.compile(
    r".+\.(json|safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|jinja|model|tiktoken|py)"
    r"|(merges|vocab|dict)\.txt")


def write_manifest(folder: Path, name: str, content: dict[str, Any]) -> dict[str, Any]:
    """Flush the files of `folder` to disk, then write `name`: content, and their size and hash."""
    files = {}
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        flush(file)  # a manifest must not outlive its files in a power cut
        files[file.name] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
    manifest = {"format": FORMAT, **content, "files": files}
    manifest["digest"] = json_sha256(manifest)
    write_json(folder / name, manifest)
    return manifest


def verify_manifest(folder: Path, name: str) -> dict[str, Any]:
    """Return the manifest of `folder` if every file has the size and SHA-256 that it lists.

    Raises a CheckpointError that names the file otherwise, or one that loading might read although
    the manifest does not list it.
    """
    try:
        manifest = json.loads((folder / name).read_bytes())
        if manifest.pop("digest") != json_sha256(manifest):
            raise CheckpointError(f"{folder} is corrupted: {name} does not match its own digest.")
        if manifest["format"] not in READABLE:
            known = " and ".join(map(str, READABLE))
            raise CheckpointError(f"{folder} has format {manifest['format']}; this version of "
                                  f"lmlib reads formats {known}.")
        for file, expected in manifest["files"].items():
            path = folder / Path(file).name  # a manifest cannot point out of its folder
            if not path.is_file():
                raise CheckpointError(f"{folder} is corrupted: {file} is missing.")
            if path.stat().st_size != expected["size"] or file_sha256(path) != expected["sha256"]:
                raise CheckpointError(f"{folder} is corrupted: {file} has changed.")
        unlisted = {path.name for path in folder.iterdir()} - {name, *manifest["files"]}
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is incomplete: {name} is missing.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} is corrupted: {name} cannot be read "
                              f"({type(error).__name__}).") from None
    if added := sorted(filter(LOADABLE.fullmatch, unlisted)):
        raise CheckpointError(f"{folder} has files that {name} does not list and that loading "
                              f"might read: {', '.join(added)}. Move them elsewhere.")
    return manifest
