"""lmlib data."""

import argparse

from lmlib.cli.display import paint, show
from lmlib.cli.train import load_config
from lmlib.errors import UserError
from lmlib.text import printable


def data(options: argparse.Namespace):
    """Tokenize a recipe's corpus, unless that was done, and describe what a run will train on."""
    config = load_config(options)
    show(f"{printable(config.corpus)}: reading and tokenizing, unless the cache has it.",
         stream="stderr")
    from lmlib.data import describe  # imports torch
    from lmlib.data.prepare import prepare
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers is {options.workers}; it must be 1 or more.")
    store = prepare(config, workers=options.workers)
    splits = describe.summarize(store)
    total, size = sum(split.bytes for split in splits), sum(split.tokens for split in splits)
    print(f"{printable(config.corpus)}: {total:,} bytes, {size:,} tokens of a vocabulary of "
          f"{len(store.tokenizer):,} ({total / size:.2f} bytes each).\n")
    print(paint(f"{'':12}{'documents':>10}{'duplicates':>11}{'bytes':>16}{'tokens':>15}"
                f"{'windows':>11}", "bold"))
    for split in splits:
        print(f"{split.name:12}{split.documents:>10,}{split.duplicates:>11,}{split.bytes:>16,}"
              f"{split.tokens:>15,}{split.windows:>11,}")
    print(paint(f"\n{'tokens of a document':22}" + "".join(f"{name:>10}" for name in
                                                         splits[0].lengths), "bold"))
    for split in splits:
        print(f"{split.name:22}" + "".join(f"{n:>10,}" for n in split.lengths.values()))
    windows = config.total_steps * config.batch_size
    print(f"\n{config.total_steps:,} steps of {config.batch_size} windows read the training text "
          f"{windows / max(1, splits[0].windows):.2f} times.\n")
    for text in describe.samples(store):
        print(paint("> ", "dim") + printable(text).replace("\n", paint("\n> ", "dim")) + "\n")
    store.wait_until_verified()
