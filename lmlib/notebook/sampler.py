"""Sampling in a thread beside the kernel's own, so that a page stays answered."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lmlib import checkpoint
from lmlib.generation.settings import Settings
from lmlib.generation.text import Continuation, describe_continuation, encode, generate_ids

LOADING = "loading the model…"
UPDATE_INTERVAL = 0.05  # least seconds between two updates of a text: a browser queues faster ones


class Sampler:
    """Samples from a run's checkpoints in a thread, so that the kernel can receive a click on Stop.

    `report(line, is_error=False)` shows a status line, `show_busy(is_busy, can_stop=True)` whether
    a job runs, and whether it can be stopped: not while it loads a model.
    """

    def __init__(self, run_dir: Path, report: Callable[..., None], show_busy: Callable[..., None]):
        self.run_dir, self.report, self.show_busy = run_dir, report, show_busy
        self.stop, self.thread = threading.Event(), None
        self.lock, self.is_running = threading.Lock(), False
        self.next: Callable[[], None] | None = None
        self.models: dict[Path, tuple[Any, Any]] = {}  # checkpoint -> model and tokenizer

    def start(self, job: Callable[[], None] | None):
        """Run a job in the thread; one that is running is stopped first. None: only stop."""
        with self.lock:
            self.next = job
            if self.is_running:
                self.stop.set()
            elif job:
                self.is_running = True
                self.thread = threading.Thread(target=self._run, daemon=True)
                self.thread.start()

    def _run(self):
        while True:
            with self.lock:
                job, self.next = self.next, None
                self.is_running = job is not None
                self.stop.clear()
                self.show_busy(self.is_running, can_stop=bool(self.models))
                if job is None:
                    return
            self.report("generating…" if self.models else LOADING)
            try:
                job()
            except Exception as error:  # a failed job must not end the session
                name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                self.report(f"{name}{error}", is_error=True)

    def load(self, step: int | None) -> tuple[Any, Any]:
        """Return a checkpoint's model and tokenizer, from memory if they are there."""
        folder = checkpoint.find_checkpoint(self.run_dir, step)
        if folder not in self.models:
            if len(self.models) >= 3:  # enough to compare checkpoints without loading them again
                del self.models[next(iter(self.models))]
            self.report(LOADING)
            self.show_busy(True, can_stop=False)
            self.models[folder] = checkpoint.load(folder)
            self.report("generating…")
            self.show_busy(True)
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
                is_stopped = "" if text.ended_by or not is_last else "; stopped"
                self.report(label + describe_continuation(text, window, now - start) + is_stopped)
                yield text
                shown = time.monotonic()
            if is_last:
                return
