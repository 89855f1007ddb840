"""lmlib plan."""

import argparse
import textwrap

from lmlib.cli.train import load_config
from lmlib.text import format_duration


def plan(options: argparse.Namespace):
    """Print what a recipe needs by arithmetic, and what the arithmetic assumes."""
    if options.processes is not None:
        options.p.append(["processes", str(options.processes)])
    config = load_config(options)
    from lmlib.run import plan as planning  # imports torch
    needs = planning.plan(config, planning.MACHINES.get(options.gpu), config.processes)
    machine = needs.machine
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
    speed = _speed(needs, needs.dtype)
    if needs.dtype != machine.dtype and needs.seconds["Muon's products"]:
        speed += f", of {_speed(needs, machine.dtype)} for Muon's products"
    print(textwrap.fill(
        f"Assumed: {machine.utilization:.0%} of {speed}, {machine.bandwidth / 1e9:,.0f} GB/s of "
        f"memory, {machine.launch * 1e6:.0f} microseconds to start a kernel, which overlaps with "
        f"the rest, and {machine.link_of(needs.processes) / 1e9:,.3g} GB/s between processes, "
        "which does not.", 100))


def _speed(needs, dtype) -> str:
    """Say how fast the machine multiplies, and in which type."""
    kind = str(dtype).removeprefix("torch.")
    is_tf32 = kind == "float32" and str(needs.machine.dtype) == "torch.bfloat16"
    return f"{needs.machine.flops[dtype] / 1e12:.3g} TFLOP/s in {kind}" + " (TF32)" * is_tf32


def _table(title: str, unit: str, values: dict[str, float], scale: float):
    print(f"{title:30}{unit:>10}")
    for name, value in values.items():
        if value:
            print(f"  {name:28}{value * scale:10.3f}")


def _fits(needs) -> str:
    """Say whether the memory suffices, and what to set if not."""
    from lmlib.run.plan import fits_divided, is_divided, largest_micro_batch
    memory = needs.machine.memory
    if memory is None:
        return ""
    said = f"   of {memory / 1e9:.0f}: "
    if needs.fits:
        return said + "fits"
    if rows := largest_micro_batch(needs):
        return said + f"does not fit; with micro_batch_size {rows} it does"
    said += "does not fit, not even one window at a time: "
    if not fits_divided(needs):
        return said + "use a smaller model or a shorter sequence_length"
    if is_divided(needs.config, needs.processes):
        return said + "use more processes or a smaller model"
    return said + "set sharding to full and use several processes, or use a smaller model"
