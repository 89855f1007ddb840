"""Versions, machine and data of a run: environment.json, and what differs when it resumes."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lmlib.data.tokens import TokenStore
from lmlib.files import PROJECT_ROOT

PACKAGES = ("lmlib", "torch", "transformers", "tokenizers", "datasets", "safetensors", "numpy")


def environment(store: TokenStore, device: torch.device) -> dict[str, Any]:
    """Describe what is installed, the machine and the data."""
    return {
        "versions": {"python": platform.python_version(),
                     **{name: _installed(name) for name in PACKAGES}},
        "git_commit": _git_commit(), "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "device_type": device.type, "threads": torch.get_num_threads(),
        "corpus": {name: store.info[name] for name in ("training", "held-out", "held_out_share")},
        "fingerprints": store.info["sha256"]}


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
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


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """List what differs from the run's last session, which makes resuming inexact.

    Raises a ValueError if the data differ, since it would not be the same run.
    """
    old, new = before["fingerprints"], after["fingerprints"]
    if old != new:
        names = ", ".join(name for name, sha in new.items() if old.get(name) != sha)
        raise ValueError(f"The data of this run have changed ({names}): its corpus or tokenizer "
                         "is not the one it was trained on. Restore the text, or start a run with "
                         "another run_name (init_from keeps the weights).")
    pairs = [(key, before.get(key), after[key]) for key in ("device", "threads", "git_commit")]
    pairs += [(key, before["versions"].get(key), now) for key, now in after["versions"].items()]
    return [f"{key} was {was}, is {now}" for key, was, now in pairs if was != now]
