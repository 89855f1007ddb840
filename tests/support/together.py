"""Train several runs in the processes of one launch: `python together.py JSON [PROCESSES]`.

JSON is a list of objects with what each run changes in the smoke recipe. "plant" names a fault to
plant, "differ" what is different on rank 1, and "leave_at" the step at which the consumer leaves.
"""

import json
import sys
from collections.abc import Callable

import torch

from lmlib import distributed, optim, training
from lmlib.config import RunConfig
from lmlib.errors import UserError
from lmlib.files import PROJECT_ROOT
from lmlib.optim import orthogonalize
from lmlib.run import gradients, parallel, together

EXACT = {"deterministic": True, "micro_batch_size": 1, "batch_size": 8, "total_steps": 6}
EXACT |= {"eval_every": 3, "checkpoint_every": 3, "validation_windows": 5, "dropout": 0.1}


def plant(fault: str) -> Callable[[], None]:
    """Break what makes the result independent of the number of processes; returns the undoing."""
    seed, add_up = gradients.dropout_seed, distributed.add_up
    where, name, broken = {
        "all_reduce": (distributed, "_tree_sum", distributed._all_reduce),
        "dropout": (gradients, "dropout_seed", lambda *key: seed(*key[:2], distributed.rank())),
        "router": (distributed, "add_up", lambda t: t if t.dtype == torch.int64 else add_up(t)),
        "order": (gradients.PairwiseSum, "add", _add_in_turn),
        "pieces": (optim, "orthogonalize", _orthogonalize_pieces),
        "norm": (torch, "_foreach_norm", _norms_of_pieces),
        "means": (parallel.Shards, "sum_gradients", lambda self, exact: None),
        "": (sys, "argv", sys.argv),
    }[fault]
    whole = getattr(where, name)
    setattr(where, name, broken)
    return lambda: setattr(where, name, whole)


def _add_in_turn(self, tensors: list, addends: int = 1):
    self.partial.append((addends, tensors))
    if len(self.partial) == 2:
        self.partial = [(addends, self._join(self.partial.pop()[1]))]


def _orthogonalize_pieces(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Do what Muon would do if each process updated its piece of a matrix."""
    pieces = matrix.chunk(distributed.world_size(), dim=-2)
    return torch.cat([orthogonalize(piece, dtype) for piece in pieces], dim=-2)


def _norms_of_pieces(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    norms = ([part.norm() for part in t.chunk(distributed.world_size())] for t in tensors)
    return [torch.stack(parts).norm() for parts in norms]


def differ(what: str, changes: dict) -> dict:
    """Make rank 1 different; returns what its run changes in the recipe."""
    if distributed.rank() == 0:
        return changes
    if what == "threads":
        torch.set_num_threads(3)
    if what == "commit":
        together.git_commit = lambda: "another"
    return {
        "folder": {**changes, "output_dir": changes["output_dir"] + "/another"},
        "learning_rate": {**changes, "learning_rate": 0.5},
    }.get(what, changes)


def main() -> int:
    sys.modules["matplotlib"] = sys.modules["plotly"] = None  # drawing takes seconds for each run
    refused = False
    with distributed.join():
        for changes in json.loads(sys.argv[1]):
            undo = plant(changes.pop("plant", ""))
            leave_at = changes.pop("leave_at", None)
            changes = differ(changes.pop("differ", ""), changes)
            config = RunConfig.load(PROJECT_ROOT / "params" / "smoke.yaml", **changes)
            try:
                for record in training.train(config):
                    if record.kind == "step" and record.step == leave_at:
                        break
            except UserError as error:  # of all ranks
                print(f"Rank {distributed.rank()}: {error}", file=sys.stderr)
                refused = True
            undo()
    return int(refused)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        from lmlib.cli.launch import run_processes

        sys.exit(run_processes(int(sys.argv[2]), [__file__, sys.argv[1]]))
    sys.exit(main())
