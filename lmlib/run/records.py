"""What a run records: the lines of metrics.jsonl, and what results.json says of the run."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmlib.config import RunConfig
from lmlib.errors import UserError
from lmlib.intervals import Estimate
from lmlib.leaks import LEAKY, LEAKY_NAME
from lmlib.text import format_duration, printable


@dataclass(frozen=True)
class Record:
    """One line of metrics.jsonl: what happened at a step.

    `kind` is "audit", "step", "eval", "sample", "checkpoint", "profile" or "done"; or "spike",
    "nonfinite", "out_of_memory". Values are attributes too: `record.loss`, `record.val_loss`. What
    depends on the clock or the machine is in `timing`, so that the rest repeats exactly.
    """
    kind: str
    step: int
    values: dict[str, Any]
    timing: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        fields = self.__dict__  # empty while a record is unpickled or copied
        found = {**fields.get("timing", {}), **fields.get("values", {})}
        if name not in found:
            raise AttributeError(f"a record of kind {fields.get('kind')!r} has no {name!r}")
        return found[name]

    def to_json(self) -> str:
        line = {"kind": self.kind, "step": self.step, **self.values, "timing": self.timing}
        return json.dumps(line)


def parse_record(line: str) -> Any:
    """Parse a line of metrics.jsonl; None if it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of a run as dicts; lines that cannot be parsed are left out."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
    return [record for record in map(parse_record, lines) if isinstance(record, dict)]


class Metrics:
    """metrics.jsonl, open for appending.

    It is truncated to the size that the checkpoint recorded: what came later will come again.
    """
    def __init__(self, path: Path, size: int):
        if size > (path.stat().st_size if path.exists() else 0):
            raise UserError(f"{path} is shorter than its checkpoint says, so it was edited or "
                            "truncated: restore it, or choose another run_name.")
        self.file = open(path, "ab")  # noqa: SIM115 (closed by `close`)
        self.file.truncate(size)

    def append(self, record: Record):
        self.file.write(record.to_json().encode() + b"\n")
        self.file.flush()

    def size(self) -> int:
        """Flush to disk and return the size in bytes."""
        os.fsync(self.file.fileno())
        return self.file.seek(0, os.SEEK_END)

    def close(self):
        self.file.close()


def describe(record: Record, total_steps: int) -> str:
    """Describe a record in one line of plain text."""
    r, at = record, f"Step {record.step}/{total_steps}"
    leaky = LEAKY_NAME if r.values.get(LEAKY) else ""
    if r.kind == "step":
        return (f"{at}: Loss={r.loss:.4f} | {r.tokens_per_second:,.0f} tokens/s | "
                f"{r.utilization:.0%} MFU | {format_duration(r.seconds_left)} left")
    if r.kind == "eval":
        return (f"   Val Loss: {r.val_loss:.4f}, Val Acc: {r.val_accuracy:.4f}, Perplexity: "
                f"{r.val_perplexity:.2f}, Bits per byte: {r.val_bits_per_byte:.4f}{leaky}")
    if r.kind == "audit" and r.leaks:
        return printable(f"⚠ This run LEAKS ({r.leaks}), which allow_leaks permits: its scores "
                         "are not those of a language model.")
    if r.kind == "audit":
        failed = ", ".join(name for name, text in r.verdicts.items() if not text.startswith("pass"))
        verdict = f"⚠ see {failed} in results.json" if failed else "passed"
        return f"Audit: {', '.join(r.verdicts)}: {verdict}"
    if r.kind == "sample":
        prompt, text = (json.dumps(part[0], ensure_ascii=False) for part in (r.prompts, r.texts))
        return printable(f"   Sample: {prompt} → {text}")
    if r.kind == "checkpoint":
        return f"💾 Checkpoint saved: {r.path}"
    if r.kind == "profile":
        first, last = r.val_loss_by_position[0], r.val_loss_by_position[-1]
        return f"   Validation loss at a window's first position: {first:.4f}, last: {last:.4f}"
    if r.kind == "done":
        scores = [f"Done: {r.step} steps, validation loss {r.val_loss:.4f}, bits per byte "
                  f"{r.val_bits_per_byte:.4f}"]
        if "test_loss" in r.values:
            scores.append(f"test loss {test_score(r.values)}, bits per byte "
                          f"{r.test_bits_per_byte:.4f}")
        return "; ".join(scores) + leaky
    if r.kind == "spike":
        return f"{at}: ⚠ the loss spiked to {r.loss:.4f} from about {r.usual_loss:.4f}"
    return f"{at}: ⚠ {r.kind} {r.values}"


def model_name(config: RunConfig) -> str:
    """Name the model as Experiment 8 does: attention_mlp_512d, moe_8e_2k_512d."""
    experts = f"moe_{config.num_experts}e_{config.num_experts_per_tok}k"
    kind = experts if config.feed_forward == "moe" else "mlp"
    return f"{'attention_' if config.attention == 'mla' else ''}{kind}_{config.hidden_size}d"


def test_score(results: dict[str, Any]) -> str:
    """Show a test loss with its interval: "3.98 ± 0.12 (95 %, 6 documents)"."""
    loss = Estimate(results["test_loss"], results["test_loss_stderr"], results["test_documents"])
    documents = f"{loss.clusters} document{'s' * (loss.clusters > 1)}"
    if (half := loss.half_width()) is None:
        return f"{loss.mean:.4f} ({documents}: no interval)"
    few = ", few documents" if loss.is_few else ""
    return f"{loss.mean:.4f} ± {half:.4f} (95 %, {documents}{few})"


def measured_on(config: RunConfig, store_info: dict[str, Any]) -> dict[str, Any]:
    """Say what the scores in results.json were measured on."""
    source = config.validation_corpus or f"documents of {config.corpus} not used for training"
    kind = "text ({}) that this run was watched and ranked by"
    scores = f"validation {kind.format(source)}"
    if config.split == "windows":
        scores = f"NOT held out (windows of {config.corpus} that overlap training windows)"
    windows = f"up to {config.validation_windows} windows of {config.sequence_length} tokens"
    found = {"scores": f"{scores}, {windows}, after the last step"}
    if config.has_test and config.score_test:
        found["test"] = f"test text ({source}) that chose nothing, {windows}, after the last step"
    unit = store_info["unit"]
    return {**found, "unit_of_standard_errors": unit,
            "held_out_share_of_tokens": store_info["held_out_share"],
            **{f"{split}_documents": store_info[split]["documents"]
               for split in ("training", "validation", "test")},
            "training_tokens": store_info["training"]["tokens"]}
