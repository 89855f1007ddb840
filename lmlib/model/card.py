"""The README.md of a checkpoint: what its scores were measured on and how far to trust them."""

from pathlib import Path
from typing import Any

from lmlib.config import RunConfig
from lmlib.files import read_mapping
from lmlib.intervals import Estimate
from lmlib.leaks import LEAKY
from lmlib.model.huggingface import stock_config
from lmlib.text import printable


def write_card(folder: Path, config: RunConfig, scores: dict[str, Any]):
    """Write README.md if the checkpoint in `folder` leaks or its lineage is unknown; else nothing.

    `scores` has the keys of an evaluation, `val_*`, and `test_*` once the run has a test score.
    """
    manifest = read_mapping(folder / "checkpoint.json")
    if LEAKY in manifest or manifest.get("lineage") == "unknown":
        (folder / "README.md").write_text(model_card(config, manifest, scores), "utf-8")


def model_card(config: RunConfig, manifest: dict[str, Any], scores: dict[str, Any]) -> str:
    """Return the text of a card; `manifest` is checkpoint.json, `scores` as in `write_card`."""
    leaks, step = manifest.get(LEAKY), manifest["step"]
    tags = ["lmlib", *(["leaky"] if leaks else [])]
    warnings = [
        f"**This model leaks ({printable(leaks)}).** It was trained with `allow_leaks: true`.\n> "
        "Do not compare its scores with those of other language models."] if leaks else []
    if manifest.get("lineage") == "unknown":
        warnings.append("**Lineage unknown.** This model was initialized from one that does not "
                        "say what it was\n> trained on. Its scores may be of text that it saw.")
    notes = "\n>\n".join(f"> {warning}" for warning in warnings)
    measured_on = ("windows that overlap training windows" if config.split == "windows" else
                   f"validation documents of {_quoted(config.validation_corpus or config.corpus)}")
    lines = [f"- Validation loss {_loss(scores, 'val')}, of step {manifest['val_loss_step']}, "
             f"measured on {measured_on}."]
    if "test_loss" in scores:
        lines.append(f"- Test loss {_loss(scores, 'test')}, of step {step}, on documents that "
                     "chose nothing.")
    return f"""---
tags: [{", ".join(tags)}]
---
# {config.run_name}, step {step}

{notes}

{stock_config(config).architectures[0]}, {config.num_hidden_layers} layers, hidden size
{config.hidden_size}, trained with lmlib on {_quoted(config.corpus)}
in windows of {config.sequence_length} tokens.

{chr(10).join(lines)}

```python
import lmlib

model, tokenizer = lmlib.load("path/of/this/folder")
```
"""


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
    return f"`{printable(text).replace('`', chr(39))}`"
