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
from lmlib.files import resolve_path
from lmlib.generation.settings import Settings
from lmlib.generation.text import HALF, Continuation, describe_continuation, encode, generate_ids
from lmlib.leaks import LEAKY_NAME, known_leaks
from lmlib.notebook import token_html
from lmlib.notebook.live import is_live
from lmlib.text import printable

UPDATE_INTERVAL = 0.05  # least seconds between two updates of a text: a browser queues faster ones
POLL_INTERVAL = 2.0  # seconds between two looks for new checkpoints
CACHED_MODELS = 3  # comparing a few checkpoints should not load them again and again
MAX_SEED = 2**53  # the largest integer that JavaScript holds exactly
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # the slider's value for a setting of None
WIDE, HALF_WIDTH, LABELED = {"width": "97%"}, {"width": "47%"}, {"description_width": "9em"}
Cell = tuple[int, Settings]  # checkpoint's step and settings
Column = tuple[str, int, Settings]  # heading, checkpoint's step and settings


def playground(run_dir: str | Path, prompt: str = "", **settings: Any):
    """Display the playground of a run; the settings are fields of `Settings`.

    Widgets need JupyterLab; elsewhere a printed line says so.
    """
    if is_live():
        display(Playground(resolve_path(run_dir), prompt, Settings(**settings)).box)
    else:
        print("The playground needs a browser: "
              "open this notebook in JupyterLab and run this cell there.")


def setting_widgets(settings: Settings) -> dict[str, w.DOMWidget]:
    """Return a widget for each setting, as the table in `Settings` describes it."""
    options = {"layout": HALF_WIDTH, "style": LABELED}
    found = {}
    for f in fields(Settings):
        value, label = getattr(settings, f.name), f.metadata.get("label")
        if f.metadata.get("slider"):
            low, high, step = f.metadata["slider"]
            value = OFF[f.name] if value is None else value
            slider = w.IntSlider if isinstance(step, int) else w.FloatSlider
            # A value beyond the slider's limits extends them instead of being clipped.
            found[f.name] = slider(value, min=min(low, value), max=max(high, value), step=step,
                                   description=label, **options)
        elif f.name == "seed":
            found[f.name] = w.BoundedIntText(value, min=0, max=MAX_SEED, description=label,
                                             **options)
        elif f.metadata.get("choices"):
            found[f.name] = w.Dropdown(options=f.metadata["choices"], value=value,
                                       description="context full", **options)
    return found


def button(name: str, on_click: Callable[[], None], **options: Any) -> w.Button:
    made = w.Button(description=name, **options)
    made.on_click(lambda _: on_click())
    return made


class Sampler:
    """Samples from a run's checkpoints in a thread, so that the kernel can receive a click on Stop.

    `report(line, is_error=False)` shows a status line, `show_busy(is_busy)` whether a job runs.
    """

    def __init__(self, run_dir: Path, report: Callable[..., None],
                 show_busy: Callable[[bool], None]):
        self.run_dir, self.report, self.show_busy = run_dir, report, show_busy
        self.stop, self.thread = threading.Event(), None
        self.models: dict[Path, tuple[Any, Any]] = {}  # checkpoint -> model and tokenizer

    def start(self, job: Callable[[], None]):
        """Run a job in the thread, unless one is running."""
        if self.thread is not None and self.thread.is_alive():
            return
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
            while len(self.models) >= CACHED_MODELS:
                del self.models[next(iter(self.models))]
            self.models[folder] = checkpoint.load(folder)
        return self.models[folder]

    def stream(self, model: Any, tokenizer: Any, ids: list[int], settings: Settings,
               label: str = "") -> Iterator[Continuation]:
        """Yield a continuation as it grows, at most every UPDATE_INTERVAL, and at its end."""
        start, shown = time.monotonic(), 0.0
        for [text] in generate_ids(model, tokenizer, [ids], settings):
            is_last, now = text.ended_by or self.stop.is_set(), time.monotonic()
            if is_last or now - shown >= UPDATE_INTERVAL:
                line = describe_continuation(text, model.config.sequence_length, now - start)
                self.report(label + line)
                yield text
                shown = time.monotonic()
            if is_last:
                return


class Playground:
    """The widgets, and what their buttons do."""

    def __init__(self, run_dir: Path, prompt: str, settings: Settings):
        self.run_dir, self.given = run_dir, settings
        self.columns: list[Column] = []
        self.last: tuple[str, Continuation] | None = None  # prompt and continuation on display
        self.sampler = Sampler(run_dir, self._report, self._show_busy)
        steps = checkpoint.checkpoint_steps(run_dir)
        ends = steps or [0]
        self.prompt = w.Textarea(prompt, placeholder="Type a prompt",
                                 layout={**WIDE, "height": "5em"})
        self.step = w.SelectionSlider(options=self._step_options(steps), description="checkpoint",
                                      continuous_update=False, layout=WIDE, style=LABELED)
        self.step.index = len(self.step.options) - 1
        self.fields = setting_widgets(settings)
        self.buttons = {
            "Generate": self._job_button("Generate", self.generate, button_style="primary"),
            "Continue": self._job_button("Continue", self.continue_text),
            "Another seed": self._job_button("Another seed", self.another_seed),
            "Stop": button("Stop", self.sampler.stop.set, button_style="danger", disabled=True)}
        self.status, self.output, self.side_by_side, self.table, self.difference = (
            w.HTML(layout=WIDE) for _ in range(5))
        self.temperatures = w.Text("0, 0.5, 0.8, 1.2", description="temperatures", style=LABELED)
        self.chosen = w.SelectMultiple(options=steps, value=steps[-2:], description="checkpoints",
                                       rows=5, style=LABELED)
        self.before = w.Dropdown(options=ends, value=ends[0], description="from")
        self.after = w.Dropdown(options=ends, value=ends[-1], description="to")
        self.box = self._layout()
        threading.Thread(target=self._follow_checkpoints, daemon=True).start()

    def _layout(self) -> w.VBox:
        def row(*names: str) -> w.HBox:
            return w.HBox([self.fields[name] for name in names])

        add = button("Add these settings", self._add_column,
                     tooltip="add a column with the checkpoint and settings above")
        generate_all = self._job_button("Generate all", self.generate_columns)
        clear = button("Clear", lambda: self._set_columns([]))
        fill_grid = self._job_button("Fill the grid", self.generate_grid)
        compare = self._job_button("Compare", self.compare)
        tabs = {
            "Tokens": w.VBox([self.output]),
            "Side by side": w.VBox([w.HBox([add, generate_all, clear]), self.side_by_side]),
            "Grid": w.VBox([self.temperatures, self.chosen, fill_grid, self.table]),
            "Difference": w.VBox([w.HBox([self.before, self.after, compare]), self.difference])}
        more = w.VBox([row("min_p", "repetition_penalty"), row("past_window")])
        shown = [self.prompt, self.step, row("temperature", "max_new_tokens"),
                 row("top_k", "top_p"), row("seed"), w.Accordion([more], titles=["More"]),
                 w.HBox(list(self.buttons.values())), self.status,
                 w.Tab(list(tabs.values()), titles=list(tabs))]
        return w.VBox(shown, layout={"max_width": "900px"})

    def _job_button(self, name: str, job: Callable[[], None], **options: Any) -> w.Button:
        return button(name, lambda: self.sampler.start(job), **options)

    # What the buttons do

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
        """Continue the prompt with the checkpoint and settings of each column."""
        if not self.columns:
            self._add_column()
        columns, prompt, seed = self.columns, self.prompt.value, self.fields["seed"].value
        cells = [(step, replace(settings, seed=seed)) for _, step, settings in columns]
        for texts in self._generate_cells(prompt, cells):
            self._show_columns(columns, prompt, texts)

    def generate_grid(self):
        """Continue the prompt at each temperature with each selected checkpoint."""
        words = self.temperatures.value.replace(";", ",").split(",")
        try:
            temperatures = [float(word) for word in words if word.strip()]
        except ValueError:
            raise ValueError("temperatures must be numbers with commas between them, "
                             "as in 0, 0.8, 1.2") from None
        steps, settings = self.chosen.value, self.settings()
        if not (steps and temperatures):
            raise ValueError("choose at least one checkpoint and one temperature")
        cells = [(step, replace(settings, temperature=t)) for step in steps for t in temperatures]
        for texts in self._generate_cells(self.prompt.value, cells):
            rows = [(f"temperature {t:g}", texts[row :: len(temperatures)])
                    for row, t in enumerate(temperatures)]
            self.table.value = token_html.grid([f"step {step}" for step in steps], rows)

    def compare(self):
        """Score the last continuation, or the prompt if there is none, with two checkpoints."""
        steps = (self.before.value, self.after.value)
        models = [self.sampler.load(step) for step in steps]
        if self.last:
            prompt, text = self.last
        else:  # all but the prompt's first token can be scored
            ids = encode(*models[1], self.prompt.value)
            prompt, text = models[1][1].decode(ids[:1]), Continuation(ids[:1], ids[1:])
        [(_, before), (unscored, after)] = [
            token_html.score_tokens(*loaded, text) for loaded in models]
        names = (f"step {steps[0]}", f"step {steps[1]}")
        self.difference.value = token_html.shade_difference(
            prompt + unscored, before, after, names)
        self._report(f"Blue: {names[1]} finds it likelier than {names[0]}; orange: less likely.")

    def _add_column(self):
        step, s = self.step.value, self.settings()
        heading = f"step {step}, temperature {s.temperature:g}, top-k {s.top_k}, top-p {s.top_p:g}"
        self._set_columns([*self.columns, (heading, step, s)])

    def _set_columns(self, columns: list[Column]):
        self.columns = columns
        self._show_columns(columns, self.prompt.value, [""] * len(columns))

    # How text is generated

    def settings(self) -> Settings:
        """Return the settings that the widgets show; the others are those given at the start."""
        values = {name: field.value for name, field in self.fields.items()}
        return replace(self.given, **{**values, "min_p": values["min_p"] or None})

    def _generate(self, prompt: str, ids: list[int] | None = None):
        """Show a continuation of `prompt` as it grows, then its tokens' probabilities.

        `ids` are the prompt's token ids where they are known; else it is encoded.
        """
        model, tokenizer = self.sampler.load(self.step.value)
        window = model.config.sequence_length
        ids = encode(model, tokenizer, prompt) if ids is None else ids[-window:]
        for text in self.sampler.stream(model, tokenizer, ids, self.settings()):
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
            ids = encode(model, tokenizer, prompt)
            for text in self.sampler.stream(model, tokenizer, ids, settings, f"step {step}: "):
                texts[number] = text.text
                yield texts

    # What is shown

    def _report(self, line: str, is_error: bool = False):
        style = "color: #D55E00" if is_error else "opacity: .75"
        line = html.escape(printable(line))
        self.status.value = f"<span role='status' style='{style}'>{line}</span>"

    def _show_busy(self, is_busy: bool):
        for name, shown in self.buttons.items():
            shown.disabled = is_busy != (name == "Stop")

    def _show_columns(self, columns: list[Column], prompt: str, texts: list[str]):
        boxes = [(heading, prompt, text)
                 for (heading, _, _), text in zip(columns, texts, strict=True)]
        self.side_by_side.value = token_html.cards(boxes)

    def _step_options(self, steps: list[int]) -> list[tuple[str, int]]:
        mark = LEAKY_NAME if known_leaks(self.run_dir) else ""
        return [(f"step {step}{mark}", step) for step in steps] or [("no checkpoint yet", 0)]

    def _follow_checkpoints(self):
        """Offer the checkpoints that a run saves while the playground is open."""
        known = checkpoint.checkpoint_steps(self.run_dir)
        while self.box.comm is not None:  # until the widget is closed
            time.sleep(POLL_INTERVAL)
            if (steps := checkpoint.checkpoint_steps(self.run_dir)) != known:
                known = steps
                self._show_checkpoints(steps)

    def _show_checkpoints(self, steps: list[int]):
        selected, kept = self.step.value, [step for step in self.chosen.value if step in steps]
        ends = steps or [0]
        for field, options in [(self.step, self._step_options(steps)),
                               (self.before, ends), (self.after, ends)]:
            value = field.value
            field.options = options
            field.value = value if value in steps else ends[-1]
        self.chosen.options = steps
        self.chosen.value = kept
        if selected and selected not in steps:
            self._report(f"The checkpoint of step {selected} is gone.", is_error=True)
