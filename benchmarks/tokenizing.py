"""How fast a corpus is prepared, and how soon training on a large one starts.

    python benchmarks/tokenizing.py [--megabytes 60] [--workers 1] [--store-gb 10]

First: the bare tokenizer on one thread, and `lmlib data`'s preparation of the same text with so many
processes, which also reads, hashes, splits and verifies it. The text is Shakespeare's plays in numbered
copies, one JSON object a scene. Goal: 0.8 of the bare tokenizer per core.

Then: the seconds until the first batch of a store of 10 GB whose file is sparse, opened in a new process
that has imported lmlib. Goal: 10 s to the first step, of which the rest is the same for every store.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
from tokenizers import Tokenizer

from lmlib.config import RunConfig
from lmlib.data import verify
from lmlib.data.corpus import corpus_files
from lmlib.data.prepare import prepare
from lmlib.files import json_sha256, read_json, write_json

OPEN = """
import json, sys, time
import lmlib.training
from lmlib.config import RunConfig
from lmlib.data.prepare import prepare
began = time.perf_counter()
store = prepare(RunConfig(**json.loads(sys.argv[1])))
store.batch(1)
print(time.perf_counter() - began, flush=True)
import os; os._exit(0)  # without waiting for the verification in the background
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--store-gb", type=float, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="outputs") as folder:
        measure(Path(folder).absolute(), options)


def measure(folder: Path, options: argparse.Namespace):
    texts = write_corpus(folder / "rows.jsonl", options.megabytes * 10**6)
    size = sum(len(text.encode()) for text in texts)
    small = RunConfig.load("params/smoke.yaml", output_dir=str(folder), run_name="small")
    prepare(small).tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    began = time.perf_counter()
    for start in range(0, len(texts), 64):
        tokenizer.encode_batch_fast(texts[start : start + 64], add_special_tokens=False)
    bare = size / (time.perf_counter() - began)
    config = RunConfig.load(
        "params/smoke.yaml", output_dir=str(folder), corpus=str(folder / "rows.jsonl"),
        tokenizer=str(folder / "tokenizer"),
    )  # fmt: skip
    began = time.perf_counter()
    store = prepare(config, workers=options.workers)
    ours = size / (time.perf_counter() - began)
    print(f"{size / 1e6:.0f} MB of text: bare tokenizer {bare / 1e6:.2f} MB/s, lmlib with "
          f"{options.workers} processes {ours / 1e6:.2f} MB/s: "
          f"{ours / bare / options.workers:.2f} of it per process", flush=True)  # fmt: skip
    grow(store.folder, int(options.store_gb * 10**9))
    command = [sys.executable, "-c", OPEN, json.dumps(config.to_dict())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    print(f"first batch of {options.store_gb:g} GB of tokens: {float(done.stdout):.2f} s")


def write_corpus(file: Path, size: int) -> list[str]:
    """Write so many bytes of text, and return its documents."""
    scenes = [
        part
        for play in corpus_files("shakespeare")
        for part in play.read_text("utf-8").split("###")
    ]
    texts, copy = [], 0
    while size > 0:
        copy += 1
        for scene in scenes:
            texts.append(f"{copy}. {scene}")
            size -= len(texts[-1])
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return texts


def grow(folder: Path, size: int):
    """Make a store's training tokens a sparse file of so many bytes, with hashes to match its size."""
    info = read_json(folder / "store.json")
    os.truncate(folder / verify.STREAMS["training"], size)
    info["training"]["tokens"] = size // np.dtype(info["dtype"]).itemsize
    info.pop("digest")
    write_json(folder / "store.json", {**info, "digest": json_sha256(info)})


if __name__ == "__main__":
    main()
