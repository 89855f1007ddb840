"""lmlib generate: an interactive session, or a batch of prompts to text or JSON lines."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TextIO

from lmlib import checkpoint
from lmlib.cli import look
from lmlib.files import resolve_path
from lmlib.generation import text as generation
from lmlib.generation.settings import Settings, format_setting, parse_setting
from lmlib.leaks import known_leaks
from lmlib.text import printable

HELP = """Type a prompt and press Enter. Ctrl-C stops the generation. These lines are commands:
  checkpoints               list the run's checkpoints
  load <step>               use that checkpoint; load alone: the newest
  params                    show the settings
  set <name> <value>        set temperature 0.7, set top_k 0, set stop_strings \\n
  again                     repeat the last prompt with the next seed
  help, quit"""


def generate(options: argparse.Namespace) -> int:
    """Generate interactively, or in batch mode if the options ask for it or name prompts."""
    given = {f.name: getattr(options, f.name) for f in fields(Settings)}
    settings = Settings(**{name: parse_setting(name, text) for name, text in given.items()
                           if text is not None})
    has_batch = bool(options.prompts or options.prompts_file or options.output or options.format)
    if options.mode == "interactive" and has_batch:
        raise ValueError("--prompts, --prompts-file, --output and --format belong to --mode batch")
    if options.mode == "batch" or has_batch:
        return batch(options, settings)
    return interact(options.run, options.step, settings)


# ---------------------------------------------------------------------------------------------
# Interactive


@dataclass
class Session:
    """What the commands of an interactive session change."""

    run: str
    model: Any
    tokenizer: Any
    settings: Settings
    prompt: str = ""  # the last one


def interact(run: str, step: int | None, settings: Settings) -> int:
    """Read prompts and commands until `quit` or the end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (importing it gives `input` line editing and a history)
    session = Session(run, *checkpoint.load(run, step), settings)
    _warn_of_leaks(run)
    steps = checkpoint.checkpoint_steps(resolve_path(run))
    print(HELP)
    while True:
        try:
            if (now := checkpoint.checkpoint_steps(resolve_path(run))) != steps:
                print(f"(checkpoints now: {', '.join(map(str, now)) or 'none'})")
                steps = now
            line = input("🎯 Prompt: ")
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print("\n(type quit to leave)")
            continue
        if line.split() in (["quit"], ["exit"]):
            return 0
        try:
            _execute(session, line)
        except KeyboardInterrupt:
            print("\n(stopped)\n")
        except ValueError as error:
            print(f"Error: {printable(str(error))}")


def _execute(session: Session, line: str):
    """Execute a command; any other line is a prompt."""
    match line.split(maxsplit=2):
        case ["help"]:
            print(HELP)
        case ["checkpoints"]:
            look.print_checkpoints(resolve_path(session.run))
        case ["load"]:
            _load(session, None)
        case ["load", step]:
            if not step.isdecimal():
                raise ValueError(f"load {step}: write a step, as in load 500, or load alone for "
                                 "the newest")
            _load(session, int(step))
        case ["params" | "set"]:
            for name, value in asdict(session.settings).items():
                print(f"{name}: {format_setting(value)}")
        case ["set", name, text] if name in asdict(session.settings):
            session.settings = replace(session.settings, **{name: parse_setting(name, text)})
            print(f"{name}: {format_setting(getattr(session.settings, name))}")
        case ["set", name, *_]:
            raise ValueError(f"set {name}: write set, a name and a value; the names are "
                             f"{', '.join(asdict(session.settings))}")
        case ["again"]:
            if not session.prompt:
                raise ValueError("again: there is no prompt yet")
            session.settings = replace(session.settings, seed=session.settings.seed + 1)
            print(f"(seed {session.settings.seed})")
            _generate(session)
        case _:
            session.prompt = line
            _generate(session)


def _load(session: Session, step: int | None):
    folder = checkpoint.find_checkpoint(session.run, step)
    session.model, session.tokenizer = checkpoint.load(folder)
    print(f"Loaded {printable(folder.name.replace('checkpoint_step_', 'step '))}.")


def _generate(session: Session):
    """Print a continuation as it is generated, then its speed and why it ended."""
    model, tokenizer, prompt = session.model, session.tokenizer, session.prompt
    ids, began = generation.encode(model, tokenizer, prompt), time.monotonic()
    print(f"🤖 Generated: {printable(prompt)}", end="", flush=True)
    for [text] in generation.generate_ids(model, tokenizer, [ids], session.settings):
        print(printable(text.piece), end="", flush=True)
    seconds = time.monotonic() - began
    print(f"\n({generation.describe_continuation(text, model.config.sequence_length, seconds)})\n")


def _warn_of_leaks(run: str):
    if found := known_leaks(resolve_path(run)):
        print(f"This model LEAKS ({printable(found)}): its scores and texts are not those of a "
              "language model.", file=sys.stderr)


# ---------------------------------------------------------------------------------------------
# Batch


def batch(options: argparse.Namespace, settings: Settings) -> int:
    """Continue every prompt, to standard output or --output, as text or JSON lines.

    Raises:
        ValueError: there is no prompt, a prompt is longer than the context window, or top_k is
            larger than the vocabulary; nothing was written.
    """
    prompts = list(_prompts(options))
    if not prompts:
        raise ValueError('batch mode needs prompts: --prompts "Hello world" "Once upon a time", '
                         "or --prompts-file FILE (or -)")
    model, tokenizer = checkpoint.load(options.run, options.step)
    _warn_of_leaks(options.run)
    generation.check_top_k(model, settings)
    ids = []
    for number, prompt in enumerate(prompts, 1):
        try:
            ids.append(generation.encode(model, tokenizer, prompt))
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from None
    with (open(options.output, "w", encoding="utf-8") if options.output
          else contextlib.nullcontext(sys.stdout)) as out:
        for start in range(0, len(prompts), generation.ROWS):
            rows = slice(start, start + generation.ROWS)
            steps = generation.generate_ids(model, tokenizer, ids[rows], settings)
            texts = generation.complete(steps)
            for prompt, text in zip(prompts[rows], texts, strict=True):
                print(_format(options, prompt, text), file=out, flush=True)
    return 0


def _format(options: argparse.Namespace, prompt: str, text: Any) -> str:
    """Return a continuation as a JSON line or as text; what a terminal shows is made printable."""
    name = options.output or ""
    if (options.format or ("jsonl" if name.endswith(".jsonl") else "text")) == "jsonl":
        return json.dumps({"prompt": prompt, "text": text.text, "tokens": len(text.ids),
                           "ended_by": text.ended_by})
    whole = prompt + text.text if options.output else printable(prompt + text.text)
    return f"🎯 Prompt: {printable(prompt)}\n🤖 Generated: {whole}\n"


def _prompts(options: argparse.Namespace) -> Iterator[str]:
    """Yield --prompts, then the lines of --prompts-file; "-" stands for standard input's lines."""
    for prompt in options.prompts:
        if prompt == "-":
            yield from _lines(sys.stdin)
        else:
            yield prompt.encode("utf-8", "replace").decode()  # arguments may hold lone surrogates
    if options.prompts_file == "-":
        yield from _lines(sys.stdin)
    elif options.prompts_file:
        file = Path(options.prompts_file).expanduser()
        with open(file, encoding="utf-8", errors="replace") as lines:
            yield from _lines(lines)


def _lines(file: TextIO) -> Iterator[str]:
    return filter(None, (line.rstrip("\r\n") for line in file))
