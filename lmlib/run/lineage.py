"""Which documents a model was trained on, by itself and by the models that it was started from."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmlib import checkpoint
from lmlib.data.tokens import TokenStore
from lmlib.data.verify import STREAMS
from lmlib.files import read_mapping


@dataclass(frozen=True)
class Lineage:
    """The documents that a run and its ancestors trained on."""
    hashes: np.ndarray  # (documents,) uint64, sorted
    streams: list[str]  # hash of the training tokens of each ancestor and of the run, in order
    is_complete: bool  # False: an ancestor did not record its documents

    @property
    def state(self) -> str:
        return "complete" if self.is_complete else "unknown"


def lineage_of(source: Path | None, store: TokenStore, is_own: bool) -> Lineage:
    """Return the lineage of a run: its training documents, and those that its source recorded.

    `source` is a checkpoint, of this run if `is_own`, else of the one that it was started from.
    """
    own, stream = store.documents("training"), store.info["training"]["hash"]
    if source is None:
        return Lineage(own, [stream], True)
    recorded = checkpoint.read_lineage(source)
    if recorded is None:  # a run of an older version knows its own documents, but no ancestor's
        return Lineage(own, [stream], is_own and store.config.init_from is None)
    manifest = read_mapping(source / "checkpoint.json")
    streams = list(dict.fromkeys([*manifest["streams"], stream]))
    hashes = own if np.array_equal(own, recorded) else np.union1d(own, recorded)
    return Lineage(hashes, streams, manifest["lineage"] == "complete")


def ancestors_tokens(lineage: Lineage, source: Path | None,
                     store: TokenStore) -> tuple[list[np.ndarray], int]:
    """Return the training tokens of ancestors whose stores are here, and how many are not.

    Stores are looked for beside the run's own, and beside the run that it was started from.
    """
    folders = {store.folder.parent}
    if source:  # outputs/<run>/checkpoints/<checkpoint>
        folders |= {folder / ".tokens" for folder in list(source.parents)[:3]}
    found: dict[str, Path] = {}
    for file in (file for folder in folders for file in folder.glob("*/store.json")):
        info = read_mapping(file)
        stream = info.get("training", {}).get("hash")
        if stream and info.get("tokenizer") == store.info["tokenizer"]:
            found[stream] = file.parent
    others = [stream for stream in lineage.streams if stream != store.info["training"]["hash"]]
    tokens = [np.memmap(found[stream] / STREAMS["training"], store.info["dtype"], "r")
              for stream in others if stream in found]
    return tokens, len(others) - len(tokens)
