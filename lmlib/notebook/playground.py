"""The playground."""

import html
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipywidgets
from IPython.display import display

from lmlib import checkpoint
from lmlib.files import resolve_path
from lmlib.generation.settings import Settings
from lmlib.generation.text import Continuation, describe_continuation, encode, generate_ids
from lmlib.leaks import LEAKY_NAME, known_leaks
from lmlib.notebook import token_html
from lmlib.notebook.live import is_live
from lmlib.text import printable

PAUSE = 0.05  # seconds between two updates of a text, at least


POLL = 2.0  # seconds between two looks for new checkpoints


def playground(run_dir: str | Path, prompt: str = "", **settings: Any):
    """Sliders and buttons to write with any checkpoint of a run; settings are those of `generation.Settings`.

    Only JupyterLab can move them; elsewhere a line says so.
    """
    if is_live():
        display(Playground(resolve_path(run_dir), prompt, Settings(**settings)).box)
    else:
        print("The playground needs a person: open this notebook in JupyterLab and run this cell there.")


class Playground:
    """The widgets and what they do. One thing is written at a time, in a thread, so that Stop can be heard."""

    def __init__(self, run_dir: Path, prompt: str, settings: Settings):
        self.run_dir, self.given, self.models, self.columns = run_dir, settings, {}, []
        self.stopping, self.thread, self.last = threading.Event(), None, None
        w, wide, half = ipywidgets, {"width": "97%"}, {"width": "47%"}

        def slider(kind: Any, name: str, value: Any, low: Any, high: Any, step: Any) -> Any:
            low, high = min(low, value), max(high, value)
            return kind(value, min=low, max=high, step=step, description=name, layout=half, style={"description_width": "9em"})

        steps = checkpoint.checkpoint_steps(run_dir)
        self.prompt = w.Textarea(prompt, placeholder="Write a beginning here", layout={**wide, "height": "5em"})
        self.step = w.SelectionSlider(options=self._choices(steps), description="checkpoint", continuous_update=False)
        self.step.index, self.step.layout.width, self.step.style.description_width = len(self.step.options) - 1, "97%", "9em"
        self.fields = {
            "temperature": slider(w.FloatSlider, "temperature", settings.temperature, 0, 2, 0.05),
            "max_new_tokens": slider(w.IntSlider, "length", settings.max_new_tokens, 1, 500, 1),
            "top_k": slider(w.IntSlider, "top-k (0: all)", settings.top_k or 0, 0, 200, 1),
            "top_p": slider(w.FloatSlider, "top-p", settings.top_p or 1.0, 0.05, 1, 0.01),
            "min_p": slider(w.FloatSlider, "min-p", settings.min_p or 0.0, 0, 0.5, 0.01),
            "repetition_penalty": slider(w.FloatSlider, "repetition penalty", settings.repetition_penalty, 1, 2, 0.05),
            "seed": w.BoundedIntText(settings.seed, min=0, max=2**53, description="seed", layout=half),
            "past_window": w.Dropdown(options=["slide", "stop"], value=settings.past_window, description="past the window"),
        }
        for name in ("seed", "past_window"):
            self.fields[name].layout.width, self.fields[name].style.description_width = "47%", "9em"
        self.status, self.output = w.HTML(), w.HTML(layout=wide)
        self.buttons = {
            "Generate": (self.write, "primary"),
            "Continue": (self.go_on, ""),
            "Another seed": (self.another, ""),
            "Stop": (None, "danger"),
        }
        for name, (job, style) in self.buttons.items():
            self.buttons[name] = self._button(name, job, style)
        self.buttons["Stop"].disabled = True
        self.buttons["Stop"].on_click(lambda _: self.stopping.set())

        # Side by side, grid, difference
        self.beside, self.table, self.difference = (w.HTML(layout=wide) for _ in range(3))
        self.temperatures = w.Text("0, 0.5, 0.8, 1.2", description="temperatures", style={"description_width": "9em"})
        self.chosen = w.SelectMultiple(options=steps, value=steps[-2:], description="checkpoints", rows=5)
        self.chosen.style.description_width = "9em"
        ends = {"options": steps or [0]}
        self.before = w.Dropdown(**ends, value=ends["options"][0], description="from")
        self.after = w.Dropdown(**ends, value=ends["options"][-1], description="to")
        add = w.Button(description="Add these settings", tooltip="the checkpoint and settings above become a column")
        add.on_click(lambda _: self._add_column())
        clear = w.Button(description="Clear")
        clear.on_click(lambda _: self._add_column(clear=True))
        tabs = {
            "What it was thinking": w.VBox([self.output]),
            "Side by side": w.VBox([w.HBox([add, self._button("Write all", self.write_columns), clear]), self.beside]),
            "Grid": w.VBox([self.temperatures, self.chosen, self._button("Fill the grid", self.write_grid), self.table]),
            "Difference": w.VBox(
                [w.HBox([self.before, self.after, self._button("Compare", self.compare)]), self.difference],
            ),
        }
        f = self.fields
        rare = w.VBox([w.HBox([f["min_p"], f["repetition_penalty"]]), f["past_window"]])
        more = w.Accordion([rare], titles=["More"])
        self.box = w.VBox(
            [
                self.prompt,
                self.step,
                w.HBox([f["temperature"], f["max_new_tokens"]]),
                w.HBox([f["top_k"], f["top_p"]]),
                w.HBox([f["seed"]]),
                more,
                w.HBox(list(self.buttons.values())),
                self.status,
                w.Tab(list(tabs.values()), titles=list(tabs)),
            ],
            layout={"max_width": "900px"},
        )
        threading.Thread(target=self._look_for_checkpoints, daemon=True).start()

    # What the buttons do

    def write(self):
        """The prompt, continued."""
        model, tokenizer = self._model(self.step.value)
        self._write_ids(model, tokenizer, encode(model, tokenizer, self.prompt.value), self.prompt.value)

    def go_on(self):
        """What was written last, continued."""
        if self.last is None:
            return self.write()
        model, tokenizer = self._model(self.step.value)
        given, text = self.last
        ids = (text.prompt_ids + text.ids)[-model.config.sequence_length :]
        return self._write_ids(model, tokenizer, ids, given + text.text.rstrip("\N{REPLACEMENT CHARACTER}"))

    def another(self):
        """The prompt with the next seed."""
        self.fields["seed"].value += 1
        self.write()

    def write_columns(self):
        """The prompt, written by each of the columns' checkpoints and settings."""
        if not self.columns:
            self._add_column()
        columns, prompt, seed = list(self.columns), self.prompt.value, self.fields["seed"].value
        written = [""] * len(columns)
        for number, (step, settings) in enumerate(columns):
            for text in self._texts(step, prompt, replace(settings, seed=seed)):
                written[number] = text.text
                self.beside.value = self._cards(columns, prompt, written)

    def write_grid(self):
        """The prompt, written at each temperature by each checkpoint chosen."""
        try:
            temperatures = [float(part) for part in self.temperatures.value.replace(";", ",").split(",") if part.strip()]
        except ValueError:
            raise ValueError("temperatures must be numbers with commas between them, as in 0, 0.8, 1.2") from None
        steps, prompt, settings = self.chosen.value, self.prompt.value, self.settings()
        if not (steps and temperatures):
            raise ValueError("choose at least one checkpoint and one temperature")
        rows = [(f"temperature {t:g}", [""] * len(steps)) for t in temperatures]
        for column, step in enumerate(steps):
            for row, temperature in enumerate(temperatures):
                for text in self._texts(step, prompt, replace(settings, temperature=temperature)):
                    rows[row][1][column] = text.text
                    self.table.value = token_html.grid([f"step {s}" for s in steps], rows)

    def compare(self):
        """The last text, or the prompt, judged by two checkpoints."""
        steps, judged = (self.before.value, self.after.value), []
        for step in steps:
            model, tokenizer = self._model(step)
            if self.last:
                ids, first = self.last[1].prompt_ids + self.last[1].ids, len(self.last[1].prompt_ids)
            else:
                ids, first = encode(model, tokenizer, self.prompt.value), 1
            judged.append(token_html.tokens_of(model, tokenizer, ids, first))
        given = self._unjudged(tokenizer, len(judged[0])) if self.last else tokenizer.decode(ids[:1])
        self.difference.value = token_html.shade_difference(given, *judged, tuple(f"step {step}" for step in steps))
        self._say(f"Blue: step {steps[1]} finds it likelier than step {steps[0]}; orange: less likely.")

    # How they do it

    def settings(self) -> Settings:
        """What the sliders say."""
        values = {name: field.value for name, field in self.fields.items()}
        return replace(self.given, **{**values, "min_p": values["min_p"] or None})

    def _button(self, name: str, job: Callable | None, style: str = "") -> Any:
        button = ipywidgets.Button(description=name, button_style=style)
        if job:
            button.on_click(lambda _: self._start(job))
        return button

    def _start(self, job: Callable):
        """Run a job in the background unless one is running; what goes wrong is said below the buttons."""
        if self.thread is not None and self.thread.is_alive():
            return

        def run():
            try:
                job()
            except ValueError as error:
                self._say(str(error), alarm=True)
            except Exception as error:  # the session lives on
                self._say(f"{type(error).__name__}: {error}", alarm=True)
            finally:
                self._busy(False)

        self.stopping.clear()
        self._say("…")
        self._busy(True)
        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def _busy(self, busy: bool):
        for name, button in self.buttons.items():
            button.disabled = busy != (name == "Stop")

    def _say(self, line: str, alarm: bool = False):
        color = "color: #D55E00" if alarm else "opacity: .75"
        self.status.value = f"<span role='status' style='{color}'>{html.escape(printable(line))}</span>"

    def _write_ids(self, model: Any, tokenizer: Any, ids: list[int], given: str):
        began = time.monotonic()
        for text in self._grown(model, tokenizer, ids, self.settings()):
            self.output.value = token_html.plain(given, text.text)
            self._say(describe_continuation(text, model.config.sequence_length, time.monotonic() - began))
        self.last = given, text
        tokens = token_html.tokens_of(model, tokenizer, text.prompt_ids + text.ids, len(text.prompt_ids))
        self.output.value = token_html.shade(self._unjudged(tokenizer, len(tokens)), tokens)

    def _unjudged(self, tokenizer: Any, judged: int) -> str:
        """The last prompt, and what was written behind it before its last `judged` tokens."""
        given, text = self.last
        return given + tokenizer.decode(text.ids[: len(text.ids) - judged], skip_special_tokens=True)

    def _texts(self, step: int | None, prompt: str, settings: Settings) -> Iterator[Continuation]:
        if self.stopping.is_set():
            return
        model, tokenizer = self._model(step)
        began = time.monotonic()
        for text in self._grown(model, tokenizer, encode(model, tokenizer, prompt), settings):
            self._say(f"step {step}: {describe_continuation(text, model.config.sequence_length, time.monotonic() - began)}")
            yield text

    def _grown(self, model: Any, tokenizer: Any, ids: list[int], settings: Settings) -> Iterator[Continuation]:
        """A continuation as it grows, at most every PAUSE, and once it has ended or was stopped."""
        shown = 0.0
        for [text] in generate_ids(model, tokenizer, [ids], settings):
            if self.stopping.is_set():
                break
            if time.monotonic() - shown >= PAUSE:
                yield text
                shown = time.monotonic()
        yield text

    def _model(self, step: int | None) -> tuple[Any, Any]:
        """The model and tokenizer of a checkpoint; the last three stay in memory."""
        folder = checkpoint.find_checkpoint(self.run_dir, step)
        if folder not in self.models:
            while len(self.models) >= 3:
                del self.models[next(iter(self.models))]
            self.models[folder] = checkpoint.load(folder)
        return self.models[folder]

    def _add_column(self, clear: bool = False):
        self.columns = [] if clear else [*self.columns, (self.step.value, self.settings())]
        self.beside.value = self._cards(self.columns, self.prompt.value, [""] * len(self.columns))

    def _cards(self, columns: list[tuple[int, Settings]], prompt: str, written: list[str]) -> str:
        boxes = []
        for (step, s), text in zip(columns, written, strict=True):
            heading = f"step {step}, temperature {s.temperature:g}, top-k {s.top_k}, top-p {s.top_p:g}"
            boxes.append((heading, prompt, text))
        return token_html.cards(boxes)

    def _choices(self, steps: list[int]) -> list[tuple[str, int]]:
        mark = LEAKY_NAME if known_leaks(self.run_dir) else ""
        return [(f"step {step}{mark}", step) for step in steps] or [("no checkpoint yet", 0)]

    def _look_for_checkpoints(self):
        """Show checkpoints that a run still training has saved since."""
        known = checkpoint.checkpoint_steps(self.run_dir)
        while self.box.comm is not None:
            time.sleep(POLL)
            if (steps := checkpoint.checkpoint_steps(self.run_dir)) != known:
                known = steps
                self._show_checkpoints(steps)

    def _show_checkpoints(self, steps: list[int]):
        chosen = self.step.value
        for field, options in ((self.step, self._choices(steps)), (self.before, steps or [0]), (self.after, steps or [0])):
            value = field.value
            field.options = options
            field.value = value if value in steps else (steps or [0])[-1]
        kept = [step for step in self.chosen.value if step in steps]
        self.chosen.options = steps
        self.chosen.value = kept
        if chosen and chosen not in steps:
            self._say(f"The checkpoint of step {chosen} is gone.", alarm=True)
