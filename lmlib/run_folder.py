"""A run's folder: who may write to it, whether it was made with these parameters, and what it records."""

import fcntl
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lmlib.config import LEAKY, PROJECT_ROOT, RunConfig
from lmlib.data import TokenStore

# What may differ when a run is continued; a change of anything else would make another run of it.
MAY_CHANGE = {"total_steps", "log_every", "eval_every", "checkpoint_every", "device", "output_dir"}
ONLY_MLA = {"q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rope_interleave"}
ONLY_MOE = {"num_experts", "num_experts_per_tok", "moe_intermediate_size"}


@dataclass(frozen=True)
class Record:
    """One line of metrics.jsonl: what happened at a step.

    `kind` is "audit", "step", "eval", "sample", "checkpoint", "profile" or "done" (or "spike", "nonfinite", "out_of_memory").
    Its values are attributes too: `record.loss`, `record.val_loss`. What depends on clock or machine stands in `timing`.
    """

    kind: str
    step: int
    values: dict[str, Any]
    timing: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        for values in (self.__dict__.get("values", {}), self.__dict__.get("timing", {})):
            if name in values:
                return values[name]
        raise AttributeError(f"a record of kind {self.__dict__.get('kind')!r} has no {name!r}")

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind, "step": self.step, **self.values, "timing": self.timing})


class Metrics:
    """metrics.jsonl, opened at the byte that a checkpoint recorded: all that came after it is forgotten."""

    def __init__(self, path: Path, size: int):
        if size > (path.stat().st_size if path.exists() else 0):
            raise ValueError(f"{path} is shorter than its checkpoint says; it was changed by hand.")
        self.file = open(path, "ab")  # noqa: SIM115 (closed by `close`)
        self.file.truncate(size)

    def append(self, record: Record):
        self.file.write(record.to_json().encode() + b"\n")
        self.file.flush()

    def size(self) -> int:
        """Bytes so far, flushed to disk."""
        os.fsync(self.file.fileno())
        return self.file.seek(0, os.SEEK_END)

    def close(self):
        self.file.close()


def parsed(line: str) -> Any:
    """What a line of metrics.jsonl says, whatever it is; None where it is no JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def writer(run_dir: Path) -> str | None:
    """The process that holds the run, as "pid on machine"; None if none does."""
    try:
        file = open(run_dir.parent / ".locks" / f"{run_dir.name}.lock")  # noqa: SIM115 (closed below)
    except OSError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except OSError:
            return file.read().strip() or "unknown"


def _take(file: Any):
    """Lock a file, waiting a moment for one who only looks whether it is locked; OSError if somebody holds it."""
    for _ in range(5):
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.02)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def one_writer(run_dir: Path) -> Iterator[None]:
    """Hold the run for this process. The system drops the lock with the process, so a stale one is no obstacle.

    Raises:
        ValueError: another process holds it; its pid is named.
    """
    path = run_dir.parent / ".locks" / f"{run_dir.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            _take(file)
        except OSError:
            file.seek(0)
            raise ValueError(
                f"{run_dir} is being written by process {file.read().strip() or 'unknown'}; "
                "stop that one first, or choose another run_name."
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        yield


BEAT = 5.0  # seconds between two signs of life


@contextmanager
def heartbeat(run_dir: Path) -> Iterator[None]:
    """While the run goes on, renew heartbeat.json every BEAT seconds, from a thread, so that whoever sees the folder can
    tell it from a dead one; removed at the end, left behind by a kill."""
    path, ended = run_dir / "heartbeat.json", threading.Event()
    sign = json.dumps({"pid": os.getpid(), "machine": platform.node(), "started": now()})

    def beat():
        while True:
            with suppress(OSError):  # a full disk is the saver's to report
                path.write_text(sign)
            if ended.wait(BEAT):
                return

    thread = threading.Thread(target=beat, daemon=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):
            path.unlink(missing_ok=True)
            run_dir.rmdir()  # if nothing came of it


def life(run_dir: Path) -> str:
    """A run's state: "finished", "running", "died" (its last sign of life is old, or its process gone), "stopped", "empty"."""
    try:
        age = time.time() - (run_dir / "heartbeat.json").stat().st_mtime
    except OSError:
        age = math.inf
    try:
        sign = read_json(run_dir / "heartbeat.json")
    except ValueError:  # caught half-written
        sign = None
    if age < math.inf:
        here = isinstance(sign, dict) and sign.get("machine") == platform.node()
        if writer(run_dir) is not None if here else age < 6 * BEAT:
            return "running"
    if (run_dir / "results.json").exists():
        return "finished"
    if age < math.inf:
        return "died"
    return "stopped" if (run_dir / "metrics.jsonl").exists() else "empty"


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


def continued(config: RunConfig) -> RunConfig:
    """`config`, with what it leaves open taken from the run that stands in its folder, if one does.

    Raises:
        ValueError: that run was made with other parameters; each is named with both values.
    """
    recorded = read_json(config.run_dir / "config.json")
    if recorded is None:
        return config
    for name in ("vocab_size", "init_step"):
        if getattr(config, name) is None and recorded.get(name) is not None:
            config = replace(config, **{name: recorded[name]})
    recorded = {**RunConfig().to_dict(), **recorded}  # a parameter that came later had its default
    different = [
        f"{name} is {value!r} and was {recorded[name]!r}" for name, value in fixed(config).items() if value != recorded[name]
    ]
    if config.total_steps < recorded["total_steps"]:
        different.append(f"total_steps is {config.total_steps} and was {recorded['total_steps']}; it may only grow")
    if different:
        raise ValueError(
            f"{config.run_dir} holds a run made with other parameters:\n"
            + "\n".join(f"  - {line}" for line in different)
            + "\nChoose another run_name, or give these the values they had."
        )
    return config


def finished(config: RunConfig) -> dict[str, Any] | None:
    """results.json, if the run in the folder has made all the steps that are asked for."""
    results = read_json(config.run_dir / "results.json")
    return results if isinstance(results, dict) and results.get("total_steps") == config.total_steps else None


def run_key(config: RunConfig) -> str:
    """What makes this run itself: a hash of the fixed parameters that differ from their defaults."""
    defaults = RunConfig().to_dict()
    own = {name: value for name, value in fixed(config).items() if value != defaults[name]}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def known_leaks(folder: Path) -> str:
    """The checks that the model in a run's folder or a checkpoint failed and was allowed to, as text; "" for an honest one."""
    try:
        recorded = read_json(folder / "config.json")
    except ValueError:
        return ""
    return str(recorded.get(LEAKY, "")) if isinstance(recorded, dict) else ""


def recorded_key(run_dir: Path) -> str | None:
    """The `run_key` of the run that stands in a folder; None where its config.json does not tell."""
    try:
        recorded = read_json(run_dir / "config.json")
        return run_key(RunConfig(**{n: v for n, v in recorded.items() if n != LEAKY})) if recorded else None
    except (ValueError, TypeError):
        return None


def fixed(config: RunConfig) -> dict[str, Any]:
    """The parameters that a run keeps for life: all that it uses but those that may change."""
    left_out = MAY_CHANGE | unused(config.attention, config.feed_forward)
    return {name: value for name, value in config.to_dict().items() if name not in left_out}


def unused(attention: str, feed_forward: str) -> set[str]:
    """The parameters that a model of this kind ignores."""
    return (ONLY_MLA if attention == "mha" else set()) | ({"intermediate_size"} if feed_forward == "moe" else ONLY_MOE)


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


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs from the environment that a run was begun in and makes its continuation inexact.

    Raises:
        ValueError: the data differ, so that this would not be the same run.
    """
    if before["fingerprints"] != now["fingerprints"]:
        names = [n for n, sha in now["fingerprints"].items() if before["fingerprints"].get(n) != sha]
        raise ValueError(
            f"The data of this run have changed ({', '.join(names)}): its corpus or tokenizer is no longer what it was "
            "trained on. Bring the old text back, or start a run of another name (init_from keeps the weights)."
        )
    found = [f"{k} was {before.get(k)}, is {now[k]}" for k in ("device", "threads", "git_commit") if before.get(k) != now[k]]
    found += [
        f"{k} was {before['versions'].get(k)}, is {v}" for k, v in now["versions"].items() if before["versions"].get(k) != v
    ]
    return found


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
