"""lmlib sweep and find-rate."""

import argparse
import signal
from typing import Any, get_type_hints

from lmlib.config import RunConfig
from lmlib.parameters import parse_overrides
from lmlib.text import printable


def sweep(options: argparse.Namespace) -> int:
    if options.jobs is not None and options.jobs < 1:
        raise ValueError(f"--jobs is {options.jobs}; it must be 1 or more")
    if short := [given[0] for given in options.p if len(given) < 2]:
        raise ValueError(f"-p {short[0]} has no value: write -p NAME VALUE, or several values, as in -p seed 0 1 2")
    pairs: dict[str, list[Any]] = {}
    for name, *values in options.p:
        pairs.setdefault(name, []).extend(parse_overrides([(name, value)], get_type_hints(RunConfig))[name] for value in values)
    from lmlib.sweep.grid import plan

    return report(plan(options.params, pairs), options.jobs)


def report(configs: list[RunConfig], jobs: int | None) -> int:
    """Run a sweep and say how each run ended; 1 if one failed."""
    from lmlib.analysis import ranking
    from lmlib.sweep.launch import sweep

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"{len(configs)} runs in {', '.join(sorted({str(config.run_dir.parent) for config in configs}))}.", flush=True)
    failed = 0
    for number, outcome in enumerate(sweep(configs, jobs), 1):
        failed += outcome.state == "failed"
        said = f": {printable(outcome.said)}" if outcome.state == "failed" else ""
        print(f"[{number}/{len(configs)}] {outcome.config.run_name}  {outcome.state}{said}", flush=True)
    print("\n" + ranking.difference([c.run_dir for c in configs if (c.run_dir / "results.json").exists()]))
    return 1 if failed else 0


def find_rate(options: argparse.Namespace) -> int:
    config = RunConfig.load(options.params, **parse_overrides(options.p, get_type_hints(RunConfig)))
    from lmlib.sweep.learning_rate import candidates, find_learning_rate

    found = find_learning_rate(config)
    for factor, loss in list(zip(found.factors, found.losses, strict=True))[:: max(1, len(found.factors) // 20)]:
        print(f"{factor:8.3g} x the recipe's rates: loss {loss:.4f}")
    if not found.suggestion:
        raise ValueError("The loss did not fall at any rate: nothing to suggest.")
    print("Suggested:", " ".join(f"-p {name} {rate:g}" for name, rate in found.suggestion.items()), flush=True)
    return report(candidates(found, options.confirm), None) if options.confirm else 0
