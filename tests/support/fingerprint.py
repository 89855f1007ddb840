"""What two runs that are the same have in common."""

import hashlib
import json
from pathlib import Path


def fingerprint(run_dir: Path) -> dict:
    """Hashes of all tensors on disk, and the metrics and results without their times."""
    tensors = {
        path.relative_to(run_dir).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in run_dir.rglob("*.safetensors")
    }
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((run_dir / "results.json").read_text())
    timed = ("training_time_minutes", "tokens_per_second")
    return {
        "tensors": tensors,
        "metrics": [{k: v for k, v in line.items() if k != "timing"} for line in lines],
        "results": {k: v for k, v in results.items() if k not in timed},
    }
