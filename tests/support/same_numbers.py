"""Check that a change of the code changes no number.

    python tests/support/same_numbers.py COMMIT

The smoke recipe is trained with both attentions, both feed-forwards and both optimizers, once by
the code of that commit (in a git worktree) and once by the code here. Weights and optimizer state
must have the same SHA-256, and the metrics must be equal, without `timing` and the audit.
A run started by the old code and killed must resume under the code here to the identical end.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from fingerprint import fingerprint

HERE = Path(__file__).resolve().parents[2]
CHOICES = {
    "attention": ("mla", "mha"),
    "feed_forward": ("mlp", "moe"),
    "optimizer": ("muon", "adamw"),
}
COMBINATIONS = [
    dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())
]

TRAIN = """
import json, os, sys, warnings
import lmlib
assert lmlib.__file__.startswith(os.getcwd()), lmlib.__file__
warnings.simplefilter("ignore")
for run in json.loads(sys.argv[1]):
    kill_after = run.pop("kill_after", None)
    for record in lmlib.train(lmlib.RunConfig.load("params/smoke.yaml", **run)):
        if kill_after and record.kind == "step" and record.step == kill_after:
            os._exit(9)
"""


def train(tree: Path, runs: list[dict]):
    """Train runs one after another in a process that imports lmlib from `tree`."""
    command = [sys.executable, "-c", TRAIN, json.dumps(runs)]
    env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    status = subprocess.run(command, cwd=tree, env=env).returncode
    if status != (9 if "kill_after" in runs[-1] else 0):
        raise SystemExit(f"Training in {tree} ended with exit status {status}.")


def numbers(run_dir: Path) -> dict:
    """Return the run's fingerprint without the audit, which other code makes again on resume."""
    found = fingerprint(run_dir)
    found["metrics"] = [record for record in found["metrics"] if record["kind"] != "audit"]
    for name in ("audit", "measured_on"):
        found["results"].pop(name)
    return found


def main():
    [commit] = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        tree, outputs = (
            Path(folder, "tree"),
            {side: Path(folder, side) for side in ("old", "new", "resumed")},
        )
        git = ["git", "-C", str(HERE), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            names = ["-".join(choice.values()) for choice in COMBINATIONS]
            runs = {
                side: [
                    {**choice, "run_name": name, "output_dir": str(path)}
                    for choice, name in zip(COMBINATIONS, names, strict=True)
                ]
                for side, path in outputs.items()
            }
            train(tree, runs["old"])
            train(HERE, runs["new"])
            resumed = [runs["resumed"][0], runs["resumed"][3]]
            for run in resumed:
                train(tree, [{**run, "kill_after": 13}])
            train(HERE, resumed)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
        rows = [(name, "new", name) for name in names] + [
            (f"{run['run_name']}, killed and resumed", "resumed", run["run_name"])
            for run in resumed
        ]
        failed = 0
        for label, side, name in rows:
            old, new = numbers(outputs["old"] / name), numbers(outputs[side] / name)
            same = {part: old[part] == new[part] for part in old}
            failed += not all(same.values())
            print(
                f"{label:<34}",
                *(
                    f"{part}: {'identical' if equal else 'DIFFERENT'}"
                    for part, equal in same.items()
                ),
            )
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
