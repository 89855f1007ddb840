"""Versions, machine and data of a run."""

import platform
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lmlib.config import RunConfig
from lmlib.data.tokens import TokenStore
from lmlib.files import PROJECT_ROOT, read_json, utc_now, write_json
from lmlib.leaks import LEAKY
from lmlib.model.size import active_parameter_count, flops_per_token, parameter_count
from lmlib.model.transformer import LanguageModel


def environment(store: TokenStore, device: torch.device) -> dict[str, Any]:
    """What was installed, on what machine, on which data."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = ("lmlib", "torch", "transformers", "tokenizers", "datasets", "safetensors", "numpy")
    return {
        "versions": {"python": platform.python_version(), **{name: installed(name) for name in packages}},
        "git_commit": _git_commit(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "corpus": {name: store.info[name] for name in ("training", "held-out", "held_out_share")},
        "fingerprints": store.info["sha256"],
    }


def _git_commit() -> str | None:
    """The commit of lmlib's code, marked when files differ from it; None outside a repository."""
    try:
        git = ["git", "-C", str(PROJECT_ROOT)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "lmlib"], capture_output=True, text=True, check=True)
        return commit + (" (changed)" if changed.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or sys.platform


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs from the environment that a run was begun in and makes its continuation inexact.

    Raises:
        ValueError: the data differ, so that this would not be the same run.
    """
    if before["fingerprints"] != after["fingerprints"]:
        names = [n for n, sha in after["fingerprints"].items() if before["fingerprints"].get(n) != sha]
        raise ValueError(
            f"The data of this run have changed ({', '.join(names)}): its corpus or tokenizer is no longer what it was "
            "trained on. Bring the old text back, or start a run of another name (init_from keeps the weights)."
        )
    found = [f"{k} was {before.get(k)}, is {after[k]}" for k in ("device", "threads", "git_commit") if before.get(k) != after[k]]
    found += [
        f"{k} was {before['versions'].get(k)}, is {v}" for k, v in after["versions"].items() if before["versions"].get(k) != v
    ]
    return found


def record_environment(
    config: RunConfig,
    store: TokenStore,
    model: LanguageModel,
    device: torch.device,
    step: int,
    parent: Path | None,
    audited: dict[str, Any] | None,
) -> dict[str, Any]:
    """Write config.json and environment.json, and return the latter; when going on, warn of what makes that inexact.

    Args:
        audited: what the audit found before step 1; None keeps what it found when the run began.
    """
    run_dir = config.run_dir
    current, before = environment(store, device), read_json(run_dir / "environment.json")
    if before:
        for change in changes(before, current):
            warnings.warn(f"Going on may not be bit for bit: {change}.", stacklevel=2)
    current["init_from"] = str(parent) if parent else (before or {}).get("init_from")
    current["model"] = {
        "parameter_count": parameter_count(model),
        "active_parameter_count": active_parameter_count(model),
        "flops_per_token": flops_per_token(model),
    }
    current["audit"] = audited or (before or {}).get("audit")
    leaks = (current["audit"] or {}).get("leaks")
    session = {"from_step": step, "total_steps": config.total_steps, "started": utc_now()}
    current["sessions"] = [*(before["sessions"] if before else []), session]
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "results.json").unlink(missing_ok=True)  # those of fewer steps, if any
    write_json(run_dir / "environment.json", current)
    write_json(run_dir / "config.json", {**config.to_dict(), **({LEAKY: leaks} if leaks else {})})
    return current
