"""The README.md of a checkpoint: what its scores were measured on and how far to trust them."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmlib.config import RunConfig
from lmlib.data.corpus import name_and_license
from lmlib.files import read_mapping
from lmlib.intervals import Estimate
from lmlib.leaks import LEAKY
from lmlib.model.huggingface import stock_config
from lmlib.text import printable


def write_card(folder: Path, config: RunConfig, scores: dict[str, Any]):
    """Write the card of a checkpoint in a run's folder.

    `scores` has the keys of an evaluation, `val_*`, and `test_*` once the run has a test score.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData
    manifest = read_mapping(folder / "checkpoint.json")
    audit = read_mapping(folder.parent.parent / "environment.json").get("audit", {})
    (corpus, _), leaks = name_and_license(config.corpus), manifest.get(LEAKY)
    held_out = name_and_license(config.validation_corpus or config.corpus)[0]
    is_trusted = manifest.get("lineage") != "unknown" and not leaks  # leaderboards read results
    results = [EvalResult(
        "text-generation", held_out, held_out, metric, scores[f"test_{metric}"],
        dataset_split="test", dataset_args={"documents": scores.get("test_documents")},
        metric_name=name, metric_args={"standard_error": scores.get(f"test_{metric}_stderr")})
        for metric, name in [("loss", "nats per token"), ("bits_per_byte", "bits per byte")]
        if is_trusted and f"test_{metric}" in scores]
    library = "transformers" if config.causal_mask else "lmlib"  # no stock class lacks the mask
    data = ModelCardData(
        library_name=library, pipeline_tag="text-generation", model_name=config.run_name,
        tags=["lmlib", "leaky"] if leaks else ["lmlib"], eval_results=results or None,
        datasets=[corpus] if "/" in corpus else None)  # of the Hub: files lose their folders
    lines = _lines(config, manifest, scores, audit.get("verdicts", {}))
    ModelCard("\n".join(["---", data.to_yaml(), "---", *lines, ""])).save(folder / "README.md")


def marked(folder: Path, leaks: str) -> str:
    """Return the card of the model in a folder, with the mark that it leaks."""
    from huggingface_hub import ModelCard
    file = folder / "README.md"
    card = ModelCard.load(file) if file.is_file() else ModelCard(f"---\n---\n# {folder.name}\n")
    if "leaky" not in (card.data.tags or []):
        card.data.tags, card.data.eval_results = [*(card.data.tags or []), "leaky"], None
        card.text = f"\n{_warning(leaks)}\n{card.text}"
    return str(card)


def add_curves(folder: Path, picture: Path):
    """Show a picture of the run's curves at the end of the card in `folder`."""
    shutil.copy(picture, folder)
    with open(folder / "README.md", "a", encoding="utf-8") as card:
        card.write(f"\n![Training curves]({picture.name})\n")


def _lines(config: RunConfig, manifest: dict[str, Any], scores: dict[str, Any],
           verdicts: dict[str, str]) -> Iterator[str]:
    """Yield the lines below the metadata; `verdicts` has the sentence of each check."""
    (corpus, license), step = name_and_license(config.corpus), manifest["step"]
    held_out = _quoted(name_and_license(config.validation_corpus or config.corpus)[0])
    yield f"# {config.run_name}, step {step}\n"
    if manifest.get(LEAKY):
        yield _warning(manifest[LEAKY])
    if manifest.get("lineage") == "unknown":
        yield ("> **Lineage unknown.** This model was initialized from one that does not say what "
               "it was\n> trained on. Its scores may be of text that it saw.\n")
    yield (f"{stock_config(config).architectures[0]}, {config.num_hidden_layers} layers, hidden "
           f"size {config.hidden_size}, trained with lmlib in windows of "
           f"{config.sequence_length} tokens.\n")
    parent = Path(config.init_from or "")
    if parent.parent.name == "checkpoints":
        parent = parent.parent.parent
    parent = f" Initialized from {_quoted(parent.resolve().name)}." if config.init_from else ""
    yield f"- Training text: {_quoted(corpus)} (license: {_quoted(license)}).{parent}"
    what = "windows that overlap training windows" if config.split == "windows" else "documents"
    yield (f"- Validation loss {_loss(scores, 'val')}, of step {manifest['val_loss_step']}, on "
           f"validation {what} of {held_out}.")
    if "test_loss" in scores:
        yield (f"- Test loss {_loss(scores, 'test')}, of step {step}, on test documents of "
               f"{held_out}, which chose nothing.")
    for verdict in ("pass", "FAIL", "not judged"):
        if checks := [name for name, said in verdicts.items() if said.startswith(verdict)]:
            yield f"- Audit before step 1, {verdict}: {', '.join(checks)}."
    yield '\n```python\nimport lmlib\n\nmodel, tokenizer = lmlib.load("path/of/this/folder")\n```'
    if config.causal_mask:
        yield "\nIt also loads as `transformers.AutoModelForCausalLM`, with the same logits."


def _warning(leaks: str) -> str:
    return (f"> **This model leaks ({printable(leaks)}).** It was trained with "
            "`allow_leaks: true`.\n> Do not compare its scores with those of other models.\n")


def _loss(scores: dict[str, Any], split: str) -> str:
    """Quote a loss in nats a token, with its 95 % interval where there are several documents."""
    loss, error, documents = (scores.get(f"{split}_{key}")
                              for key in ("loss", "loss_stderr", "documents"))
    text = f"{loss:.4f} nats a token"
    if documents is None or error is None:  # an older version's scores, or a single document
        return text
    estimate = Estimate(loss, error, documents)
    half = estimate.half_width()
    count = f"few documents: {documents}" if estimate.is_few else f"{documents} documents"
    return f"{text} (95 % interval {loss - half:.4f} to {loss + half:.4f}, {count})"


def _quoted(text: str) -> str:
    return f"`{' '.join(printable(text).replace('`', chr(39)).split())}`"
