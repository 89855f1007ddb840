"""The terminal: python -m lmlib train | notebook | sweep | find-rate | generate | audit | checkpoints | runs | stop."""

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from lmlib.config import LEAKY, PROJECT_ROOT, RunConfig, parse_overrides, printable, read_parameters, resolve_path


def main(arguments: list[str] | None = None) -> int:
    """Run one command; what a user can cause ends in a sentence on standard error and exit status 1."""
    options = parser().parse_args(arguments)
    try:
        return options.command(options) or 0
    except KeyboardInterrupt as stopped:
        print("\n" + (printable(str(stopped)) or "Interrupted."), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"Error: {printable(str(error))}", file=sys.stderr)
        return 1


# generation.Settings, as text: naming them here keeps --help free of torch
SETTINGS = {
    **{"max_new_tokens": "100", "temperature": "0.8", "top_k": "50", "top_p": "0.95", "seed": "0", "min_p": "none"},
    **{"repetition_penalty": "1.0", "stop_strings": "none", "ignore_eos": "false", "past_window": "slide"},
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m lmlib", description="Train, watch and use small language models.")
    commands = top.add_subparsers(required=True, metavar="command")

    def add(name: str, function: Any, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(command=function)
        return command

    for name, function, help in (
        ("train", train, "train a recipe, or go on training it"),
        ("notebook", notebook, "the same by papermill, leaving the executed notebook in the run's folder"),
    ):
        command = add(name, function, help)
        command.add_argument("params", nargs="?", default="params/quickstart.yaml", help="a recipe in params/")
        command.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter")

    command = add("generate", generate, "write text with a run's model")
    command.add_argument("run", help="a run's folder, a checkpoint, or a Hugging Face folder")
    command.add_argument("--step", type=int, help="which checkpoint (the newest)")
    command.add_argument("--mode", choices=("interactive", "batch"), help="(interactive; batch if there are prompts)")
    command.add_argument("--prompts", nargs="+", default=[], help="prompts of batch mode; - reads lines of standard input")
    command.add_argument("--prompts-file", metavar="FILE", help="a prompt a line; - for standard input")
    command.add_argument("--output", metavar="FILE", help="where batch mode writes (standard output)")
    command.add_argument("--format", choices=("text", "jsonl"), help="of batch mode (text; jsonl if the output's name says so)")
    for name, default in SETTINGS.items():
        command.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE", help=f"({default})")

    command = add("sweep", sweep, "train every recipe, or every combination of parameters, by papermill")
    command.add_argument("params", nargs="+", help="recipes")
    command.add_argument("-p", nargs="+", action="append", default=[], metavar=("NAME", "VALUE"), help="values of a parameter")
    command.add_argument("--jobs", type=int, help="runs at once (one a CUDA device; else one)")

    command = add("find-rate", find_rate, "try learning rates of every size on a copy of the model, and suggest one")
    command.add_argument("params", nargs="?", default="params/quickstart.yaml", help="a recipe in params/")
    command.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter")
    command.add_argument(
        "--confirm", type=int, metavar="STEPS", help="then train so many steps with the suggestion and beside it"
    )

    command = add("audit", audit, "can its numbers be trusted: a verdict a line, and a page with pictures")
    command.add_argument("source", help="a run's folder, a checkpoint, a Hugging Face folder or id")
    command.add_argument("--step", type=int, help="which checkpoint (the newest)")
    command.add_argument("--page", metavar="FILE.html", help="where the page goes (a run's: audit.html in its folder)")

    add("checkpoints", checkpoints, "list a run's checkpoints").add_argument("run")
    add("runs", runs, "list the runs").add_argument("output_dir", nargs="?", default="outputs")
    add("stop", stop, "ask a run to save and stop, from anywhere").add_argument("run")
    return top


# ---------------------------------------------------------------------------------------------------
# Training


def train(options: argparse.Namespace):
    config = RunConfig.load(options.params, **parse_overrides(options.p))
    from lmlib import figures, run_folder, session, training

    print(session.greeting(config), flush=True)
    if run_folder.finished(config):
        return
    try:
        for record in training.train(config):
            print(figures.describe(record, config.total_steps), flush=True)
    except KeyboardInterrupt:
        figures.save_curves(config.run_dir)
        raise


def notebook(options: argparse.Namespace):
    """Check every parameter, then let papermill run train.ipynb into the run's folder."""
    given = {**read_parameters(options.params), **parse_overrides(options.p)}
    config = RunConfig(**given)
    from lmlib import run_folder

    executed = config.run_dir.absolute() / "train.ipynb"
    if run_folder.finished(run_folder.continued(config)) and executed.exists():
        print(
            f"{config.run_dir} is finished: {config.total_steps} steps, and {executed.name} is left as it is.\n"
            'To go on, raise total_steps (ARGS="-p total_steps N"); to start anew, choose another run_name.'
        )
        return 0
    import papermill
    import papermill.iorw
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    ended = threading.Event()

    class Whole(papermill.iorw.LocalHandler):
        """Writes a draft and renames it: a kill while the notebook is saved leaves the one before, not half of this one."""

        def write(self, buf: str, path: str):
            draft = Path(path).with_name(f".{Path(path).name}.draft")
            super().write(buf, str(draft))
            draft.replace(path)

    papermill.iorw.papermill_io.register(str(executed), Whole())

    def keep_asking():
        """A run that is only starting would take a `stop` for an earlier session's."""
        while not ended.wait(0.5):
            (config.run_dir / "stop").touch()

    def ask_to_stop(number: int, frame: Any):
        """Ctrl-C lets the step at hand end and be saved, as in the terminal; a second one interrupts."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nStopping after the step at hand (Ctrl-C again: at once).", file=sys.stderr)
        threading.Thread(target=keep_asking, daemon=True).start()

    config.run_dir.mkdir(parents=True, exist_ok=True)
    before = signal.signal(signal.SIGINT, ask_to_stop)
    try:
        with tempfile.TemporaryDirectory() as sockets:  # no port that other users of the machine could reach
            papermill.execute_notebook(
                PROJECT_ROOT / "notebooks" / "train.ipynb",
                executed,
                parameters=config.to_dict(),
                cwd=str(PROJECT_ROOT),
                log_output=True,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                progress_bar=False,
                autosave_cell_every=10,  # seconds: what a kill leaves of the notebook
                extra_arguments=["--log-level=50"],  # else ending the kernel reads like a failure
                config=Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}}),
            )
    except papermill.PapermillExecutionError as error:
        print(f"{error.ename}: {printable(error.evalue)}\nThe notebook so far: {executed}", file=sys.stderr)
        return 130 if error.ename == "Stopped" else 1
    except DeadKernelError:
        print(f"The notebook's kernel died (out of memory?). Start again to go on. So far: {executed}", file=sys.stderr)
        return 1
    finally:
        ended.set()
        (config.run_dir / "stop").unlink(missing_ok=True)
        signal.signal(signal.SIGINT, before)
    print(f"\nEverything is in {config.run_dir}: open train.ipynb or training_curves.html there.")
    return 0


def sweep(options: argparse.Namespace) -> int:
    if options.jobs is not None and options.jobs < 1:
        raise ValueError(f"--jobs is {options.jobs}; it must be 1 or more")
    if short := [given[0] for given in options.p if len(given) < 2]:
        raise ValueError(f"-p {short[0]} has no value: write -p NAME VALUE, or several values, as in -p seed 0 1 2")
    pairs: dict[str, list[Any]] = {}
    for name, *values in options.p:
        pairs.setdefault(name, []).extend(parse_overrides([(name, value)])[name] for value in values)
    from lmlib import sweep

    return report(sweep.plan(options.params, pairs), options.jobs)


def report(configs: list[RunConfig], jobs: int | None) -> int:
    """Run a sweep and say how each run ended; 1 if one failed."""
    from lmlib import comparison, sweep

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"{len(configs)} runs in {', '.join(sorted({str(config.run_dir.parent) for config in configs}))}.", flush=True)
    failed = 0
    for number, outcome in enumerate(sweep.sweep(configs, jobs), 1):
        failed += outcome.state == "failed"
        said = f": {printable(outcome.said)}" if outcome.state == "failed" else ""
        print(f"[{number}/{len(configs)}] {outcome.config.run_name}  {outcome.state}{said}", flush=True)
    print("\n" + comparison.difference([c.run_dir for c in configs if (c.run_dir / "results.json").exists()]))
    return 1 if failed else 0


def find_rate(options: argparse.Namespace) -> int:
    config = RunConfig.load(options.params, **parse_overrides(options.p))
    from lmlib import sweep

    found = sweep.find_learning_rate(config)
    for factor, loss in list(zip(found.factors, found.losses, strict=True))[:: max(1, len(found.factors) // 20)]:
        print(f"{factor:8.3g} x the recipe's rates: loss {loss:.4f}")
    if not found.suggestion:
        raise ValueError("The loss did not fall at any rate: nothing to suggest.")
    print("Suggested:", " ".join(f"-p {name} {rate:g}" for name, rate in found.suggestion.items()), flush=True)
    return report(sweep.candidates(found, options.confirm), None) if options.confirm else 0


# ---------------------------------------------------------------------------------------------------
# Generation


def generate(options: argparse.Namespace) -> int:
    from lmlib import terminal

    settings = terminal.given_settings(options)
    has_batch = bool(options.prompts or options.prompts_file or options.output or options.format)
    if options.mode == "interactive" and has_batch:
        raise ValueError("--prompts, --prompts-file, --output and --format belong to --mode batch")
    if options.mode == "batch" or has_batch:
        return terminal.batch(options, settings)
    return terminal.interact(options.run, options.step, settings, _print_checkpoints)


# ---------------------------------------------------------------------------------------------------
# Looking around


def audit(options: argparse.Namespace) -> int:
    """Print the verdicts and write the page; 1 if a check failed."""
    page = Path(options.page) if options.page else None
    if page and (page.suffix != ".html" or not page.absolute().parent.is_dir()):
        raise ValueError(f"--page {options.page} must end in .html and lie in a folder that exists.")
    from lmlib import audit, verdicts

    reports = audit.audit(options.source, options.step)
    for report in reports:
        print(report, flush=True)
    folder = resolve_path(options.source)
    page = page or (folder / "audit.html" if (folder / "checkpoints").is_dir() else None)
    if page:
        verdicts.save(reports, options.source, page)
        print(f"The page: {page}")
    return 1 if any(report.passed is False for report in reports) else 0


def checkpoints(options: argparse.Namespace):
    run_dir = resolve_path(options.run)
    if not run_dir.is_dir():
        raise ValueError(f"There is no run {options.run}. `python -m lmlib runs` lists the runs.")
    _print_checkpoints(run_dir)


def _print_checkpoints(run_dir: Path):
    from lmlib import checkpoint

    steps, manifests, failures = checkpoint.checkpoint_steps(run_dir), {}, {}
    for step in steps:
        try:
            manifests[step] = checkpoint.verify(run_dir / "checkpoints" / f"checkpoint_step_{step}")
        except ValueError as error:
            failures[step] = error
    best = min(manifests, key=lambda step: manifests[step]["val_loss"], default=None)
    for step in steps:
        if step in failures:
            print(f"step {step:>7}  {printable(str(failures[step]))}")
            continue
        manifest = manifests[step]
        line = f"step {step:>7}  held-out loss {manifest['val_loss']:.4f} (of step {manifest['val_loss_step']})"
        line += "  best" if step == best else "      "
        line += f"  LEAKS ({printable(str(manifest[LEAKY]))})" if manifest.get(LEAKY) else ""
        resumable = (run_dir / "checkpoints" / f"checkpoint_step_{step}" / "training_state").is_dir()
        print(f"{line}  {printable(str(manifest['timestamp']))}{'  (can be continued)' if resumable else ''}")
    if not steps:
        print(f"{run_dir} has no checkpoint yet.")


def runs(options: argparse.Namespace):
    from lmlib import runs

    folder = resolve_path(options.output_dir).absolute()
    found = runs.named_folders(runs.find_runs(folder, nested=True)).values()
    names = [printable(str(run_dir.relative_to(folder))) for run_dir in found]
    for name, (_, row) in zip(names, runs.results_table(found).iterrows(), strict=True):
        state, *notes = row["state"].split("; ")
        line = f"{name:<{max(24, *map(len, names))}} {state:<9} step {row['steps']:>7}  best held-out loss "
        line += f"{row['best']:.4f} at step {int(row['at step'])}" if row["best"] == row["best"] else "-"
        print(printable("; ".join([line, *notes])))
    if not names:
        print(f"There is no run in {folder}.")


def stop(options: argparse.Namespace):
    from lmlib import run_folder

    run_dir = resolve_path(options.run)
    if not (run_dir / "config.json").exists():
        raise ValueError(f"There is no run {options.run}. `python -m lmlib runs` lists the runs.")
    if run_folder.writer(run_dir) is None and run_dir.parent.joinpath(".locks").exists():
        raise ValueError(f"{options.run} is not running here, so there is nothing to stop.")
    (run_dir / "stop").touch()
    print(f"Asked {run_dir.name} to stop; it ends the step at hand, saves and stops.", flush=True)
    while (run_dir / "stop").exists() and run_folder.writer(run_dir) is not None:
        time.sleep(0.1)
    (run_dir / "stop").unlink(missing_ok=True)
    print("It is stopping.")


if __name__ == "__main__":
    sys.exit(main())
