"""The commands of the terminal and their options."""

import argparse
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Literal

from lmlib.cli.display import accept_every_character, show, silence
from lmlib.generation.settings import Settings, format_setting, parse_setting
from lmlib.parameters import find_recipe, unknown_name
from lmlib.text import printable

# Packages of the extras, by the names under which they are imported.
EXTRAS = {"notebook": {"IPython", "anywidget", "datasets", "ipywidgets", "matplotlib", "nbclient",
                       "nbformat", "pandas", "papermill", "plotly", "traitlets"},
          "eval": {"accelerate", "lm_eval"}, "export": {"gguf"}}


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 (it failed) or 130 (Ctrl-C)."""
    accept_every_character()
    top, given = parser(), sys.argv[1:] if arguments is None else arguments
    if not given:
        top.print_help()
        return 0
    if not given[0].startswith("-") and given[0] not in top.commands:
        top.error(f"{unknown_name(given[0], top.commands, 'command')}\nThe commands are: "
                  f"{', '.join(top.commands)}.")
    options = top.parse_args(given)
    try:
        # A command's module is imported only now, so that --help pays for no torch and no pandas.
        return pkgutil.resolve_name(f"lmlib.cli.{options.function}")(options) or 0
    except KeyboardInterrupt as stopped:
        show("\n" + (printable(str(stopped)) or "Interrupted."), stream="stderr")
        return 130
    except BrokenPipeError:  # as in `lmlib runs | head`: what is still buffered has no reader
        silence(sys.stdout)
    except ModuleNotFoundError as error:
        show(missing_packages(f"lmlib {options.command}", error), stream="stderr")
    except (ValueError, OSError) as error:
        show(f"Error: {printable(str(error))}", stream="stderr")
    return 1


def missing_packages(what: str, error: ModuleNotFoundError) -> str:
    """Say what to install for `what`; raise the error again if no extra covers it."""
    missing = (error.name or "").partition(".")[0]
    extra = next((extra for extra, packages in EXTRAS.items() if missing in packages), None)
    if extra is None:
        raise error
    return f'{what} needs the {extra} packages: pip install -e ".[{extra}]".'


def parser() -> argparse.ArgumentParser:
    """Return the parser. `options.function` is "module:function", the code of the command."""
    top = argparse.ArgumentParser("lmlib", description="Train, watch and use language models.")
    commands = top.add_subparsers(required=True, dest="command", metavar="command")

    def add(name: str, function: str, help: str) -> Callable:
        """Add a command; return the method that adds its arguments."""
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(function=function)
        return command.add_argument

    argument = add("train", "train:train", "train a recipe, or resume its run")
    _add_recipe(argument)
    argument("--processes", type=int, metavar="N", help="as -p processes N: on this machine (1)")
    argument("--restarts", type=int, default=0, metavar="K",
             help="times to start again after a process has died (0)")
    argument = add("data", "data:data", "tokenize a recipe's corpus and describe it")
    _add_recipe(argument)
    argument("--workers", type=int, metavar="N", help="processes that tokenize (one per core)")
    argument = add("plan", "plan:plan", "estimate a recipe's memory, time and disk")
    _add_recipe(argument)
    argument("--processes", type=int, metavar="N", help="as -p processes N (1)")
    argument("--gpu", choices=("h100", "a100", "4090", "t4"), help="(this machine's CPU, measured)")
    _add_recipe(add("notebook", "papermill:notebook", "train by executing notebooks/train.ipynb"))
    argument = add("generate", "generate:generate", "generate text with a run's model")
    argument("run", help="a run, a checkpoint, or a Hugging Face folder")
    argument("--step", type=parse_step, help="step of the checkpoint, or best (newest)")
    argument("--mode", choices=("interactive", "batch", "chat"),
             help="(batch if there are prompts, else interactive)")
    argument("--prompts", nargs="+", default=[], help="for batch mode; -: lines of standard input")
    argument("--prompts-file", metavar="FILE", help="with a prompt per line; -: standard input")
    argument("--output", metavar="FILE", default="", help="for batch mode (standard output)")
    argument("--format", choices=("text", "jsonl"), help="(jsonl if --output ends in .jsonl)")
    for f in fields(Settings):
        argument(f"--{f.name.replace('_', '-')}", metavar="VALUE", default=f.default,
                 type=partial(parse_setting, f.name),
                 help=f"{f.metadata['help']} ({format_setting(f.default)})")
    argument = add("sweep", "sweep:sweep", "train every recipe with every combination of values")
    argument("params", nargs="+", type=find_recipe, help="recipes")
    argument("-p", nargs="+", action="append", default=[], metavar=("NAME", "VALUE"), help="values")
    argument("--jobs", type=int, help="runs at once (one per CUDA device; else one)")
    argument = add("find-rate", "sweep:find_rate", "suggest a learning rate, by a range test")
    _add_recipe(argument)
    argument("--confirm", type=int, metavar="STEPS", help="then train there and nearby for STEPS")
    argument = add("audit", "look:audit", "check whether a model's scores can be trusted")
    argument("source", help="a run, a checkpoint, a Hugging Face folder or id")
    argument("--step", type=parse_step, help="step of the checkpoint, or best (newest)")
    argument("--page", metavar="FILE.html", help="verdicts and figures (of a run: in its folder)")
    argument = add("benchmark", "tools:benchmark", "score checkpoints by lm-eval")
    argument("run", help="a run, a checkpoint, or a Hugging Face folder")
    argument("--steps", nargs="+", type=parse_steps, default=[None], metavar="STEP",
             help="steps of checkpoints, best, or all (newest)")
    argument("--tasks", nargs="+", metavar="TASK", help="run_text, run_cloze, run_choice, cut from "
             "the run's test documents (these three), or tasks of lm-eval")
    argument("--text", metavar="RUN", help="cut tasks from that run's test documents")
    argument = add("export", "tools:export", "write a model in another format")
    argument("run", help="a run, a checkpoint, or a Hugging Face folder")
    argument("--step", type=parse_step, help="step of the checkpoint, or best (newest)")
    argument("--gguf", metavar="FILE", required=True, type=Path, help="for llama.cpp")
    argument = add("push", "push:push", "send a checkpoint to the Hugging Face Hub")
    argument("run", help="a run, a checkpoint, or a Hugging Face folder")
    argument("repository", metavar="OWNER/NAME", help="made if it does not exist")
    argument("--step", type=parse_step, help="step of the checkpoint, or best (newest)")
    argument("--leaky", action="store_true", help="send even a model that leaks")
    argument("--public", action="store_true", help="for everybody to see (private)")
    argument("--yes", action="store_true", help="send without asking")
    add("checkpoints", "look:checkpoints", "list a run's checkpoints")("run")
    add("runs", "look:runs", "list the runs")("output_dir", nargs="?", default="outputs")
    add("stop", "look:stop", "ask a run to save and stop, from anywhere")("run")
    argument = add("clean", "look:clean", "delete caches and drafts that no run uses")
    argument("output_dir", nargs="?", default="outputs", help="folder of runs (outputs)")
    argument("--yes", action="store_true", help="delete without asking")
    top.commands = list(commands.choices)
    return top


def parse_step(text: str) -> int | Literal["best"]:
    """Parse the step of a checkpoint as a person types it."""
    if text != "best" and not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a step; write one, as in 500, or best "
                                         "(the lowest validation loss)")
    return text if text == "best" else int(text)


def parse_steps(text: str) -> int | Literal["best", "all"]:
    """Parse one of several steps, or all."""
    return text if text == "all" else parse_step(text)


def _add_recipe(argument: Callable):
    argument("params", nargs="?", default="params/quickstart.yaml", type=find_recipe,
             help="a recipe: a file, or its name in params/, as in smoke")
    argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="override")
