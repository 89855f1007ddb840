"""Writing in the terminal: a session with history and line editing, or a batch of prompts to text or JSON lines."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from lmlib import checkpoint
from lmlib.cli import look
from lmlib.files import resolve_path
from lmlib.generation.settings import Settings
from lmlib.generation.text import ROWS, check_top_k, complete, describe_continuation, encode, generate_ids
from lmlib.leaks import known_leaks
from lmlib.text import printable

HELP = """Type a prompt and Enter. Ctrl-C stops a text. Other lines mean:
  checkpoints               list the run's checkpoints
  load <step>               write with that one; load alone takes the newest
  params                    show what is set
  set <name> <value>        set temperature 0.7, set top_k 0, set stop_strings \\n
  again                     the last prompt with the next seed
  help, quit"""


def given_settings(options: argparse.Namespace) -> Settings:
    """The settings that the command line asks for.

    Raises:
        ValueError: one cannot be read or is out of range.
    """
    texts = {setting.name: getattr(options, setting.name) for setting in fields(Settings)}
    return Settings(**{name: read_setting(name, text) for name, text in texts.items() if text is not None})


def read_setting(name: str, text: str) -> Any:
    """A setting's value from what a person types; "none" stands for none."""
    kinds = {"max_new_tokens": int, "top_k": int, "seed": int, "ignore_eos": bool, "past_window": str, "stop_strings": tuple}
    kind = kinds.get(name, float)
    if kind is tuple:
        return tuple(stop.replace("\\n", "\n").replace("\\t", "\t") for stop in text.split("|")) if text != "none" else ()
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if text.lower() == "none" and name in ("top_k", "top_p", "min_p"):
        return None
    try:
        return kind(text)
    except ValueError:
        return text  # Settings says what is wrong with it


def shown_setting(value: Any) -> str:
    return "|".join(stop.replace("\n", "\\n") for stop in value) or "none" if isinstance(value, tuple) else str(value).lower()


def interact(run: str, step: int | None, settings: Settings, list_checkpoints: Any) -> int:
    """Read prompts and commands until `quit` or the end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (importing it gives `input` line editing and a history)
    model, tokenizer = checkpoint.load(run, step)
    _warn_of_leaks(run)
    steps, last = checkpoint.checkpoint_steps(resolve_path(run)), ""
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
            print("\n(quit leaves)")
            continue
        try:
            match line.split(maxsplit=2):
                case ["quit" | "exit"]:
                    return 0
                case ["help"]:
                    print(HELP)
                case ["checkpoints"]:
                    list_checkpoints(resolve_path(run))
                case ["load", *which] if len(which) < 2:
                    if which and not which[0].isdecimal():
                        raise ValueError(f"load {which[0]}: write a step, as in load 500, or load alone for the newest")
                    folder = checkpoint.find_checkpoint(run, int(which[0]) if which else None)
                    model, tokenizer = checkpoint.load(folder)
                    print(f"Loaded {printable(folder.name.replace('checkpoint_step_', 'step '))}.")
                case ["params" | "set"]:
                    print("\n".join(f"{name}: {shown_setting(value)}" for name, value in asdict(settings).items()))
                case ["set", name, value] if name in asdict(settings):
                    settings = replace(settings, **{name: read_setting(name, value)})
                    print(f"{name}: {shown_setting(getattr(settings, name))}")
                case ["set", name, *_]:
                    known = ", ".join(asdict(settings))
                    raise ValueError(f"set {name}: write set, a name and a value; the names are {known}")
                case ["again"]:
                    if not last:
                        raise ValueError("again: there is no prompt yet")
                    settings = replace(settings, seed=settings.seed + 1)
                    print(f"(seed {settings.seed})")
                    _say(model, tokenizer, last, settings)
                case _:
                    last = line
                    _say(model, tokenizer, line, settings)
        except KeyboardInterrupt:
            print("\n(stopped)\n")
        except ValueError as error:
            print(f"Error: {printable(str(error))}")


def _warn_of_leaks(run: str):
    if found := known_leaks(resolve_path(run)):
        print(f"This model LEAKS ({printable(found)}): its scores and texts are not those of a language model.", file=sys.stderr)


def _say(model: Any, tokenizer: Any, prompt: str, settings: Settings):
    """Write one text as it comes, and below it how fast and why it ended."""
    ids, began = encode(model, tokenizer, prompt), time.monotonic()
    print(f"🤖 Generated: {printable(prompt)}", end="", flush=True)
    for [text] in generate_ids(model, tokenizer, [ids], settings):
        print(printable(text.piece), end="", flush=True)
    print(f"\n({describe_continuation(text, model.config.sequence_length, time.monotonic() - began)})\n")


def batch(options: argparse.Namespace, settings: Settings) -> int:
    """Continue every prompt, to standard output or --output, as text or JSON lines.

    Raises:
        ValueError: there is no prompt, one does not fit the model's window, or top_k the vocabulary; nothing was written.
    """
    prompts = list(_prompts(options))
    if not prompts:
        raise ValueError('batch mode needs prompts: --prompts "Hello world" "Once upon a time", or --prompts-file FILE (or -)')
    model, tokenizer = checkpoint.load(options.run, options.step)
    _warn_of_leaks(options.run)
    check_top_k(model, settings)
    ids = []
    for number, prompt in enumerate(prompts, 1):
        try:
            ids.append(encode(model, tokenizer, prompt))
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from None
    as_json = options.format == "jsonl" or (options.format is None and (options.output or "").endswith(".jsonl"))
    with open(options.output, "w", encoding="utf-8") if options.output else contextlib.nullcontext(sys.stdout) as out:
        for start in range(0, len(prompts), ROWS):
            rows = slice(start, start + ROWS)
            texts = complete(generate_ids(model, tokenizer, ids[rows], settings))
            for prompt, text in zip(prompts[rows], texts, strict=True):
                if as_json:
                    line = {"prompt": prompt, "text": text.text, "tokens": len(text.ids), "ended_by": text.ended_by}
                    print(json.dumps(line), file=out, flush=True)
                else:
                    whole = prompt + text.text if options.output else printable(prompt + text.text)
                    print(f"🎯 Prompt: {printable(prompt)}\n🤖 Generated: {whole}\n", file=out, flush=True)
    return 0


def _prompts(options: argparse.Namespace) -> Iterator[str]:
    """--prompts, then the lines of --prompts-file; "-" in either place stands for standard input's lines."""
    prompts = [prompt.encode("utf-8", "replace").decode() for prompt in options.prompts]  # bytes that are no text
    for prompt in prompts:
        yield from _lines(sys.stdin) if prompt == "-" else [prompt]
    if options.prompts_file == "-":
        yield from _lines(sys.stdin)
    elif options.prompts_file:
        with open(Path(options.prompts_file).expanduser(), encoding="utf-8", errors="replace") as file:
            yield from _lines(file)


def _lines(file: Any) -> Iterator[str]:
    return (line for line in (line.rstrip("\r\n") for line in file) if line)


def generate(options: argparse.Namespace) -> int:
    pass

    settings = given_settings(options)
    has_batch = bool(options.prompts or options.prompts_file or options.output or options.format)
    if options.mode == "interactive" and has_batch:
        raise ValueError("--prompts, --prompts-file, --output and --format belong to --mode batch")
    if options.mode == "batch" or has_batch:
        return batch(options, settings)
    return interact(options.run, options.step, settings, look._print_checkpoints)
