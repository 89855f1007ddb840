"""lmlib plan."""

import argparse

from lmlib.cli.train import load_config
from lmlib.text import format_duration


def plan(options: argparse.Namespace):
    """Print what a recipe needs by arithmetic, and what the arithmetic assumes."""
    if options.processes is not None:
        options.p.append(["processes", str(options.processes)])
    config = load_config(options)
    from lmlib.run import plan as planning  # imports torch
    machine = planning.MACHINES.get(options.gpu) or planning.this_machine()
    needs = planning.plan(config, machine, config.processes)
    where = f"on {needs.processes} x {machine.name}" if options.gpu else f"on {machine.name}"
    print(f"{config.run_name} {where}: {needs.parameters:,} parameters, {config.batch_size} x "
          f"{config.sequence_length} tokens a step. Arithmetic: nothing was trained.\n")
    _table("memory of each process" if needs.processes > 1 else "memory", "GB", needs.memory, 1e-9)
    print(f"  {'peak':28}{needs.peak / 1e9:10.3f}" + _fits(needs) + "\n")
    _table("a step", "ms", needs.seconds, 1000)
    print(f"  {'together':28}{needs.step_seconds * 1000:10.3f}\n")
    seconds = needs.step_seconds * config.total_steps
    print(f"{config.total_steps:,} steps: {format_duration(seconds)} of updates, evaluations and "
          f"saves left out; {needs.disk / 1e9:.2f} GB of checkpoints.")
    kind = str(machine.dtype).removeprefix("torch.")
    print(f"Assumed: {machine.utilization:.0%} of {machine.flops / 1e12:.3g} TFLOP/s in {kind}, "
          f"{machine.bandwidth / 1e9:,.0f} GB/s of memory,\n{machine.launch * 1e6:.0f} "
          "microseconds to start a kernel, which overlaps with the rest, and "
          f"{machine.link_of(needs.processes) / 1e9:,.3g} GB/s between\nprocesses, which does not.")


def _table(title: str, unit: str, values: dict[str, float], scale: float):
    print(f"{title:30}{unit:>10}")
    for name, value in values.items():
        if value:
            print(f"  {name:28}{value * scale:10.3f}")


def _fits(needs) -> str:
    """Say whether the memory suffices, and what to set if not."""
    from lmlib.run.plan import largest_micro_batch
    memory = needs.machine.memory
    if memory is None:
        return ""
    if needs.peak < 0.9 * memory:
        return f"   of {memory / 1e9:.0f}: fits"
    rows = largest_micro_batch(needs)
    return f"   of {memory / 1e9:.0f}: does not fit" + (
        f"; with micro_batch_size {rows} it does" if rows else
        ", not even one window at a time: use several processes or a smaller model")
