"""Versions, machine and data of a run: environment.json, and what differs when it resumes."""

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

PACKAGES = ("lmlib", "torch", "transformers", "tokenizers", "datasets", "safetensors", "numpy")


def environment(store: TokenStore, device: torch.device) -> dict[str, Any]:
    """Describe what is installed, the machine and the data."""
    return {
        "versions": {"python": platform.python_version(),
                     **{name: _installed(name) for name in PACKAGES}},
        "git_commit": _git_commit(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "corpus": {name: store.info[name] for name in ("training", "held-out", "held_out_share")},
        "fingerprints": store.info["sha256"],
    }


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of lmlib's code, marked if files differ from it; None without git."""
    try:
        git = ["git", "-C", str(PROJECT_ROOT)]
        commit, changed = (
            subprocess.run([*git, *arguments], capture_output=True, text=True, check=True).stdout
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "lmlib"]))
        return commit.strip() + (" (changed)" if changed.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name"))
        return name.split(":", 1)[1].strip()
    except (OSError, StopIteration):
        return platform.processor() or sys.platform


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """List what differs from the environment that a run began in, which makes resuming inexact.

    Raises:
        ValueError: the data differ, so that this would not be the same run.
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


def record_session(config: RunConfig, store: TokenStore, model: LanguageModel,
                   device: torch.device, step: int, parent: Path | None,
                   audited: dict[str, Any] | None) -> dict[str, Any]:
    """Write config.json and environment.json, and return the latter.

    On resume, warn of each difference that makes it inexact.

    Args:
        step: updates made so far.
        parent: the model folder that the run was initialized from, if it starts now.
        audited: what the audit found before step 1; None keeps what the run has recorded.
    """
    run_dir, current = config.run_dir, environment(store, device)
    before = read_json(run_dir / "environment.json")
    if before:
        for difference in differences(before, current):
            warnings.warn(f"Resuming may not be bit-identical: {difference}.", stacklevel=2)
    before = before or {}
    current["init_from"] = str(parent) if parent else before.get("init_from")
    current["model"] = {
        "parameter_count": parameter_count(model),
        "active_parameter_count": active_parameter_count(model),
        "flops_per_token": flops_per_token(model),
    }
    current["audit"] = audited or before.get("audit")
    session = {"from_step": step, "total_steps": config.total_steps, "started": utc_now()}
    current["sessions"] = [*before.get("sessions", []), session]
    leaks = (current["audit"] or {}).get("leaks")
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "results.json").unlink(missing_ok=True)  # those of fewer steps
    write_json(run_dir / "environment.json", current)
    write_json(run_dir / "config.json",
               {**config.to_dict(), **({LEAKY: leaks} if leaks else {})})
    return current
