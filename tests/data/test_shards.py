"""Preparing a corpus in shards: the bytes of one pass, whatever happens on the way."""

import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import datasets
import pytest
from process import wait_until

from lmlib.config import RunConfig
from lmlib.data import build, corpus, shards, verify
from lmlib.data import prepare as prepare_module
from lmlib.data.build import repair
from lmlib.data.corpus import corpus_files
from lmlib.data.prepare import prepare
from lmlib.data.tokenizer import train_tokenizer
from lmlib.errors import UserError
from lmlib.files import PROJECT_ROOT

SMOKE = PROJECT_ROOT / "params" / "smoke.yaml"
FILES = ("train.bin", "validation.bin", "test.bin", "training_documents.bin",
         "validation_documents.bin", "test_documents.bin")  # fmt: skip
# What each corpus of `corpora` gives, by the code that read and tokenized it in one pass.
CASES = {
    "plays": {"corpus": "shakespeare"},
    "plays, limited": {"corpus": "shakespeare", "max_tokens": 300_000},
    "windows": {"corpus": "one.txt", "split": "windows"},
    "one file": {"corpus": "one.txt"},
    "folder": {"corpus": "folder", "validation_fraction": 0.3, "test_fraction": 0.3},
    "rows": {"corpus": "rows.jsonl"},
    "rows, limited": {"corpus": "rows.jsonl", "max_tokens": 60_000, "validation_windows": 4},
    "rows, no test": {"corpus": "rows.jsonl", "test_fraction": 0},
    "another": {"corpus": "rows.jsonl", "validation_corpus": "folder"},
    "another, limited": {
        "corpus": "rows.jsonl", "validation_corpus": "folder", "max_tokens": 60_000,
        "validation_windows": 8, "test_fraction": 0, "validation_fraction": 0.5,
    },
}  # fmt: skip
GOLDEN = {
    "plays": "07c807c41c35c94b",
    "plays, limited": "70708e64d892d881",
    "windows": "f5aaa73134f42d3d",
    "one file": "a86498a3e50e6efe",
    "folder": "0a7b1c60ddcafc13",
    "rows": "d8b49ab7efc9d87e",
    "rows, limited": "748dc89c52e08edd",
    "rows, no test": "d25286d85fcdd947",
    "another": "b1a63e90cf0e835f",
    "another, limited": "126a4428847dcca2",
}


@pytest.fixture(scope="session")
def corpora(tmp_path_factory) -> Path:
    """Return a folder with corpora of several kinds, the same ones every time."""
    folder = tmp_path_factory.mktemp("corpora")
    plays = [file.read_text("utf-8") for file in corpus_files("shakespeare")[:8]]
    (folder / "one.txt").write_text(plays[0] + plays[1], "utf-8")
    (folder / "folder").mkdir()
    for number, play in enumerate(plays[:6]):
        (folder / "folder" / f"{number}.txt").write_text(play[: 40_000 + 7 * number], "utf-8")
    rows = [part for play in plays[2:] for part in play.split("\n\n")]
    lines = [json.dumps({"text": row, "id": n}) for n, row in enumerate(rows + rows[:50])]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


def config_of(case: str, corpora: Path, output_dir: Path) -> RunConfig:
    changes = dict(CASES[case])
    for name in ("corpus", "validation_corpus"):
        if changes.get(name, "shakespeare") != "shakespeare":
            changes[name] = str(corpora / changes[name])
    return RunConfig.load(SMOKE, output_dir=str(output_dir), **changes)


def content(folder: Path) -> str:
    """Hash the files of a store that hold its tokens and documents, and what store.json says."""
    info = json.loads((folder / "store.json").read_text())
    known = {name: info[name] for name in ("held_out_share", "unit", "dtype", "training",
                                           "validation", "test")}  # fmt: skip
    hashes = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES]
    return hashlib.sha256(json.dumps([known, hashes]).encode()).hexdigest()[:16]


@pytest.mark.parametrize("case", CASES)
def test_the_store_is_that_of_one_pass(corpora, tmp_path, case):
    store = prepare(config_of(case, corpora, tmp_path))
    assert content(store.folder) == GOLDEN[case]


# ---- The same bytes, whatever happens ----

BUILD = """
import json, sys
from lmlib.config import RunConfig
from lmlib.data import prepare, shards
shards.SIZE = {size}
prepare.prepare(RunConfig(**json.loads(sys.argv[1])), workers={workers})
"""


def start(config: RunConfig, workers: int, size: int = 20_000) -> subprocess.Popen:
    """Prepare a run's corpus in a process of its own group, with shards of `size` characters."""
    script = BUILD.format(size=size, workers=workers)
    command = [sys.executable, "-c", script, json.dumps(config.to_dict())]
    return subprocess.Popen(
        command, cwd=PROJECT_ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True
    )


def store_in(folder: Path) -> Path:
    [store] = [file.parent for file in folder.glob(".tokens/*/store.json")]
    return store


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers_gives_the_same_bytes(corpora, tmp_path, workers):
    for case in ("rows, limited", "another"):
        process = start(config_of(case, corpora, tmp_path / case), workers)
        assert process.wait() == 0, process.stderr.read()
        process.stderr.close()
        folder = store_in(tmp_path / case)
        assert content(folder) == GOLDEN[case]
        assert len(json.loads((folder / "shards.json").read_text())["shards"]) > 4
        assert not list(folder.parent.glob("*.draft*"))


@pytest.mark.slow
def test_a_preparation_that_is_killed_anywhere_ends_in_the_same_bytes(corpora, tmp_path):
    config, choose = config_of("rows", corpora, tmp_path), random.Random(0)
    kills = 0
    while kills < 20:
        wanted = _finished_shards(tmp_path) + choose.randrange(12)
        process = start(config, workers=2, size=15_000)
        while process.poll() is None and _finished_shards(tmp_path) <= wanted:
            pass
        if process.poll() is None:
            time.sleep(choose.random() / 10)
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        process.stderr.close()
        if list(tmp_path.glob(".tokens/*/store.json")):  # it was quicker: once more
            assert content(store_in(tmp_path)) == GOLDEN["rows"]
            shutil.rmtree(tmp_path / ".tokens")
    process = start(config, workers=2, size=15_000)
    assert process.wait() == 0, process.stderr.read()
    process.stderr.close()
    assert content(store_in(tmp_path)) == GOLDEN["rows"]


def _finished_shards(folder: Path) -> int:
    try:
        return len(list(folder.glob(".tokens/*.draft-shards/*.json")))
    except FileNotFoundError:  # it was deleted just now
        return 0


def test_workers_end_with_the_process_that_started_them(corpora, tmp_path):
    process = start(config_of("rows", corpora, tmp_path), workers=2, size=15_000)
    wait_until(lambda: _children(process.pid), process)
    children = _children(process.pid)
    process.kill()  # it alone
    process.wait()
    process.stderr.close()
    wait_until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in children))


def _children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SIZE", 60_000)
    built = []
    build = shards.build_shard
    monkeypatch.setattr(shards, "build_shard", lambda *given: built.append(1) or build(*given))
    return built


def prepare_here(config: RunConfig) -> Path:
    """Prepare with all shards built in this process, where they are counted."""
    return prepare(config, workers=1).folder


@pytest.fixture
def in_process(monkeypatch, small_shards):
    """Build every shard in this process."""
    submit = shards.Builder.submit

    def here(self, text):
        self.characters = 0
        return submit(self, text)

    monkeypatch.setattr(shards.Builder, "submit", here)
    return small_shards


def damage(file: Path, place: int, size: int = 40):
    with open(file, "r+b") as stream:
        stream.seek(place)
        before = stream.read(size)
        stream.seek(place)
        stream.write(bytes(255 - byte for byte in before))


@pytest.mark.parametrize("what", ["bytes", "cut short", "gone"])
def test_only_the_damaged_shards_of_a_store_are_built_again(corpora, tmp_path, in_process, what):
    config = config_of("rows", corpora, tmp_path)
    folder = prepare_here(config)
    file, whole = folder / "train.bin", len(in_process)
    in_process.clear()
    size = file.stat().st_size
    if what == "bytes":
        damage(file, size // 2)
    elif what == "cut short":
        os.truncate(file, size - 100)
    else:
        file.unlink()
    with pytest.warns(UserWarning, match=r"train.bin.*is built again .of its shards: 0-"):
        assert prepare_here(config) == folder
    assert content(folder) == GOLDEN["rows"]
    assert len(in_process) == (whole if what == "gone" else 1)


def endless(*given, **options):
    for number in itertools.count():
        if number > 20_000:
            raise AssertionError("a dataset without an end is read further than it is needed")
        yield {"text": f"Document {number}. " + "To be, or not to be, that is the question. " * 5}


def test_a_repair_reads_no_further_than_the_last_damaged_shard(tmp_path, in_process, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", endless)
    config = RunConfig.load(
        SMOKE,
        output_dir=str(tmp_path),
        corpus="owner/name",
        validation_corpus="owner/other",
        max_tokens=100_000,
        tokenizer=_gpt2_like(tmp_path),
    )
    folder = prepare_here(config)
    before = content(folder)
    in_process.clear()
    for name in ("train.bin", "test.bin"):
        damage(folder / name, 5000)
    with pytest.warns(UserWarning, match="is built again .of its shards: 0-00000, 1-"):
        prepare_here(config)
    assert content(folder) == before and len(in_process) == 2


def test_a_marked_store_whose_description_is_gone_is_built_again(corpora, tmp_path, in_process):
    config = config_of("rows", corpora, tmp_path)
    folder = prepare_here(config)
    (folder / "damaged").write_text("train.bin")
    (folder / "store.json").write_text("{")
    with pytest.warns(UserWarning, match="store.json.*is built again"):
        prepare_here(config)
    assert content(folder) == GOLDEN["rows"]


def test_a_store_is_built_as_a_whole_where_its_source_has_changed(corpora, tmp_path, in_process):
    file = tmp_path / "rows.jsonl"
    shutil.copy(corpora / "rows.jsonl", file)
    config = config_of("rows", tmp_path, tmp_path)
    folder = prepare_here(config)
    lines = file.read_text("utf-8").splitlines(keepends=True)
    file.write_text("".join([json.dumps({"text": "Another line."}) + "\n", *lines[1:]]), "utf-8")
    other = prepare_here(config)  # by its content it is another corpus
    assert other != folder and content(other) != content(folder)
    # One that has no files to be compared, as a stream from a hub, is compared shard by shard.
    damage(folder / "train.bin", 1000)
    assert repair(config, prepare(config).tokenizer, folder) is None


def test_a_shard_that_is_damaged_before_the_end_is_named_and_built_again(
    corpora, tmp_path, in_process, monkeypatch
):
    config = config_of("rows", corpora, tmp_path)
    monkeypatch.setattr(prepare_module, "write_info", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_here(config)
    monkeypatch.undo()
    monkeypatch.setattr(shards, "SIZE", 60_000)
    [kept] = tmp_path.glob(".tokens/*.draft-shards")
    names = sorted(kept.glob("*.bin"))
    damage(names[1], 5000)
    os.truncate(names[2], 10)
    names[3].unlink()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        folder = prepare(config).folder
    said = [str(warning.message) for warning in found]
    assert [name.name in line for name, line in zip(names[1:4], said, strict=True)] == [True] * 3
    assert content(folder) == GOLDEN["rows"] and not kept.exists()


def _interrupt(*given):
    raise KeyboardInterrupt


@pytest.mark.parametrize("name, other", [("tokenizer.json", "{"), ("identity.json", "{}")])
def test_a_kept_tokenizer_that_is_damaged_is_trained_again(
    corpora, tmp_path, in_process, monkeypatch, name, other
):
    config = config_of("rows", corpora, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_info", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_here(config)
    [kept] = tmp_path.glob(".tokens/*.draft-shards")
    built = len(in_process)
    (kept / "tokenizer" / name).write_text(other)
    with pytest.warns(UserWarning, match="The tokenizer in .* is damaged; it is trained again"):
        folder = prepare_here(config)
    assert content(folder) == GOLDEN["rows"] and len(in_process) == 2 * built


def test_a_worker_that_fails_says_why(corpora, tmp_path, small_shards, monkeypatch):
    """By its own error, or by the memory that it may have lacked."""
    popen, script = subprocess.Popen, ["raise SystemExit('no such library')"]

    def start_another(command, **options):
        return popen([command[0], "-c", *script], **options)

    monkeypatch.setattr(subprocess, "Popen", start_another)
    with pytest.raises(UserError, match=r"ended with status 1\. Its error is above\."):
        prepare(config_of("rows", corpora, tmp_path), workers=1)
    script[:] = ["import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    with pytest.raises(UserError, match=r"ended with status -9\. It was killed, perhaps for lack"):
        prepare(config_of("rows", corpora, tmp_path), workers=1)


def test_a_download_that_breaks_keeps_what_was_tokenized(
    corpora, tmp_path, in_process, monkeypatch
):
    rows = [
        json.loads(line)["text"]
        for line in (corpora / "rows.jsonl").read_text("utf-8").splitlines()
    ]
    breaks_at = 4000

    def stream(*given, **options):
        for number, text in enumerate(rows):
            if number == breaks_at:
                raise ConnectionError("the connection was reset")
            yield {"text": text}

    monkeypatch.setattr(datasets, "load_dataset", stream)
    config = RunConfig.load(
        SMOKE, output_dir=str(tmp_path), corpus="owner/name", tokenizer=_gpt2_like(tmp_path)
    )
    with pytest.raises(UserError, match="connection was reset(.|\n)*the same command continues"):
        prepare_here(config)
    built = len(in_process)
    breaks_at = None
    folder = prepare_here(config)
    assert built >= 3
    table = json.loads((folder / "shards.json").read_text())["shards"]
    assert len(in_process) == len(table)  # none of them twice


def _gpt2_like(folder: Path) -> str:
    """Return the folder of a tokenizer that needs no training on the corpus."""
    texts = (file.read_text("utf-8") for file in corpus_files("shakespeare")[:2])
    train_tokenizer(texts, 400).save_pretrained(folder / "tokenizer")
    return str(folder / "tokenizer")


def test_the_disk_is_looked_at_first(corpora, tmp_path, small_shards, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match="need about 0.0 GB more .* free some space"):
        prepare(config_of("rows", corpora, tmp_path))
    assert small_shards == [] and not list(tmp_path.glob(".tokens/*/"))


def test_shards_that_are_kept_need_no_space_again(corpora, tmp_path, small_shards, monkeypatch):
    config = config_of("rows", corpora, tmp_path)
    monkeypatch.setattr(prepare_module, "write_info", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_here(config)
    [kept] = tmp_path.glob(".tokens/*.draft-shards")
    size = sum(file.stat().st_size for file in kept.glob("*.bin"))
    usage = shutil.disk_usage(tmp_path)._replace(free=int(1.3 * size))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(KeyboardInterrupt):  # it comes to the end, not to a lack of space
        prepare_here(config)
    for file in kept.glob("*.bin"):
        file.unlink()
    with pytest.raises(UserError, match="GB more"):
        prepare_here(config)


def test_a_large_corpus_is_hashed_once_per_machine(corpora, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "AT_ONCE", 1000)
    file = shutil.copy(corpora / "rows.jsonl", tmp_path / "rows.jsonl")
    config = config_of("rows", tmp_path, tmp_path)
    folder, hashed = prepare_here(config), []
    monkeypatch.setattr(prepare_module, "file_sha256", lambda path: hashed.append(path) or "new")
    assert prepare_module.store_identity(config, "train") == store_info(folder)["identity"]
    assert hashed == []
    file.write_text(file.read_text("utf-8").replace("a", "o", 1), "utf-8")  # of the same size
    assert prepare_module.store_identity(config, "train") != store_info(folder)["identity"]
    assert hashed == [file.resolve()]


def store_info(folder: Path) -> dict:
    return json.loads((folder / "store.json").read_text())


@pytest.mark.parametrize("name", ["line.txt", "row.jsonl", "array.jsonl", "document.jsonl"])
def test_a_document_that_memory_cannot_hold_is_an_error(tmp_path, monkeypatch, name):
    monkeypatch.setattr(corpus, "LONGEST_LINE", 10_000)
    monkeypatch.setattr(corpus, "LONGEST_DOCUMENT", 2_000)
    text = {
        "line.txt": "word " * 3000,
        "row.jsonl": json.dumps({"text": "word " * 3000}),
        "array.jsonl": json.dumps([{"text": "word " * 3000}]),
        "document.jsonl": json.dumps({"text": "word " * 1000}),
    }[name]
    (tmp_path / name).write_text(text + "\n")
    config = RunConfig.load(SMOKE, output_dir=str(tmp_path / "out"), corpus=str(tmp_path / name))
    with pytest.raises(UserError, match="divide it|one object a line"):
        prepare(config)


def test_a_row_of_a_dataset_that_memory_cannot_hold_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "LONGEST_DOCUMENT", 2_000)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([{"text": "a " * 2000}]))
    config = RunConfig.load(SMOKE, output_dir=str(tmp_path), corpus="owner/name")
    with pytest.raises(UserError, match="Document 1 of The Hugging Face dataset .*divide it"):
        prepare(config)


def test_rows_are_read_one_at_a_time():
    """Also before the first that has the column."""
    taken = []
    rows = (taken.append(n) or {"text": "a"} | ({"id": n} if n else {}) for n in range(10))
    texts = corpus._column(rows, "id", "the file")
    with pytest.raises(UserError, match="holds int"):
        next(texts)
    assert taken == [0, 1]


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Five times the text in as many more shards, in a process each."""
    line = json.dumps({"text": "To be, or not to be, that is the question. " * 20}) + "\n"
    peaks = []
    for times in (4, 20):
        folder = tmp_path / str(times)
        folder.mkdir()
        (folder / "rows.jsonl").write_text(
            "".join(line.replace("To be", f"To be {n}") for n in range(1000 * times))
        )
        config = RunConfig.load(
            SMOKE, output_dir=str(folder), corpus=str(folder / "rows.jsonl"),
            tokenizer=_gpt2_like(tmp_path),
        )  # fmt: skip
        script = BUILD.format(size=200_000, workers=1)
        script += "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
        command = [sys.executable, "-c", script, json.dumps(config.to_dict())]
        done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) * 1024)
    text = (tmp_path / "20" / "rows.jsonl").stat().st_size
    assert peaks[1] - peaks[0] < text / 2  # of 20 MB


def test_shards_in_another_order_would_be_noticed(corpora, tmp_path, small_shards, monkeypatch):
    in_order = shards.in_order
    monkeypatch.setattr(shards, "in_order", lambda *given: reversed(list(in_order(*given))))
    folder = prepare(config_of("rows", corpora, tmp_path)).folder
    assert content(folder) != GOLDEN["rows"]


def test_progress_is_said_on_long_preparations(corpora, tmp_path, in_process, monkeypatch, capsys):
    prepare_here(config_of("rows", corpora, tmp_path / "quick"))
    assert "Tokenized" not in capsys.readouterr().err
    monkeypatch.setattr(build, "NOTICE", 0.0)
    prepare_here(config_of("rows", corpora, tmp_path / "slow"))
    lines = capsys.readouterr().err.splitlines()
    assert re.match(
        r"Tokenized \d MB of text at [\d.]+ MB/s, about \d+%; about .* left\.", lines[0]
    )
