"""The playground: widgets to generate text with any checkpoint of a run."""

import html
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import ipywidgets as w
from IPython.display import display

from lmlib import checkpoint
from lmlib.errors import UserError
from lmlib.files import resolve_path
from lmlib.generation.settings import Settings
from lmlib.generation.text import HALF, Continuation, describe_continuation, encode, generate_ids
from lmlib.leaks import LEAKY_NAME, known_leaks
from lmlib.notebook import token_html
from lmlib.notebook.live import is_live
from lmlib.text import printable

UPDATE_INTERVAL = 0.05  # least seconds between two updates of a text: a browser queues faster ones
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # the slider's value for a setting of None
WIDE, LABELED, WRAP = {"width": "97%"}, {"description_width": "9em"}, {"flex_flow": "row wrap"}
Cell = tuple[int, Settings]  # what generates one text: the step of a checkpoint, and settings


def playground(run_dir: str | Path, prompt: str = "", **settings: Any):
    """Display the playground of a run, in JupyterLab; the settings are fields of `Settings`."""
    if is_live():
        display(Playground(resolve_path(run_dir), prompt, Settings(**settings)).box)
    else:
        print("The playground needs a browser: open this notebook in JupyterLab and run this cell.")


def setting_widgets(settings: Settings) -> dict[str, w.DOMWidget]:
    """Return a widget for each setting, as the table in `Settings` describes it."""
    found = {}
    for f in fields(Settings):
        value, label = getattr(settings, f.name), f.metadata.get("label", "context full")
        options = {"description": label, "layout": {"width": "47%"}, "style": LABELED}
        if f.metadata.get("slider"):
            low, high, step = f.metadata["slider"]
            kind = w.IntSlider if isinstance(step, int) else w.FloatSlider
            value = OFF[f.name] if value is None else value
            # A value beyond the slider's limits extends them instead of being clipped.
            options |= {"min": min(low, value), "max": max(high, value), "step": step}
            found[f.name] = kind(value, **options)
        elif f.name == "seed":  # up to the largest integer that JavaScript holds exactly
            found[f.name] = w.BoundedIntText(value, min=0, max=2**53, **options)
        elif choices := f.metadata.get("choices"):
            found[f.name] = w.Dropdown(options=choices, value=value, **options)
    return found


def button(name: str, on_click: Callable[..., None], *arguments: Any, **options: Any) -> w.Button:
    made = w.Button(description=name, **options)
    made.on_click(lambda _: on_click(*arguments))
    return made


class Sampler:
    """Samples from a run's checkpoints in a thread, so that the kernel can receive a click on Stop.

    `report(line, is_error=False)` shows a status line, `show_busy(is_busy)` whether a job runs.
    """

    def __init__(self, run_dir: Path, report: Callable[..., None], show_busy: Callable[..., None]):
        self.run_dir, self.report, self.show_busy = run_dir, report, show_busy
        self.stop, self.thread = threading.Event(), None
        self.models: dict[Path, tuple[Any, Any]] = {}  # checkpoint -> model and tokenizer

    def start(self, job: Callable[[], None]):
        """Run a job in the thread, unless one is running."""
        if self.thread is None or not self.thread.is_alive():
            self.stop.clear()
            self.report("…")
            self.show_busy(True)
            self.thread = threading.Thread(target=self._run, args=(job,), daemon=True)
            self.thread.start()

    def _run(self, job: Callable[[], None]):
        try:
            job()
        except Exception as error:  # a failed job must not end the session
            name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            self.report(f"{name}{error}", is_error=True)
        finally:
            self.show_busy(False)

    def load(self, step: int | None) -> tuple[Any, Any]:
        """Return a checkpoint's model and tokenizer, from memory if they are there."""
        folder = checkpoint.find_checkpoint(self.run_dir, step)
        if folder not in self.models:
            if len(self.models) >= 3:  # enough to compare checkpoints without loading them again
                del self.models[next(iter(self.models))]
            self.models[folder] = checkpoint.load(folder)
        return self.models[folder]

    def stream(self, model: Any, tokenizer: Any, prompt: str, settings: Settings,
               label: str = "", ids: list[int] | None = None) -> Iterator[Continuation]:
        """Yield a continuation as it grows; `ids` are those of the prompt where they are known."""
        window = model.config.sequence_length
        ids = encode(model, tokenizer, prompt) if ids is None else ids[-window:]
        start, shown = time.monotonic(), 0.0
        for [text] in generate_ids(model, tokenizer, [ids], settings):
            is_last, now = text.ended_by or self.stop.is_set(), time.monotonic()
            if is_last or now - shown >= UPDATE_INTERVAL:
                self.report(label + describe_continuation(text, window, now - start))
                yield text
                shown = time.monotonic()
            if is_last:
                return


class Playground:
    """The widgets, and what their buttons do."""

    def __init__(self, run_dir: Path, prompt: str, settings: Settings):
        self.run_dir, self.given = run_dir, settings
        self.columns: list[Cell] = []
        self.last: tuple[str, Continuation] | None = None  # prompt and continuation on display
        self.sampler = Sampler(run_dir, self._report, self._show_busy)
        self.prompt = w.Textarea(prompt, placeholder="Type a prompt",
                                 layout=WIDE | {"height": "5em"})
        self.step = w.SelectionSlider(options=[0], description="checkpoint", layout=WIDE,
                                      continuous_update=False, style=LABELED)
        self.fields = setting_widgets(settings)
        self.status, self.output, self.side_by_side, self.table, self.difference = (
            w.HTML(layout=WIDE) for _ in range(5))
        self.temperatures = w.Text("0, 0.5, 0.8, 1.2", description="temperatures", style=LABELED)
        self.chosen = w.SelectMultiple(description="checkpoints", rows=5, style=LABELED)
        self.before, self.after = (w.Dropdown(description=name) for name in ("from", "to"))
        self._show_checkpoints(checkpoint.checkpoint_steps(run_dir))
        self.before.index, self.chosen.value = 0, self.chosen.options[-2:]
        start = self.sampler.start
        self.buttons = {made.description: made for made in [
            button("Generate", start, self.generate, button_style="primary"),
            button("Continue", start, self.continue_text),
            button("Another seed", start, self.another_seed),
            button("Stop", self.sampler.stop.set, button_style="danger", disabled=True)]}
        add = button("Add these settings", self._add_column,
                     tooltip="add a column with the checkpoint and settings above")
        generate_all = button("Generate all", start, self.generate_columns)
        clear = button("Clear", self._set_columns, [])
        fill_grid = button("Fill the grid", start, self.generate_grid)
        compare = button("Compare", start, self.compare)
        tabs = {"Tokens": [self.output],
                "Side by side": [w.HBox([add, generate_all, clear]), self.side_by_side],
                "Grid": [self.temperatures, self.chosen, fill_grid, self.table],
                "Difference": [w.HBox([self.before, self.after, compare]), self.difference]}
        often = ["temperature", "max_new_tokens", "top_k", "top_p", "seed"]
        rows = w.HBox([self.fields[name] for name in often], layout=WRAP)
        more = w.HBox([self.fields[name] for name in self.fields if name not in often], layout=WRAP)
        shown = [self.prompt, self.step, rows, w.Accordion([more], titles=["More"]),
                 w.HBox(list(self.buttons.values())), self.status,
                 w.Tab(list(map(w.VBox, tabs.values())), titles=list(tabs))]
        self.box = w.VBox(shown, layout={"max_width": "900px"})
        threading.Thread(target=self._follow_checkpoints, daemon=True).start()

    def generate(self):
        """Continue the prompt."""
        self._generate(self.prompt.value)

    def continue_text(self):
        """Continue the last continuation; the prompt if there is none."""
        if self.last is None:
            self.generate()
        else:
            prompt, text = self.last
            self._generate(prompt + text.text.rstrip(HALF), text.prompt_ids + text.ids)

    def another_seed(self):
        """Continue the prompt with the next seed."""
        self.fields["seed"].value += 1
        self.generate()

    def generate_columns(self):
        """Continue the prompt with the checkpoint and settings of each column, with one seed."""
        if not self.columns:
            self._add_column()
        prompt, seed = self.prompt.value, self.fields["seed"].value
        cells = [(step, replace(settings, seed=seed)) for step, settings in self.columns]
        for texts in self._generate_cells(prompt, cells):
            self._show_columns(cells, prompt, texts)

    def generate_grid(self):
        """Continue the prompt at each temperature with each selected checkpoint."""
        words = self.temperatures.value.replace(";", ",").split(",")
        try:
            temperatures = [float(word) for word in words if word.strip()]
        except ValueError:
            raise UserError("temperatures must be numbers, for example 0, 0.8, 1.2") from None
        steps, settings = self.chosen.value, self.settings()
        if not (steps and temperatures):
            raise UserError("choose at least one checkpoint and one temperature")
        cells = [(step, replace(settings, temperature=t)) for step in steps for t in temperatures]
        for texts in self._generate_cells(self.prompt.value, cells):
            rows = [(f"temperature {t:g}", texts[row :: len(temperatures)])
                    for row, t in enumerate(temperatures)]
            self.table.value = token_html.grid([f"step {step}" for step in steps], rows)

    def compare(self):
        """Score the last continuation, or the prompt if there is none, with two checkpoints."""
        steps = self.before.value, self.after.value
        models = [self.sampler.load(step) for step in steps]
        if self.last:
            prompt, text = self.last
        else:  # all but the prompt's first token can be scored
            ids = encode(*models[1], self.prompt.value)
            prompt, text = models[1][1].decode(ids[:1]), Continuation(ids[:1], ids[1:])
        (_, before), (unscored, after) = (token_html.score_tokens(*m, text) for m in models)
        names = (f"step {steps[0]}", f"step {steps[1]}")
        self.difference.value = token_html.shade_difference(prompt + unscored, before, after, names)
        self._report(f"Blue: {names[1]} finds it likelier than {names[0]}; orange: less likely.")

    def _add_column(self):
        self._set_columns([*self.columns, (self.step.value, self.settings())])

    def _set_columns(self, columns: list[Cell]):
        self.columns = columns
        self._show_columns(columns, self.prompt.value, [""] * len(columns))

    def settings(self) -> Settings:
        """Return the settings that the widgets show; the others are those given at the start."""
        values = {name: field.value for name, field in self.fields.items()}
        return replace(self.given, **values | {"min_p": values["min_p"] or None})

    def _generate(self, prompt: str, ids: list[int] | None = None):
        """Show a continuation of `prompt` as it grows, then its tokens' probabilities."""
        model, tokenizer = self.sampler.load(self.step.value)
        for text in self.sampler.stream(model, tokenizer, prompt, self.settings(), ids=ids):
            self.output.value = token_html.plain(prompt, text.text)
        self.last = prompt, text
        unscored, tokens = token_html.score_tokens(model, tokenizer, text)
        self.output.value = token_html.shade(prompt + unscored, tokens)

    def _generate_cells(self, prompt: str, cells: list[Cell]) -> Iterator[list[str]]:
        """Continue a prompt with several checkpoints and settings; yield all texts so far."""
        texts = [""] * len(cells)
        for number, (step, settings) in enumerate(cells):
            if self.sampler.stop.is_set():
                return
            model, tokenizer = self.sampler.load(step)
            for text in self.sampler.stream(model, tokenizer, prompt, settings, f"step {step}: "):
                texts[number] = text.text
                yield texts

    def _report(self, line: str, is_error: bool = False):
        style = "color: #D55E00" if is_error else "opacity: .75"
        shown = html.escape(printable(line))
        self.status.value = f"<span role='status' style='{style}'>{shown}</span>"

    def _show_busy(self, is_busy: bool):
        for name, shown in self.buttons.items():
            shown.disabled = is_busy != (name == "Stop")

    def _show_columns(self, columns: list[Cell], prompt: str, texts: list[str]):
        self.side_by_side.value = token_html.cards([
            (f"step {step}, temperature {s.temperature:g}, top-k {s.top_k}, top-p {s.top_p:g}",
             prompt, text) for (step, s), text in zip(columns, texts, strict=True)])

    def _follow_checkpoints(self):
        """Offer the checkpoints that a run saves while the playground is open."""
        while self.box.comm is not None:  # until the widget is closed
            time.sleep(2)
            if (steps := checkpoint.checkpoint_steps(self.run_dir)) != list(self.chosen.options):
                self._show_checkpoints(steps)

    def _show_checkpoints(self, steps: list[int]):
        """Offer checkpoints; what is selected stays, or becomes the last one if it is gone."""
        selected, kept = self.step.value, [step for step in self.chosen.value if step in steps]
        mark = LEAKY_NAME if known_leaks(self.run_dir) else ""
        labeled = [(f"step {step}{mark}", step) for step in steps] or [("no checkpoint yet", 0)]
        ends = steps or [0]
        for field, options in [(self.step, labeled), (self.before, ends), (self.after, ends)]:
            value = field.value
            field.options = options
            field.value = value if value in steps else ends[-1]
        self.chosen.options, self.chosen.value = steps, kept
        if selected and selected not in steps:
            self._report(f"The checkpoint of step {selected} is gone.", is_error=True)
