"""What two identical runs have in common."""

import hashlib
import json
from pathlib import Path

TIMED = ("training_time_minutes", "tokens_per_second")


def fingerprint(run_dir: Path) -> dict:
    """Return the SHA-256 of each tensor file, and the records and results without timing."""
    tensors = {
        path.relative_to(run_dir).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in run_dir.rglob("*.safetensors")
    }
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((run_dir / "results.json").read_text())
    return {
        "tensors": tensors,
        "metrics": [{k: v for k, v in line.items() if k != "timing"} for line in lines],
        "results": {k: v for k, v in results.items() if k not in TIMED},
    }
