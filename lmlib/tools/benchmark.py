"""Score checkpoints by lm-eval, on a run's test documents or its own tasks. Needs the extra `eval`.

lm-eval loads a checkpoint by its stock class of transformers, as other tools do.
"""

import contextlib
import io
import logging
import math
import random
import re
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from lmlib import checkpoint
from lmlib.data.prepare import prepare
from lmlib.data.tokens import TokenStore
from lmlib.errors import UserError
from lmlib.files import read_mapping, write_json
from lmlib.intervals import clustered_mean
from lmlib.leaks import LEAKY, known_leaks
from lmlib.model.huggingface import NO_MASK
from lmlib.parameters import existing_folder, unknown_name
from lmlib.run.environment import check_data
from lmlib.run.run_audit import config_in

ITEMS, CONTEXT, ENDING, CHOICES = 200, 30, 8, 4  # items of a task; words; endings of an item
# What lm-eval needs to know of the tasks that are cut from a run's text, besides their items.
OWN_TASKS = {
    "run_text": {"output_type": "loglikelihood_rolling", "doc_to_text": "",
                 "doc_to_target": "text", "metric_list": [{"metric": "bits_per_byte"}]},
    "run_cloze": {"output_type": "loglikelihood", "doc_to_text": "context",
                  "doc_to_target": "word", "metric_list": [{"metric": "acc"}]},
    "run_choice": {"output_type": "multiple_choice", "doc_to_text": "context",
                   "doc_to_choice": "endings", "doc_to_target": "answer",
                   "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}}
# Means over items or bytes: others have no error that could be clustered by document.
METRICS = ("acc", "acc_norm", "exact_match", "bits_per_byte")


def benchmark(source: str | Path, steps: Iterable[checkpoint.Step], tasks: list[str] | None = None,
              text: str | Path | None = None) -> Iterator[tuple[int | None, list[dict[str, Any]]]]:
    """Yield each step and its scores; those of a run are kept in benchmarks/step_<step>.json,
    unless they are of another run's text.

    Args:
        source: a run, a checkpoint or a Hugging Face folder of any causal class (step None).
        tasks: names of OWN_TASKS and of lm-eval's tasks; None: all of the former.
        text: the run whose test documents OWN_TASKS are cut from; None: `source`.

    Raises a UserError if a task, its text or a checkpoint is not there.
    """
    from lm_eval import __version__
    from lm_eval.tasks import TaskManager
    run_dir, tasks = existing_folder(source), list(OWN_TASKS) if tasks is None else tasks
    folders = [checkpoint.find_checkpoint(run_dir, step) for step in steps]
    manager = TaskManager(include_defaults=not set(tasks) <= set(OWN_TASKS))
    known = [*OWN_TASKS, *manager.all_tasks]
    if unknown := [name for name in tasks if name not in known]:
        raise UserError(unknown_name(unknown[0], known, "task"))
    own = own_tasks(text or source) if set(tasks) & set(OWN_TASKS) else {}
    for folder in folders:
        found = _evaluate(folder, [own.get(name, name) for name in tasks], manager)
        scores = [score for task, samples in found.items() for score in summarize(task, samples)]
        step, leaks = read_mapping(folder / "checkpoint.json").get("step"), known_leaks(folder)
        if text is None and (run_dir / "checkpoints").is_dir():
            file = run_dir / "benchmarks" / f"step_{step}.json"
            others = [score for score in read_mapping(file).get("scores", [])
                      if score["task"] not in found]  # of an earlier call
            file.parent.mkdir(exist_ok=True)
            write_json(file, {"step": step, "tool": f"lm-eval {__version__}",
                              **({LEAKY: leaks} if leaks else {}), "scores": others + scores})
        yield step, scores
        if without := sorted(found.keys() - {score["task"] for score in scores}):
            raise UserError(f"{', '.join(without)}: none of lm-eval's metrics there is one of "
                            f"{', '.join(METRICS)}, which have a standard error by document.")


def own_tasks(run_dir: str | Path) -> dict[str, dict[str, Any]]:
    """Describe OWN_TASKS to lm-eval, with items cut from the test documents of a run."""
    from datasets import Dataset
    run_dir = existing_folder(run_dir)
    if not (run_dir / "checkpoints").is_dir():
        raise UserError(f"{run_dir} is a model without text of its own: name tasks of lm-eval, or "
                        "give a run's test documents by --text RUN.")
    folder, config = checkpoint.find_checkpoint(run_dir), config_in(run_dir)
    if not (config.has_test and config.score_test):
        raise UserError(f"{run_dir} has no test score (test_fraction is 0, score_test is false, or "
                        "its windows overlap): name tasks of lm-eval instead.")
    store = prepare(config, tokenizer=str(folder))
    check_data(run_dir, folder, store)
    return {name: {"task": name, "test_split": "test", "target_delimiter": "", **OWN_TASKS[name],
                   "custom_dataset": lambda items=items, **_: {"test": Dataset.from_list(items)}}
            for name, items in cut_items(store).items()}


def cut_items(store: TokenStore) -> dict[str, list[dict[str, Any]]]:
    """Cut the items of OWN_TASKS from test documents, the same for every model and seed.

    run_text: the windows of the test score. run_cloze: a word after 30 others. run_choice: what
    follows 30 words, among other endings from the test documents. Short text gives fewer items.
    """
    text, tokenizer, choose = store.evaluation_text("test"), store.tokenizer, random.Random(0)
    windows = [{"document": text.units[documents[0]],
                "text": tokenizer.decode(ids[ids != tokenizer.eos_token_id].tolist())}
               for ids, documents in zip(text.windows[:, 1:], text.documents, strict=True)]
    # Words with the spaces before them: joined they are the text again.
    documents = [(unit, re.findall(r"\s*\S+", document)) for unit, document in
                 zip(text.units, store.texts("test"), strict=True)]
    documents = [(unit, words) for unit, words in documents if len(words) > CONTEXT + ENDING]
    if not documents:
        raise UserError(f"No test document has more than {CONTEXT + ENDING} words, so no items "
                        "can be cut from them: name tasks of lm-eval instead.")
    choose.shuffle(documents)
    cloze, choice, taken = [], [], set()
    for number in range(ITEMS):
        unit, words = documents[number % len(documents)]
        start = choose.randrange(CONTEXT, len(words) - ENDING)
        if (unit, start) in taken:
            continue
        taken.add((unit, start))
        item = {"document": unit, "context": "".join(words[start - CONTEXT : start])}
        cloze.append({**item, "word": words[start]})
        endings = ["".join(words[start : start + ENDING])]
        for _ in range(100):  # of short documents many endings are the same
            other = choose.choice(documents)[1]
            place = choose.randrange(CONTEXT, len(other) - ENDING)
            ending = "".join(other[place : place + ENDING])
            endings += [ending] if len(endings) < CHOICES and ending not in endings else []
        if len(endings) < CHOICES:
            continue
        order = choose.sample(range(CHOICES), CHOICES)  # 0 is the true ending
        choice.append({**item, "endings": [endings[i] for i in order], "answer": order.index(0)})
    return dict(zip(OWN_TASKS, (windows, cloze, choice), strict=True))


def _evaluate(folder: Path, tasks: list[Any], manager: Any) -> dict[str, list[dict[str, Any]]]:
    """Return what lm-eval says of each item of each task."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    if read_mapping(folder / "config.json").get(NO_MASK):
        raise UserError(f"{folder} has no causal mask, which every stock class has: lm-eval would "
                        "score another model.")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    silence = contextlib.redirect_stderr(io.StringIO())  # it draws a bar for each batch
    try:
        with silence:
            model = HFLM(pretrained=str(folder), dtype="float32", device=device, batch_size=8)
    except Exception as error:  # transformers raises many types for a bad folder
        raise UserError(f"lm-eval cannot load {folder} as a language model: {error}") from error
    tokens, rows = len(model.tokenizer), model.model.get_input_embeddings().num_embeddings
    if tokens > rows:
        raise UserError(f"The tokenizer in {folder} has {tokens} tokens, and its model rows for "
                        f"{rows}: they are not of one model.")
    try:
        with silence:
            found = simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    except OSError as error:  # as are those of datasets and huggingface_hub
        raise UserError(f"lm-eval cannot get a task's data; is there a network? {error}") from error
    return found["samples"]


def summarize(task: str, samples: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a task's scores from lm-eval's samples, with errors clustered by document.

    The items of a public task count as documents. `chance` is what guessing reaches: any byte, any
    choice, or always the most common answer.
    """
    filters = {sample.get("filter"): None for sample in samples}  # ways to read an answer
    for name, metric in product(filters, METRICS):
        items = [sample for sample in samples if sample.get("filter") == name and metric in sample]
        if not items:
            continue
        choices = [len(sample["arguments"]) for sample in items]
        answers = [str(sample["target"]) for sample in items]
        guess = (sum(1 / count for count in choices) / len(choices) if min(choices) > 1 else
                 max(map(answers.count, answers)) / len(answers))
        is_bits, clusters = metric == "bits_per_byte", {}
        for number, sample in enumerate(items):
            value = sample[metric]  # of bits_per_byte: log-likelihood in nats, and bytes
            total, size = (-value[0] / math.log(2), value[1]) if is_bits else (float(value), 1)
            sums = clusters.setdefault(sample["doc"].get("document", number), [0.0, 0])
            sums[0], sums[1] = sums[0] + total, sums[1] + size
        found = clustered_mean(clusters.values())
        yield {"task": task, "metric": f"{metric},{name}" if len(filters) > 1 else metric,
               "score": found.mean, "stderr": found.stderr, "chance": 8.0 if is_bits else guess,
               "items": len(items), "clusters": found.clusters}
