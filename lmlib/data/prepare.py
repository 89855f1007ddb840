"""Documents -> token store on disk, built once for all runs with the same text and tokenizer.

A store is a folder with the tokenizer, the tokens of each split, what is known of its documents,
and store.json, which is written last and has a hash of everything.
"""

import hashlib
import platform
import shutil
import uuid
import warnings
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from lmlib.config import RunConfig
from lmlib.data import verify
from lmlib.data.build import repair, write_splits
from lmlib.data.corpus import content_hash, corpus_files, documents, split_rules
from lmlib.data.tokenizer import load_tokenizer, tokenizer_identity, train_tokenizer
from lmlib.data.tokens import TokenStore
from lmlib.data.verify import SHARDS, SPLITS, STREAMS, damage, write_info
from lmlib.errors import UserError
from lmlib.files import file_sha256, flush, json_sha256, read_mapping, sync_folder, write_json

STORE_FORMAT = 2
IDENTITY = "identity.json"  # of the tokenizer that is kept with the shards


def prepare(config: RunConfig, tokenizer: str | None = None,
            workers: int | None = None) -> TokenStore:
    """Open the token store of a run under output_dir/.tokens; build it if there is none.

    What is damaged of a store is built again, with a warning. `tokenizer` (a folder or Hugging Face
    id) replaces `config.tokenizer`. `workers` processes tokenize (None: one per core). Raises
    ValueError where the corpus or tokenizer cannot be used, or a split is shorter than one window.
    """
    tokenizer = tokenizer or config.tokenizer
    if tokenizer == "train" and (config.vocab_size or 0) < 257:
        raise UserError(f"vocab_size is {config.vocab_size}; a tokenizer trained here needs 257 "
                        "or more: one for every byte, and the end-of-text token.")
    identity = store_identity(config, tokenizer)
    stores = config.run_dir.parent / ".tokens"
    folder = _folder_of(config, stores, identity)
    if damage(folder):
        stores.mkdir(parents=True, exist_ok=True)
        with FileLock(stores / f"{folder.name}.lock"):  # one process builds, the others wait
            if (found := damage(folder)) and not _is_repaired(config, folder, found):
                _sweep_drafts(stores, folder.name)
                _build(config, tokenizer, identity, folder, workers)
    store = TokenStore.open(config, folder)
    if store.vocab_size < len(store.tokenizer):
        raise UserError(f"vocab_size {store.vocab_size} is less than the tokenizer's "
                        f"{len(store.tokenizer)} tokens; write that or more, or null.")
    _check_lengths(config, store)
    return store


def store_identity(config: RunConfig, tokenizer: str) -> dict[str, Any]:
    """Return everything that determines a store's content; local files count by their SHA-256."""
    splits: list[Any] = [config.validation_fraction, config.test_fraction]
    if config.split == "windows":
        splits = ["windows"]
    elif config.validation_corpus:
        splits.append(_corpus_identity(config, config.validation_corpus))
    limits = [config.max_tokens, config.validation_windows * config.sequence_length]
    return {"format": STORE_FORMAT, "corpus": _corpus_identity(config, config.corpus),
            "text_column": config.text_column, "splits": splits,
            "tokenizer": _recipe_of_tokenizer(config, tokenizer),
            "limits": limits if config.max_tokens else None}


def _corpus_identity(config: RunConfig, corpus: str) -> list[Any]:
    files = corpus_files(corpus)
    if files is None:
        return [corpus, config.corpus_config, config.corpus_split]
    hashes = _file_hashes(files, config.run_dir.parent / ".tokens")
    contents = "".join(file.suffix.lower() + of for file, of in zip(files, hashes, strict=True))
    return [len(files), hashlib.sha256(contents.encode()).hexdigest()]


def _file_hashes(files: list[Path], stores: Path) -> list[str]:
    """Return the SHA-256 of each file of a corpus.

    Files of more than AT_ONCE bytes in all are read once per machine, and those whose size or time
    of change differs are read again.
    """
    stats = [file.stat() for file in files]
    if sum(stat.st_size for stat in stats) <= verify.AT_ONCE:
        return list(map(file_sha256, files))
    cache, names = stores / f"corpora-{platform.node()}.json", map(str, map(Path.resolve, files))
    before = read_mapping(cache)
    now = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in zip(names, stats, strict=True)}
    found = {name: [*known, before[name][2] if before.get(name, [])[:2] == known else
                    file_sha256(Path(name))] for name, known in now.items()}
    if any(before.get(name) != value for name, value in found.items()):
        stores.mkdir(parents=True, exist_ok=True)
        write_json(cache, before | found)
    return [value[2] for value in found.values()]


def _recipe_of_tokenizer(config: RunConfig, name: str) -> Any:
    if name == "train":  # another version of the library may train another tokenizer
        import tokenizers
        return ["byte-level BPE", config.vocab_size, tokenizers.__version__]
    return tokenizer_identity(load_tokenizer(name))


def _folder_of(config: RunConfig, stores: Path, identity: dict[str, Any]) -> Path:
    """Return the folder of a store, which need not exist.

    A resumed run takes the tokenizer from its checkpoint. Where that was trained here, the tokens
    are in a store that is named by how it was trained.
    """
    def named(identity: dict[str, Any]) -> Path:
        return stores / json_sha256(identity)[:24]

    folder = named(identity)
    if isinstance(identity["tokenizer"], list) or folder.exists():  # one is to be trained
        return folder
    for file in sorted(stores.glob("*/store.json")):
        info = read_mapping(file)
        theirs = info.get("identity")
        if (info.get("tokenizer") == identity["tokenizer"] and isinstance(theirs, dict)
                and {**theirs, "tokenizer": None} == {**identity, "tokenizer": None}):
            return file.parent
    if config.tokenizer == "train" and not config.init_from:  # its store.json may be damaged
        trained = named({**identity, "tokenizer": _recipe_of_tokenizer(config, "train")})
        return trained if trained.exists() else folder
    return folder


def _is_repaired(config: RunConfig, folder: Path, found: str) -> bool:
    """Repair the damaged shards of a store, if there is one and no other file is damaged."""
    if not folder.exists():
        return False
    built = None
    if found.removesuffix(" is missing") in STREAMS.values():
        with suppress(UserError):  # the corpus cannot be read
            built = repair(config, load_tokenizer(str(folder)), folder)
    parts = f" (of its shards: {', '.join(built)})" if built else ""
    warnings.warn(f"The token cache {folder} is damaged ({found}); it is built again{parts}.",
                  stacklevel=3)
    return built is not None


def _sweep_drafts(stores: Path, ours: str):
    """Delete what killed builds have left: drafts of our store, and of those nobody builds.

    The shards that they finished stay, for the next build of that store.
    """
    for draft in stores.glob("*.draft-*"):
        name = draft.name.partition(".")[0]
        if draft.name.endswith(SHARDS):
            continue
        with suppress(Timeout):  # another process is building there
            lock = FileLock(stores / f"{name}.lock")
            with nullcontext() if name == ours else lock.acquire(timeout=0):
                shutil.rmtree(draft, ignore_errors=True)


# ---- Build ----

def _build(config: RunConfig, tokenizer_name: str, identity: dict[str, Any], folder: Path,
           workers: int | None):
    """Write a draft beside `folder`, flush it, and rename it into place."""
    draft = folder.parent / f"{folder.name}.draft-{uuid.uuid4().hex[:8]}"
    kept = folder.parent / f"{folder.name}{SHARDS}"
    try:
        kept.mkdir(exist_ok=True)
        tokenizer = load_tokenizer(tokenizer_name) if tokenizer_name != "train" else (
            _trained_tokenizer(config, kept / "tokenizer"))
        draft.mkdir(parents=True)
        tokenizer.save_pretrained(draft)
        info = write_splits(config, tokenizer, draft, kept, workers)
        write_info(draft, {**info, "format": STORE_FORMAT, "identity": identity,
                           "tokenizer": tokenizer_identity(load_tokenizer(str(draft)))})
        if folder.exists():
            shutil.rmtree(folder.rename(draft.with_name(f"{draft.name}-damaged")))
        draft.rename(folder)
        sync_folder(folder.parent)
        shutil.rmtree(kept)
    except UserError as error:
        if not list(kept.glob("*.bin")):
            shutil.rmtree(kept)
            raise
        raise UserError(f"{error}\nWhat was tokenized before is kept: the same command continues "
                        "there.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _trained_tokenizer(config: RunConfig, folder: Path) -> Any:
    """Train the run's tokenizer, unless a preparation that was killed has saved it.

    The shards that were built with one that is damaged by now are deleted.
    """
    if folder.exists():
        with suppress(UserError):
            tokenizer = load_tokenizer(str(folder))
            if read_mapping(folder / IDENTITY).get("tokenizer") == tokenizer_identity(tokenizer):
                return tokenizer
        warnings.warn(f"The tokenizer in {folder} is damaged; it is trained again.", stacklevel=4)
        for path in folder.parent.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    training = (text for corpus, rule in split_rules(config) for text, _ in
                documents(corpus, config) if rule.split_of(content_hash(text)) == "training")
    # 200 million characters are plenty for merges, and bound the memory.
    tokenizer = train_tokenizer(_up_to(200_000_000, training), config.vocab_size)
    draft = folder.with_name("tokenizer.draft")
    tokenizer.save_pretrained(draft)
    write_json(draft / IDENTITY, {"tokenizer": tokenizer_identity(load_tokenizer(str(draft)))})
    for file in draft.iterdir():
        flush(file)
    draft.rename(folder)
    return tokenizer


def _up_to(characters: int, texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


# ---- Splits that are too short ----

def _check_lengths(config: RunConfig, store: TokenStore):
    """Raise a ValueError if a split that the run needs is shorter than one window."""
    needed = SPLITS if config.has_test and config.score_test else SPLITS[:2]
    short = [name for name in needed if store.window_count(name) < 1]
    if not short:
        return
    counts = ", ".join(f"{name} {store.info[name]['tokens']:,} tokens in "
                       f"{store.info[name]['documents']} documents" for name in needed)
    remedy = "use more text or shorter windows"
    if config.split == "documents" and (found := _fractions_that_work(config, store.tokenizer)):
        fractions, counted = found
        values = " and ".join(f"{name} {value:g}" for name, value in fractions.items())
        kept = " and ".join(f"{count} for {name}" for name, count in counted.items())
        remedy = f"{values} would hold out {kept} of its documents; or {remedy}"
    raise UserError(
        f"The {' and '.join(short)} split of {config.validation_corpus or config.corpus} is "
        f"shorter than one window of sequence_length {config.sequence_length} and its last target "
        f"({counts}): {remedy}.")


def _fractions_that_work(config: RunConfig, tokenizer: Any
                         ) -> tuple[dict[str, float], dict[str, int]] | None:
    """Return the smallest fractions that leave every split a window and a fifth, and the counts."""
    places, lengths = [], []
    corpus, _ = split_rules(config)[-1]
    for text, _ in islice(documents(corpus, config), 20_000):  # of short splits there are few
        places.append(content_hash(text) / 2**64)
        lengths.append(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1)
    places, tokens = np.array(places), np.array(lengths)
    need, has_test = 1.2 * (config.sequence_length + 1), config.has_test and config.score_test
    grid = [n / 20 for n in range(1, 19)]
    fixed = config.test_fraction if config.has_test else 0
    pairs = sorted((v + t, v) for v in grid for t in (grid if has_test else [fixed]))
    for total, validation in (pair for pair in pairs if pair[0] < 1):
        test = total - validation
        low, high = validation, 1 - test
        if config.validation_corpus:
            low = high = validation / total
        held_out = {"validation": places < low, "test": places >= high}
        rest = ~(held_out["validation"] | held_out["test"])
        is_long = [tokens[part].sum() >= need for part in held_out.values()]
        if (is_long[0] and (is_long[1] or not has_test)
                and (config.validation_corpus or tokens[rest].sum() >= need)):
            fractions = {"validation_fraction": validation, "test_fraction": round(test, 2)}
            counts = {name: int(part.sum()) for name, part in held_out.items()}
            if not has_test:
                del fractions["test_fraction"], counts["test"]
            return fractions, counts
    return None
