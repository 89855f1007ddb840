"""The terminal: commands and their options."""

import argparse
import os
import sys
from typing import Any

from lmlib.cli import generate, look, papermill, sweep, train
from lmlib.text import printable


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
        ("train", train.train, "train a recipe, or go on training it"),
        ("notebook", papermill.notebook, "the same by papermill, leaving the executed notebook in the run's folder"),
    ):
        command = add(name, function, help)
        command.add_argument("params", nargs="?", default="params/quickstart.yaml", help="a recipe in params/")
        command.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter")

    command = add("generate", generate.generate, "write text with a run's model")
    command.add_argument("run", help="a run's folder, a checkpoint, or a Hugging Face folder")
    command.add_argument("--step", type=int, help="which checkpoint (the newest)")
    command.add_argument("--mode", choices=("interactive", "batch"), help="(interactive; batch if there are prompts)")
    command.add_argument("--prompts", nargs="+", default=[], help="prompts of batch mode; - reads lines of standard input")
    command.add_argument("--prompts-file", metavar="FILE", help="a prompt a line; - for standard input")
    command.add_argument("--output", metavar="FILE", help="where batch mode writes (standard output)")
    command.add_argument("--format", choices=("text", "jsonl"), help="of batch mode (text; jsonl if the output's name says so)")
    for name, default in SETTINGS.items():
        command.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE", help=f"({default})")

    command = add("sweep", sweep.sweep, "train every recipe, or every combination of parameters, by papermill")
    command.add_argument("params", nargs="+", help="recipes")
    command.add_argument("-p", nargs="+", action="append", default=[], metavar=("NAME", "VALUE"), help="values of a parameter")
    command.add_argument("--jobs", type=int, help="runs at once (one a CUDA device; else one)")

    command = add("find-rate", sweep.find_rate, "try learning rates of every size on a copy of the model, and suggest one")
    command.add_argument("params", nargs="?", default="params/quickstart.yaml", help="a recipe in params/")
    command.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter")
    command.add_argument(
        "--confirm", type=int, metavar="STEPS", help="then train so many steps with the suggestion and beside it"
    )

    command = add("audit", look.audit, "can its numbers be trusted: a verdict a line, and a page with pictures")
    command.add_argument("source", help="a run's folder, a checkpoint, a Hugging Face folder or id")
    command.add_argument("--step", type=int, help="which checkpoint (the newest)")
    command.add_argument("--page", metavar="FILE.html", help="where the page goes (a run's: audit.html in its folder)")

    add("checkpoints", look.checkpoints, "list a run's checkpoints").add_argument("run")
    add("runs", look.runs, "list the runs").add_argument("output_dir", nargs="?", default="outputs")
    add("stop", look.stop, "ask a run to save and stop, from anywhere").add_argument("run")
    return top
