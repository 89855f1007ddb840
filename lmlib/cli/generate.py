"""lmlib generate: an interactive session, a chat, or a batch of prompts to text or JSON lines."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from fileinput import FileInput
from pathlib import Path
from typing import Any, Literal

from lmlib import checkpoint
from lmlib.cli import look
from lmlib.cli.display import paint, warn_of_leaks
from lmlib.cli.parser import parse_step
from lmlib.errors import UserError
from lmlib.files import resolve_path
from lmlib.generation import text as generation
from lmlib.generation.settings import Settings, format_setting, parse_setting
from lmlib.model.size import parameter_count
from lmlib.parameters import did_you_mean, existing_folder, unknown_name
from lmlib.text import printable

COMMANDS = ["help", "checkpoints", "load", "params", "set", "again", "quit", "exit"]
HELP = """Type a prompt and press Enter. Ctrl-C stops the generation. These lines are commands:
  checkpoints               list the run's checkpoints
  load <step>               use that checkpoint; load best: lowest validation loss; load: newest
  params                    show the settings
  set <name> <value>        set temperature 0.7, set top_k 0, set stop_strings \\n
  again                     repeat the last prompt with the next seed
  help, quit
A space before a word makes it a prompt."""


@dataclass
class Session:
    """A model and how to sample from it; an interactive session's commands change these."""

    run: str
    model: Any
    tokenizer: Any
    settings: Settings
    prompt: str = ""  # the last one


def generate(options: argparse.Namespace):
    """Generate interactively, or in batch mode if the options ask for it or name prompts."""
    settings = Settings(**{f.name: getattr(options, f.name) for f in fields(Settings)})
    has_batch = bool(options.prompts or options.prompts_file or options.output or options.format)
    if options.mode in ("interactive", "chat") and has_batch:
        raise UserError("--prompts, --prompts-file, --output and --format belong to --mode batch")
    prompts, is_batch = list(_prompts(options)), has_batch or options.mode == "batch"
    if is_batch and not prompts:
        raise UserError('batch mode needs prompts: --prompts "Hello world" "Once upon a time", '
                        "or --prompts-file FILE (or -)")
    folder = existing_folder(options.run)
    session = Session(options.run, *checkpoint.load(folder, options.step), settings)
    warn_of_leaks(folder)
    if is_batch:
        _batch(session, options, prompts)
    else:
        (_chat if options.mode == "chat" else _interact)(session)


def _interact(session: Session):
    """Read prompts and commands until `quit` or the end of input."""
    run_dir, config = resolve_path(session.run), session.model.config
    print(paint(f"{session.run}: {parameter_count(session.model):,} parameters, a context window "
                f"of {config.sequence_length} tokens", "bold"), HELP, "", sep="\n")
    steps = checkpoint.checkpoint_steps(run_dir)
    for line in _typed_lines("🎯 Prompt: "):
        with _errors_shown():
            _execute(session, line)
        if (now := checkpoint.checkpoint_steps(run_dir)) != steps:
            print(f"(checkpoints now: {', '.join(map(str, now)) or 'none'})")
            steps = now


def _typed_lines(question: str) -> Iterator[str]:
    """Yield the lines that are typed, until `quit` or the end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (importing it gives `input` line editing and a history)
    while True:
        try:
            line = input(question)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(type quit to leave)")
            continue
        if line.rstrip().lstrip("/") in ("quit", "exit"):
            return
        yield line


@contextlib.contextmanager
def _errors_shown() -> Iterator[None]:
    """Print what a user can put right, and let Ctrl-C stop a generation."""
    try:
        yield
    except KeyboardInterrupt:
        print("\n(stopped)\n")
    except ValueError as error:
        print(f"Error: {printable(str(error))}")


def _chat(session: Session):
    """Answer what is typed, turn by turn, in the form of the tokenizer's chat template."""
    tokenizer, turns = session.tokenizer, []
    if not tokenizer.chat_template:
        raise UserError(f"{session.run} has no chat template, so it was not trained to answer: "
                        "docs/finetuning.md says how to do that. --mode interactive continues "
                        "any text.")
    turn = [{"role": role, "content": "An example."} for role in ("user", "assistant")]
    after = _rendered(session, turn, tokenize=False).rpartition("An example.")[2]
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    if ends := [id for id in ids if id in tokenizer.all_special_ids]:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])  # it ends an answer
    print("Each line is a turn. Ctrl-C stops an answer; quit ends the chat.\n")
    for line in filter(str.strip, _typed_lines("🧑 You: ")):
        with _errors_shown():
            turns = _answer(session, [*turns, {"role": "user", "content": line}])


def _answer(session: Session, turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """Print the model's answer; return the turns with it, and without the oldest if too long."""
    window = session.model.config.sequence_length
    room = window - min(session.settings.max_new_tokens, window // 2)
    while True:
        ids = _rendered(session, turns, add_generation_prompt=True, return_dict=False)
        if len(ids) <= room or len(turns) == 1:
            text = _print_continuation(session, "🤖 ", ids)
            return [*turns, {"role": "assistant", "content": text}]
        turns = turns[2:]


def _rendered(session: Session, turns: list[dict[str, str]], **options: Any) -> Any:
    """Return turns in the form of the chat template: as text, or as token ids."""
    from jinja2 import TemplateError
    try:
        return session.tokenizer.apply_chat_template(turns, **options)
    except TemplateError as error:
        raise UserError(f"The chat template of {session.run} fails: {error}") from error


def _execute(session: Session, line: str):
    """Execute a command; any other line is a prompt, and an empty one nothing."""
    settings, words = asdict(session.settings), line.split(maxsplit=2)
    if line[:1] == "/" and words[0][1:] in COMMANDS:  # as elsewhere: /help
        words[0] = words[0][1:]
    elif line[:1] == " ":
        words = [line] * bool(words)  # a prompt, whatever its words
    match words:
        case []:
            pass
        case ["help"]:
            print(HELP)
        case ["checkpoints"]:
            look.checkpoints(argparse.Namespace(run=session.run))
        case ["load"] | ["load", _]:
            folder = checkpoint.find_checkpoint(session.run, *map(_step_to_load, words[1:]))
            session.model, session.tokenizer = checkpoint.load(folder)
            print(f"Loaded {printable(folder.name.replace('checkpoint_step_', 'step '))}.")
        case ["params" | "set"]:
            print(*(f"{name}: {format_setting(settings[name])}" for name in settings), sep="\n")
        case ["set", name, text] if name in settings:
            session.settings = replace(session.settings, **{name: parse_setting(name, text)})
            print(f"{name}: {format_setting(getattr(session.settings, name))}")
        case ["set", name] if name in settings:
            raise UserError(f"set {name}: write a value too, as in set {name} "
                            f"{format_setting(settings[name])}")
        case ["set", name, *_]:
            raise UserError(f"{unknown_name(name, settings, 'setting')}"
                            f"\nThe settings are {', '.join(settings)}.")
        case ["again"]:
            if not session.prompt:
                raise UserError("again: there is no prompt yet")
            session.settings = replace(session.settings, seed=session.settings.seed + 1)
            print(f"(seed {session.settings.seed})")
            _generate(session)
        case [word] if line[0] != " " and (near := did_you_mean(word.lstrip("/"), COMMANDS)):
            raise UserError(f"{word} is not a command{near} (A space before it makes it a prompt.)")
        case _:
            session.prompt = line
            _generate(session)


def _step_to_load(text: str) -> int | Literal["best"]:
    try:
        return parse_step(text)
    except argparse.ArgumentTypeError:
        raise UserError(f"load {text}: write a step, as in load 500, or load best; load alone: "
                        "the newest") from None


def _generate(session: Session):
    """Print the session's prompt and its continuation."""
    ids = generation.encode(session.model, session.tokenizer, session.prompt)
    _print_continuation(session, f"🤖 Generated: {printable(session.prompt)}", ids)


def _print_continuation(session: Session, start: str, ids: list[int]) -> str:
    """Print a continuation as it is generated, then its speed and why it ended.

    Returns its text; after Ctrl-C what there is of it.
    """
    model, began, said = session.model, time.monotonic(), ""
    print(start, end="", flush=True)
    try:
        for [text] in generation.generate_ids(model, session.tokenizer, [ids], session.settings):
            print(printable(text.piece), end="", flush=True)
            said += text.piece
    except KeyboardInterrupt:
        print("\n(stopped)\n")
        return said
    seconds = time.monotonic() - began
    print(f"\n({generation.describe_continuation(text, model.config.sequence_length, seconds)})\n")
    return said


def _batch(session: Session, options: argparse.Namespace, prompts: list[str]):
    """Continue every prompt, to standard output or --output; an invalid one writes nothing."""
    model, tokenizer, ids = session.model, session.tokenizer, []
    generation.check_top_k(model, session.settings)
    for number, prompt in enumerate(prompts, 1):
        try:
            ids.append(generation.encode(model, tokenizer, prompt))
        except ValueError as error:
            raise UserError(f"prompt {number}: {error}") from None
    with (open(options.output, "w", encoding="utf-8") if options.output
          else contextlib.nullcontext(sys.stdout)) as out:
        for start in range(0, len(ids), generation.ROWS):
            rows = slice(start, start + generation.ROWS)
            steps = generation.generate_ids(model, tokenizer, ids[rows], session.settings)
            for prompt, text in zip(prompts[rows], generation.complete(steps), strict=True):
                print(_format(options, prompt, text), file=out, flush=True)


def _format(options: argparse.Namespace, prompt: str, text: generation.Continuation) -> str:
    """Return a continuation as a JSON line or as text; what a terminal shows is made printable."""
    if options.format == "jsonl" or (not options.format and options.output.endswith(".jsonl")):
        return json.dumps({"prompt": prompt, "text": text.text, "tokens": len(text.ids),
                           "ended_by": text.ended_by})
    whole = prompt + text.text if options.output else printable(prompt + text.text)
    return f"🎯 Prompt: {printable(prompt)}\n🤖 Generated: {whole}\n"


def _prompts(options: argparse.Namespace) -> Iterator[str]:
    """Yield --prompts, then the lines of --prompts-file; "-" stands for standard input's lines."""
    for prompt in options.prompts:
        # Arguments may hold lone surrogates, which no file can.
        yield from _lines("-") if prompt == "-" else [prompt.encode("utf-8", "replace").decode()]
    if options.prompts_file:
        yield from _lines(options.prompts_file)


def _lines(file: str) -> Iterator[str]:
    """Yield the lines of a file that are not empty; FileInput knows "-" as standard input."""
    with FileInput(Path(file).expanduser(), encoding="utf-8", errors="replace") as lines:
        yield from filter(None, (line.rstrip("\r\n") for line in lines))
