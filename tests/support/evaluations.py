"""Run folders with evaluation files, written by hand."""

import json
from pathlib import Path

Rows = dict[str, list[tuple[float, int, int]]]  # document -> nats, tokens, bytes in each window


def write_evaluation(
    run_dir: Path, rows: Rows, step: int = 10, split: str = "validation", **header
):
    """Write evaluations/<split>_step_<step>.json: each document's rows in windows of their own."""
    content = {
        "split": split,
        "step": step,
        "unit": "documents",
        "data": "d0",
        "sequence_length": 8,
        "windows": 4,
        "clusters": list(rows),
        **{
            name: []
            for name in ("window", "document", "cluster", "nats", "hits", "tokens", "bytes")
        },
    } | header
    for cluster, entries in enumerate(rows.values()):
        for nats, tokens, size in entries:
            values = (len(content["window"]), cluster, cluster, nats, tokens // 2, tokens, size)
            for name, value in zip(list(content)[-7:], values, strict=True):
                content[name].append(value)
    folder = run_dir / "evaluations"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}_step_{step}.json").write_text(json.dumps(content))


def write_run(folder: Path, name: str, rows: Rows, leaks: str = "", **header) -> Path:
    """Write a run folder that holds a config and one evaluation."""
    run_dir = folder / name
    write_evaluation(run_dir, rows, **header)
    config = {"run_name": name} | ({"lmlib_leaky": leaks} if leaks else {})
    (run_dir / "config.json").write_text(json.dumps(config))
    return run_dir


def documents(losses: list[float], sizes: list[int] | None = None, byte_count: int = 3) -> Rows:
    """Return documents with these losses in nats per token, each in two windows."""
    sizes = sizes or [10 * (2 + number) for number in range(len(losses))]
    return {
        f"{number:016x}": [(loss * size, size, size * byte_count), (loss, 1, byte_count)]
        for number, (loss, size) in enumerate(zip(losses, sizes, strict=True))
    }
