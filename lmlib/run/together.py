"""What the processes of a run must agree on before they start; nothing in one process."""

import os
from functools import partial

import torch

from lmlib import distributed
from lmlib.config import RunConfig
from lmlib.data.tokens import TokenStore
from lmlib.data.verify import data_hash
from lmlib.errors import UserError
from lmlib.files import resolve_path
from lmlib.run.environment import git_commit, source_hash
from lmlib.run.start import Start, open_store


def open_together(start: Start) -> TokenStore:
    """Open the run's tokens, which rank 0 prepares while the others wait.

    Raises a UserError on every process if they cannot train this run together.
    """
    if distributed.world_size() == 1:
        return open_store(start)
    distributed.agree(partial(check_processes, start.config, distributed.world_size()))
    _check_folder(start.config)
    fixed = {name: value for name, value in start.config.to_dict().items() if name != "device"}
    distributed.check_equal({
        **fixed, "checkpoint": start.step, "commit": git_commit(), "code": source_hash(),
        "torch": torch.__version__,
        "device": start.device.type, "dtype": str(start.dtype), "threads": torch.get_num_threads()})
    opened: list[TokenStore] = []
    distributed.agree(lambda: opened.append(open_store(start)), only_first=True, patient=True)
    store = distributed.agree(lambda: opened[0] if opened else open_store(start), patient=True)
    distributed.check_equal({"data": data_hash(store.info)})
    return store


def check_processes(config: RunConfig, count: int):
    """Raise a UserError that says what to change if so many processes cannot train this run."""
    batch, micro = config.batch_size, config.micro_batch_size
    if count > 1 and config.device.startswith(("cuda:", "mps")):
        raise UserError(f"device is {config.device}: several processes cannot share one GPU. Set "
                        "device to cuda, cpu or auto.")
    if config.deterministic and micro is None:
        sizes = (n for n in range(batch // count, 0, -1) if -(-batch // n) % count == 0)
        size = next((f", as in {n}" for n in sizes), "")
        raise UserError("Several processes with deterministic: true need a micro_batch_size, which "
                        f"decides the result: set it to {batch} / processes or less{size}.")
    if config.deterministic and count & (count - 1):
        raise UserError(f"There are {count} processes; deterministic: true needs 1, 2, 4, 8 or "
                        "another power of two.")
    micro_batches = -(-batch // micro) if micro else batch
    if micro_batches % count:
        works = [n for n in range(1, micro_batches + 1) if micro_batches % n == 0
                 and not (config.deterministic and n & (n - 1))]
        what = (f"{micro_batches} micro-batches of {micro} windows" if micro
                else f"{batch} windows (batch_size)")
        raise UserError(f"{count} processes cannot share {what} equally: use "
                        f"{', '.join(map(str, works))}, or change batch_size or micro_batch_size.")


def _check_folder(config: RunConfig):
    """Raise a UserError if a process does not see the output folder of rank 0."""
    folder = resolve_path(config.output_dir).absolute()

    def make() -> str:
        marks = folder / ".locks"
        marks.mkdir(parents=True, exist_ok=True)
        name = f"seen-{os.getpid()}"
        (marks / name).touch()
        return name

    def look():
        if not (folder / ".locks" / name).exists():
            raise UserError(f"The output folder {folder} is not that of rank 0. All machines must "
                            "share it, under the same path.")

    name = distributed.agree(make, only_first=True)
    distributed.agree(look)
    if distributed.is_first():
        (folder / ".locks" / name).unlink(missing_ok=True)
