"""Records of a run."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmlib.leaks import LEAKY, LEAKY_NAME
from lmlib.text import format_duration, printable


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


def parse_record(line: str) -> Any:
    """What a line of metrics.jsonl says, whatever it is; None where it is no JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def describe(record: Any, total_steps: int) -> str:
    """A record as a line of plain text."""
    leaky = LEAKY_NAME if record.values.get(LEAKY) else ""
    if record.kind == "step":
        return (
            f"Step {record.step}/{total_steps}: Loss={record.loss:.4f} | {record.tokens_per_second:,.0f} tokens/s"
            f" | {record.utilization:.0%} of peak | {format_duration(record.seconds_left)} left"
        )
    if record.kind == "audit":
        if record.leaks:
            return printable(f"⚠ This run LEAKS ({record.leaks}), and was allowed to: no score of it is a language model's.")
        failed = [name for name, verdict in record.verdicts.items() if not verdict.startswith("pass")]
        return f"Audit: {', '.join(record.verdicts)}: " + (f"⚠ see {', '.join(failed)} in results.json" if failed else "passed")
    if record.kind == "eval":
        return (
            f"   Val Loss: {record.val_loss:.4f}, Val Acc: {record.val_accuracy:.4f},"
            f" Perplexity: {record.val_perplexity:.2f}, Bits per byte: {record.val_bits_per_byte:.4f}{leaky}"
        )
    if record.kind == "sample":
        prompt, text = (json.dumps(part[0], ensure_ascii=False) for part in (record.prompts, record.texts))
        return printable(f"   Text: {prompt} → {text}")
    if record.kind == "checkpoint":
        return f"💾 Checkpoint saved: {record.path}"
    if record.kind == "profile":
        first, last = record.val_loss_by_position[0], record.val_loss_by_position[-1]
        return f"   Held-out loss at the first position of a window: {first:.4f}, at the last: {last:.4f}"
    if record.kind == "done":
        return (
            f"Done: {record.step} steps, held-out loss {record.val_loss:.4f}, bits per byte {record.val_bits_per_byte:.4f}{leaky}"
        )
    if record.kind == "spike":
        return f"Step {record.step}/{total_steps}: ⚠ the loss leapt to {record.loss:.4f} from about {record.usual_loss:.4f}"
    return f"Step {record.step}/{total_steps}: ⚠ {record.kind} {record.values}"
