"""Versions, machine and data of a run: environment.json, and what differs when it resumes."""

import hashlib
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmlib.data.tokens import TokenStore
from lmlib.data.verify import PIECE, SPLITS, STREAMS, data_hash
from lmlib.errors import UserError
from lmlib.files import PROJECT_ROOT, file_sha256, read_mapping

PACKAGES = ("lmlib", "torch", "transformers", "tokenizers", "datasets", "safetensors", "numpy")


def environment(store: TokenStore, device: torch.device) -> dict[str, Any]:
    """Describe what is installed, the machine and the data."""
    return {
        "versions": {"python": platform.python_version(),
                     **{name: _installed(name) for name in PACKAGES}},
        "git_commit": git_commit(), "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "device_type": device.type, "threads": torch.get_num_threads(),
        "corpus": {"held_out_share": store.info["held_out_share"], "unit": store.info["unit"],
                   **{split: {name: store.info[split][name]
                              for name in ("documents", "bytes", "tokens")} for split in SPLITS}},
        "data": data_of(store), "tokens": store.folder.name}


def data_of(store: TokenStore) -> dict[str, str]:
    """Return the identity of each split's tokens, and of the tokenizer."""
    return {**{split: store.info[split]["hash"] for split in SPLITS},
            "tokenizer": store.info["tokenizer"]}


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Return the commit of lmlib's code, marked if files differ from it; None without git."""
    try:
        commit, changed = (
            subprocess.run(["git", "-C", str(PROJECT_ROOT), *arguments],
                           capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "lmlib"]))
        return commit + (" (changed)" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name"))
        return name.partition(":")[2].strip()
    except (OSError, StopIteration):
        return platform.processor() or sys.platform


def source_hash() -> str:
    """Hash the source files of lmlib."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(file.read_bytes())
    return code.hexdigest()


def code_version(model: nn.Module) -> str:
    """Hash the code of lmlib, and of every class that the model is made of."""
    code = hashlib.sha256(source_hash().encode())
    classes = {base for module in model.modules() for base in type(module).__mro__
               if not base.__module__.startswith(("torch.", "builtins"))}
    for cls in sorted(classes, key=lambda cls: (cls.__module__, cls.__qualname__)):
        code.update(f"{cls.__module__}.{cls.__qualname__}".encode())
        for name, value in sorted(vars(cls).items()):  # a notebook may replace a method
            if body := getattr(value, "__code__", None):
                constants = [constant for constant in body.co_consts
                             if isinstance(constant, int | float | str | None)]
                code.update(f"{name} {constants} {body.co_names}".encode() + body.co_code)
    return code.hexdigest()


def check_data(run_dir: Path, source: Path, store: TokenStore):
    """Raise a ValueError if a run's tokens are not those that its checkpoint was trained on."""
    before, now = read_mapping(run_dir / "environment.json"), data_of(store)
    if isinstance(before.get("data"), dict):
        changed = [name for name, value in now.items() if before["data"].get(name) != value]
    elif isinstance(old := before.get("fingerprints"), dict):  # of the first format
        changed = [split for split in SPLITS[:2]
                   if old.get(STREAMS[split]) != _whole_hash(store, split)]
    else:
        manifest = read_mapping(source / "checkpoint.json")
        changed = [] if manifest.get("data") in (None, data_hash(store.info)) else ["tokens"]
    if changed:
        raise UserError(f"The data of this run have changed ({', '.join(changed)}): its corpus "
                        "or tokenizer is not the one it was trained on. Restore the text, or "
                        "start a run with another run_name (init_from keeps the weights).")


def _whole_hash(store: TokenStore, split: str) -> str:
    """Return the SHA-256 of a split's whole stream, as the first format recorded it."""
    file, pieces = store.folder / STREAMS[split], store.info[split]["pieces"]
    return pieces[0] if 0 < file.stat().st_size <= PIECE else file_sha256(file)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """List what differs from the run's last session, which makes resuming inexact."""
    if not before:
        return []
    versions = before.get("versions", {})
    pairs = [(key, before.get(key), after[key]) for key in ("device", "threads", "git_commit")]
    pairs.append(("compiled", before.get("compiled", False), after["compiled"]))
    pairs.append(("processes", before.get("processes", 1), after["processes"]))
    pairs.append(("sharding", before.get("sharding", "none"), after["sharding"]))
    pairs += [(key, versions.get(key), now) for key, now in after["versions"].items()]
    return [f"{key} was {was}, is {now}" for key, was, now in pairs if was != now]
