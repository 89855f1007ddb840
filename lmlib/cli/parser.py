"""The commands of the terminal and their options.

Nothing here imports torch or pandas, so that --help is instant: the module of a command is
imported when the command runs.
"""

import argparse
import importlib
import os
import sys
from dataclasses import fields

from lmlib.generation.settings import Settings, format_setting
from lmlib.text import printable

# Packages of the extra `notebook`, by the names under which they are imported.
NOTEBOOK_PACKAGES = {"IPython", "anywidget", "datasets", "ipywidgets", "matplotlib", "nbclient",
                     "nbformat", "pandas", "papermill", "plotly", "traitlets"}


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 (it failed) or 130 (Ctrl-C).

    Errors that a user can cause end in a sentence on standard error.
    """
    options = parser().parse_args(arguments)
    module, function = options.function.split(":")
    try:
        command = getattr(importlib.import_module(f"lmlib.cli.{module}"), function)
        return command(options) or 0
    except KeyboardInterrupt as stopped:
        print("\n" + (printable(str(stopped)) or "Interrupted."), file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `lmlib runs | head`: what is still buffered has no reader
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        print(missing_packages(f"lmlib {options.command}", error), file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"Error: {printable(str(error))}", file=sys.stderr)
        return 1


def missing_packages(what: str, error: ModuleNotFoundError) -> str:
    """Say what to install for `what`; raise the error again if the extra does not cover it."""
    if (error.name or "").partition(".")[0] not in NOTEBOOK_PACKAGES:
        raise error
    return f"{what} needs the notebook packages: pip install 'lmlib[notebook]'."


def parser() -> argparse.ArgumentParser:
    """Return the parser. `options.function` is "module:function", the code of the command."""
    top = argparse.ArgumentParser(
        prog="lmlib", description="Train, watch and use small language models.")
    commands = top.add_subparsers(required=True, dest="command", metavar="command")

    def add(name: str, function: str, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(function=function)
        return command

    _add_recipe(add("train", "train:train", "train a recipe, or resume its run"))
    _add_recipe(add("notebook", "papermill:notebook", "train by papermill, which leaves the "
                    "executed notebook in the run's folder"))
    _add_generation(add("generate", "generate:generate", "generate text with a run's model"))

    command = add("sweep", "sweep:sweep",
                  "train every recipe with every combination of parameters, by papermill")
    command.add_argument("params", nargs="+", help="recipes")
    command.add_argument("-p", nargs="+", action="append", default=[],
                         metavar=("NAME", "VALUE"), help="values of a parameter")
    command.add_argument("--jobs", type=int, help="runs at once (one per CUDA device; else one)")

    command = add("find-rate", "sweep:find_rate",
                  "suggest a learning rate, by a range test on a copy of the model")
    _add_recipe(command)
    command.add_argument("--confirm", type=int, metavar="STEPS", help="then train runs of this "
                         "many steps at the suggested rates and near them")

    command = add("audit", "look:audit", "check whether a model's scores can be trusted: "
                  "a verdict per line, and a page with figures")
    command.add_argument("source", help="a run, a checkpoint, a Hugging Face folder or id")
    command.add_argument("--step", type=int, help="which checkpoint (the newest)")
    command.add_argument("--page", metavar="FILE.html",
                         help="where to write the page (of a run: audit.html in its folder)")

    add("checkpoints", "look:checkpoints", "list a run's checkpoints").add_argument("run")
    add("runs", "look:runs", "list the runs").add_argument(
        "output_dir", nargs="?", default="outputs")
    add("stop", "look:stop", "ask a run to save and stop, from anywhere").add_argument("run")
    return top


def _add_recipe(command: argparse.ArgumentParser):
    command.add_argument("params", nargs="?", default="params/quickstart.yaml",
                         help="a recipe in params/")
    command.add_argument("-p", nargs=2, action="append", default=[],
                         metavar=("NAME", "VALUE"), help="a parameter")


def _add_generation(command: argparse.ArgumentParser):
    command.add_argument("run", help="a run, a checkpoint, or a Hugging Face folder")
    command.add_argument("--step", type=int, help="which checkpoint (the newest)")
    command.add_argument("--mode", choices=("interactive", "batch"),
                         help="(interactive; batch if there are prompts)")
    command.add_argument("--prompts", nargs="+", default=[],
                         help="prompts for batch mode; -: the lines of standard input")
    command.add_argument("--prompts-file", metavar="FILE",
                         help="a file with a prompt per line; -: standard input")
    command.add_argument("--output", metavar="FILE", help="of batch mode (standard output)")
    command.add_argument("--format", choices=("text", "jsonl"),
                         help="of batch mode (text; jsonl if the output's name ends so)")
    for f in fields(Settings):
        command.add_argument(f"--{f.name.replace('_', '-')}", metavar="VALUE",
                             help=f"{f.metadata['help']} ({format_setting(f.default)})")
