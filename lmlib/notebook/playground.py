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
from lmlib.analysis import frames
from lmlib.errors import UserError
from lmlib.files import resolve_path
from lmlib.generation.settings import Settings
from lmlib.generation.text import HALF, Continuation, encode
from lmlib.leaks import LEAKY_NAME, known_leaks
from lmlib.notebook import token_html
from lmlib.notebook.keys import BOX, MAIN, Keys
from lmlib.notebook.live import is_live
from lmlib.notebook.picker import run_menu
from lmlib.notebook.sampler import Sampler
from lmlib.text import printable

OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # the slider's value for a setting of None
FULL, LABELED = {"width": "auto"}, {"description_width": "9em"}
WRAP, SMALL = {"flex_flow": "row wrap", "align_items": "center"}, {"width": "auto"}
LEFT = {"flex": "5 1 330px", "min_width": "0"}
RIGHT = {"flex": "2 1 310px", "align_content": "flex-start",
         "grid_template_columns": "repeat(auto-fit, minmax(300px, 1fr))"}
OFTEN = ["temperature", "max_new_tokens", "top_k", "top_p", "seed"]
HINTS = {"Tokens": "Press Generate: a continuation of the prompt appears here.",
         "Side by side": "Compare settings: add the checkpoint and the settings at the right as a "
                         "column, change them, add them again, and generate all.",
         "Grid": "Compare temperatures and checkpoints: choose several (with Ctrl), and fill the "
                 "grid with a text for each pair.",
         "Difference": "Compare two checkpoints on the text under Tokens: blue where the second "
                       "finds a token likelier, orange where less likely."}
LEGEND = ("The deeper the orange, the less likely the token was. Hover over a token, or reach it "
          "with the Tab key, to see the model's other choices.")
Cell = tuple[int, Settings]  # what generates one text: the step of a checkpoint, and settings


def playground(run_dir: str | Path | None = None, prompt: str = "",
               output_dir: str | Path = "outputs", **settings: Any):
    """Display the playground and generate a first text; the settings are fields of `Settings`.

    Its menu offers the runs under `output_dir`; without `run_dir` it opens the best of them. Where
    no browser shows widgets, a line says what to do.
    """
    if not is_live():
        print("The playground needs a browser: open this notebook in JupyterLab and run this cell.")
        return
    run_dir = resolve_path(run_dir) if run_dir else best_run(output_dir)
    play = Playground(run_dir, prompt, Settings(**settings), output_dir)
    fallback = {"text/plain": "The playground: run this cell to open it."}  # without the kernel
    display(play.box._repr_mimebundle_() | fallback, raw=True)
    play.sampler.start(play.open)


def best_run(output_dir: str | Path) -> Path:
    """Return the finished run without leaks with the fewest bits per byte, else the newest run.

    Runs without a checkpoint do not count. UserError: there is no other.
    """
    runs = frames.overview(output_dir)
    runs = runs[[bool(checkpoint.checkpoint_steps(Path(folder))) for folder in runs["folder"]]]
    if runs.empty:
        raise UserError(f"No run under {output_dir} has a checkpoint yet. `make train` trains one.")
    leaks = runs["notes"].str.contains("LEAKS|training text contains")
    good = runs[(runs["state"] == "finished") & ~leaks & runs["bits per byte"].notna()]
    best = good.loc[good["bits per byte"].idxmin()] if len(good) else runs.iloc[0]
    return Path(best["folder"])


def setting_widgets(settings: Settings) -> dict[str, w.DOMWidget]:
    """Return a widget for each setting, as the table in `Settings` describes it."""
    found = {}
    for f in fields(Settings):
        value, label = getattr(settings, f.name), f.metadata.get("label", "context full")
        options = {"description": label, "layout": FULL, "style": LABELED}
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


class Playground:
    """The widgets, and what their buttons do."""

    def __init__(self, run_dir: Path, prompt: str, settings: Settings,
                 output_dir: str | Path | None = None):
        self.run_dir, self.given = run_dir, settings
        self.columns: list[Cell] = []
        self.last: tuple[str, Continuation] | None = None  # prompt and continuation on display
        self.sampler = Sampler(run_dir, self._report, self._show_busy)
        self.prompt = w.Textarea(prompt, placeholder="Type a prompt. Ctrl+Enter generates.", rows=4,
                                 layout=FULL)
        self.menu = run_menu(output_dir or run_dir.parent, run_dir, width="auto")
        self.menu.style.description_width = "initial"
        self.step = w.SelectionSlider(options=[0], description="checkpoint", layout=FULL,
                                      continuous_update=False, style=LABELED)
        self.fields = setting_widgets(settings)
        self.keys = Keys(self._enter)
        self.status = w.HTML()
        self.output, self.side_by_side, self.table, self.difference = (w.HTML() for _ in HINTS)
        self.temperatures = w.Text("0, 0.5, 0.8, 1.2", description="temperatures", style=LABELED)
        self.chosen = w.SelectMultiple(description="checkpoints", rows=5, style=LABELED)
        self.before, self.after = (w.Dropdown(description=name, layout={"width": "11em"},
                                              style={"description_width": "3em"})
                                   for name in ("from", "to"))
        self.main = button("Generate", self._press, button_style="primary",
                           tooltip="Ctrl+Enter in the prompt generates too",
                           layout={"width": "11em"})
        self.main.add_class(MAIN)
        self._show_run()
        self.menu.observe(lambda change: self.sampler.start(self.open), "value")
        # Where a page is narrow, the controls stand above the text: wrap-reverse, whose end is up.
        around = {"flex_flow": "row wrap-reverse", "align_items": "flex-end", "max_width": "1300px",
                  "grid_gap": "0 16px"}
        self.box = w.HBox([self._text_column(), self._control_column()], layout=around)
        self.box.add_class(BOX)
        threading.Thread(target=self._follow_checkpoints, daemon=True).start()

    def _text_column(self) -> w.Widget:
        """Return the prompt, the buttons below it, the status line and the texts in tabs."""
        job = lambda name, run: button(name, self.sampler.start, run, layout=SMALL)  # noqa: E731
        add = button("Add these settings", self._add_column, layout=SMALL)
        clear = button("Clear", self._set_columns, [], layout=SMALL)
        tabs = [[self.output],
                [w.HBox([add, job("Generate all", self.generate_columns), clear], layout=WRAP),
                 self.side_by_side],
                [self.temperatures, self.chosen,
                 w.HBox([job("Fill the grid", self.generate_grid)]), self.table],
                [w.HBox([self.before, self.after, job("Compare", self.compare)], layout=WRAP),
                 self.difference]]
        buttons = [self.main, job("Continue", self.continue_text),
                   job("Another seed", self.another_seed), self.keys]
        shown = w.Tab([w.VBox(tab, layout={"min_height": "14em"}) for tab in tabs],
                      titles=list(HINTS))
        return w.VBox([self.prompt, w.HBox(buttons, layout=WRAP), self.status, shown], layout=LEFT)

    def _control_column(self) -> w.Widget:
        """Return the run, the checkpoint and the settings; those used rarely behind a button."""
        rare = [field for name, field in self.fields.items() if name not in OFTEN]
        more = w.ToggleButton(False, description="More", tooltip="settings used rarely",
                              layout=SMALL)

        def fold(_=None):
            more.description = "Less" if more.value else "More"
            for field in rare:
                field.layout.display = None if more.value else "none"

        more.observe(fold, "value")
        fold()
        often = [self.fields[name] for name in OFTEN]
        return w.GridBox([self.menu, self.step, *often, more, *rare], layout=RIGHT)

    def open(self):
        """Show the run that the menu names, and a first text of it."""
        if self.menu.value and self.menu.value != self.run_dir:
            self.run_dir = self.sampler.run_dir = self.menu.value
            self.last, self.columns = None, []
            self._show_run()
        if self.chosen.options:
            self.generate()

    def _show_run(self):
        """Show a run's checkpoints, and in each tab what can be done there."""
        self._show_checkpoints(checkpoint.checkpoint_steps(self.run_dir))
        self.step.index, self.before.index = len(self.step.options) - 1, 0
        self.after.index, self.chosen.value = len(self.after.options) - 1, self.chosen.options[-2:]
        self.keys.text = ""
        shown = (self.output, self.side_by_side, self.table, self.difference)
        for place, hint in zip(shown, HINTS.values(), strict=True):
            place.value = token_html.note(hint)

    def _press(self):
        self.sampler.start(None if self.sampler.is_running else self.generate)

    def _enter(self, prompt: str):
        """Generate from what the prompt's text area shows, of which Python may not know yet."""
        self.prompt.value = prompt
        self.sampler.start(self.generate)

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
        self.difference.value = token_html.shade_difference(prompt, before, after, names, unscored)
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
        self.keys.text = printable(prompt + text.text)
        unscored, tokens = token_html.score_tokens(model, tokenizer, text)
        shaded = token_html.shade(prompt, tokens, unscored)
        gray = f" Gray after the prompt is {token_html.UNSCORED}" if unscored else ""
        self.output.value = shaded + token_html.note(LEGEND + gray)

    def _generate_cells(self, prompt: str, cells: list[Cell]) -> Iterator[list[str]]:
        """Continue a prompt with several checkpoints and settings; yield all texts so far."""
        texts = [""] * len(cells)
        for number, (step, settings) in enumerate(cells):
            if self.sampler.stop.is_set():
                self._report(f"Stopped: {number} of {len(cells)} texts.")
                return
            model, tokenizer = self.sampler.load(step)
            for text in self.sampler.stream(model, tokenizer, prompt, settings, f"step {step}: "):
                texts[number] = text.text
                yield texts

    def _report(self, line: str, is_error: bool = False):
        style = "color: #D55E00" if is_error else "opacity: .75"
        shown = html.escape(printable(line))
        self.status.value = f"<span role='status' style='{style}'>{shown}</span>"

    def _show_busy(self, is_busy: bool, can_stop: bool = True):
        self.main.disabled = is_busy and not can_stop
        busy = "Stop" if can_stop else "Loading…"
        self.main.description = busy if is_busy else "Generate"
        self.main.button_style = "danger" if is_busy and can_stop else "primary"

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
