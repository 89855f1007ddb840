"""Documents, splits, tokenizer, token store and batches."""

import json
import sys
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from lmlib.data.corpus import cut, documents, is_held_out
from lmlib.data.prepare import prepare
from lmlib.data.tokenizer import END_OF_TEXT, token_bytes
from lmlib.data.tokens import permute, window_count


def test_duplicates_that_differ_in_case_and_spacing_land_in_the_same_split():
    counts = Counter()
    for number in range(2000):
        text = f"Document number {number}, of some length."
        held_out = is_held_out(text, 0.1)
        assert held_out == is_held_out(f"  DOCUMENT   number\n{number}, of some length. ", 0.1)
        counts[held_out] += 1
    assert 150 < counts[True] < 250
    assert all(is_held_out(str(n), 0.5) for n in range(100) if is_held_out(str(n), 0.2))


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 1000, 4097])
def test_permute_is_a_permutation_determined_by_seed_and_epoch(size):
    orders = [
        permute(np.arange(size), size, seed, epoch)
        for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert (orders[0] == orders[1]).all()
    if size >= 16:
        assert (
            (orders[0] != orders[2]).any()
            and (orders[0] != orders[3]).any()
            and (orders[0] != np.arange(size)).any()
        )
        one = permute(np.array([7]), size, 0, 1)
        assert one[0] == orders[2][7]


def test_every_epoch_visits_every_window_once_and_a_batch_needs_no_history(smoke, text_file):
    config = smoke(corpus=str(text_file), batch_size=5)
    store = prepare(config)
    count = window_count(store.train, config.sequence_length)
    draws = np.concatenate([store.window_indices(step) for step in range(1, 3 * count)])
    for epoch in range(3):
        assert sorted(draws[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert (draws[:count] != draws[count : 2 * count]).any()

    ids, targets = store.batch(10**9)  # without the steps before it
    assert ids.shape == targets.shape == (5, config.sequence_length) and ids.dtype == torch.int64
    first = int(store.window_indices(10**9)[0]) * config.sequence_length
    assert ids[0].tolist() == store.train[first : first + config.sequence_length].tolist()
    assert torch.equal(ids[:, 1:], targets[:, :-1])


def test_tokens_decode_to_the_documents_each_in_one_split(smoke, text_file):
    config = smoke(corpus=str(text_file))
    store = prepare(config)
    pieces = list(documents(config.corpus, config))
    assert len(pieces) > 20 and all(1900 < len(text) < 4100 for text in pieces[:-1])
    for held_out, tokens in ((False, store.train), (True, store.validation)):
        expected = [
            text for text in pieces if is_held_out(text, config.validation_fraction) == held_out
        ]
        text = store.tokenizer.decode(tokens.astype(np.int64).tolist())
        assert text == "".join(document + END_OF_TEXT for document in expected)
    assert store.train.dtype == np.uint16
    counts = [store.info[split]["tokens"] for split in ("training", "held-out")]
    assert store.info["held_out_share"] == counts[1] / sum(counts)


def test_the_tokenizer_is_trained_on_training_documents_only(smoke, tmp_path):
    secret = "zyzzyvaquuxplugh"
    texts = [f"An ordinary sentence about the weather, number {n}. " * 5 for n in range(200)]
    texts = [
        text + (f" {secret}" * 50 if is_held_out(text + f" {secret}" * 50, 0.3) else "")
        for text in texts
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    assert sum(secret in text for text in texts) > 10
    config = smoke(corpus=str(tmp_path / "c.jsonl"), validation_fraction=0.3, vocab_size=400)
    vocabulary = prepare(config).tokenizer.get_vocab()
    assert not any("zyzz" in token or "plugh" in token for token in vocabulary)
    assert any("weather" in token for token in vocabulary)


def test_validation_windows_are_whole_always_the_same_and_held_out(smoke, text_file):
    store = prepare(smoke(corpus=str(text_file), validation_fraction=0.3))
    windows = store.validation_windows()
    assert windows.shape == (16, 65)
    assert torch.equal(
        windows, prepare(smoke(corpus=str(text_file), validation_fraction=0.3)).validation_windows()
    )
    held_out = store.validation.astype(np.int64)
    for window in windows.numpy():
        assert any((held_out[i : i + 65] == window).all() for i in range(0, len(held_out) - 64, 64))


def test_text_that_spells_a_special_token_stays_text(smoke, tmp_path):
    lines = [{"text": f"{n} before <|endoftext|> after " * 20} for n in range(60)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    store = prepare(
        smoke(corpus=str(tmp_path / "c.jsonl"), validation_fraction=0.3, vocab_size=300)
    )
    total = sum(
        (tokens == store.tokenizer.eos_token_id).sum() for tokens in (store.train, store.validation)
    )
    assert total == 60


def test_token_bytes_add_up_to_the_bytes_of_the_text(smoke, tmp_path):
    lines = [{"text": f"{n} Žluťoučký kůň 🐎 шёл по полю, " * 20} for n in range(60)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    store = prepare(smoke(corpus=str(tmp_path / "c.jsonl"), validation_fraction=0.3))
    sizes = token_bytes(store.tokenizer, 512)
    for split, tokens in (("training", store.train), ("held-out", store.validation)):
        assert sizes[torch.from_numpy(tokens.astype(np.int64))].sum() == store.info[split]["bytes"]


def test_parquet_and_jsonl_and_txt_in_a_folder_are_all_read(smoke, tmp_path):
    import pandas

    (tmp_path / "in").mkdir()
    pandas.DataFrame({"body": ["parquet one", "parquet two"]}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "in" / "b.jsonl").write_text('{"body": "json one"}\n{"body": null}\n')
    (tmp_path / "c.txt").write_text("plain\r\n\r\ntext")
    (tmp_path / "notes.md").write_text("not read")
    texts = list(documents(str(tmp_path), smoke(text_column="body")))
    assert texts == ["parquet one", "parquet two", "plain\n\ntext\n", "json one"]


LINES = 'one\n\n{"line"}\u2028two\x0cthree\x85\t four\x1c'
TEXT_FILES = {
    "Unix": f"{LINES}\nend\n".encode(),
    "no final newline": LINES.encode(),
    "Windows": f"{LINES}\nend\n".replace("\n", "\r\n").encode(),
    "old Mac": f"{LINES}\nend\n".replace("\n", "\r").encode(),
    "byte-order mark": f"\ufeff{LINES}\n".encode(),
    "blank lines": b"\n\r\n \n\na\n\n",
    "two chunks": f"{LINES} and some more text\r\n".encode() * 200_000,
}
JSON_FILES = {
    "objects": b'{"text": "a", "n": 1}\n{"n": 2, "text": "b"}\n',
    "no final newline, spaces": b' {"text": "a"} \n  {"text" : "b\\n c"}',
    "blank lines": b'\n{"text": "a"}\n\n   \n{"text": "b"}\n\n',
    "Windows": b'{"text": "a"}\r\n\r\n{"text": "b\\r\\n"}\r\n',
    "old Mac": b'{"text": "a"}\r{"text": "b"}\r',
    "nulls": b'{"text": "a"}\n{"text": null}\nnull\n{"text": "b"}\n',
    "a column that some rows lack": b'{"n": 1}\n{"text": "a"}\n{}\n{"n": 3}\n{"text": "b"}\n',
    "byte-order mark": b'\xef\xbb\xbf{"text": "a"}\n',
    "escapes": rb'{"text": "\u00e9 \ud83d\udc0e \u2028 \u0000 \/ \" \\"}',
    "unescaped": '{"text": "é 🐎 \u2028 \x85 \x7f"}\n{"text": ""}\n'.encode(),
    "array of objects": b'[{"text": "a"}, {"text": null}, {"n": 3},\n {"text": "b\\n"}, null]',
    "array of strings": b'["a", "b\\n", null]\n',
    "array after a byte-order mark": b'\xef\xbb\xbf["a"]',
    "array after a space": b' [{"text": "a"}]',
    "empty array": b"[]",
    "many rows": b"".join(b'{"text": "row %d"}\n' % n for n in range(2500)),
}


def by_datasets(kind, file) -> list[str | None]:
    import datasets

    return [
        row["text"]
        for row in datasets.load_dataset(
            kind, data_files=[str(file)], split="train", streaming=True
        )
    ]


@pytest.mark.parametrize("name", TEXT_FILES)
def test_txt_files_are_read_as_the_package_datasets_reads_them(smoke, tmp_path, name):
    file = tmp_path / "corpus.txt"
    file.write_bytes(TEXT_FILES[name])
    assert list(documents(str(file), smoke())) == list(cut(by_datasets("text", file)))


@pytest.mark.parametrize("name", JSON_FILES)
def test_jsonl_files_are_read_as_the_package_datasets_reads_them(smoke, tmp_path, name):
    file = tmp_path / "corpus.jsonl"
    file.write_bytes(JSON_FILES[name])
    assert list(documents(str(file), smoke())) == [
        text for text in by_datasets("json", file) if text is not None
    ]


def test_half_a_surrogate_pair_is_replaced(smoke, tmp_path):
    """The package datasets cannot read such a file."""
    (tmp_path / "c.jsonl").write_text(r'{"text": "a\ud83d b"}')
    assert list(documents(str(tmp_path / "c.jsonl"), smoke())) == ["a? b"]


def test_only_parquet_and_hugging_face_need_the_package_datasets(smoke, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it raises ImportError
    (tmp_path / "c.txt").write_text("text")
    (tmp_path / "c.jsonl").write_text('{"text": "json"}')
    assert [
        *documents(str(tmp_path / "c.txt"), smoke()),
        *documents(str(tmp_path / "c.jsonl"), smoke()),
    ] == ["text\n", "json"]
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    for corpus in (str(tmp_path / "c.parquet"), "owner/name"):
        with pytest.raises(
            ValueError, match=r"needs the package datasets: pip install -e '\.\[notebook\]'"
        ):
            list(documents(corpus, smoke()))


def test_an_unreachable_dataset_is_an_error_that_names_it(smoke, monkeypatch):
    import datasets
    import huggingface_hub

    errors = [ConnectionError("offline"), huggingface_hub.errors.HTTPError("timed out")]
    for error in errors:
        monkeypatch.setattr(datasets, "load_dataset", raising(error))
        with pytest.raises(
            ValueError,
            match=r"The Hugging Face dataset owner/name \(.* split train\) cannot be read: ",
        ):
            list(documents("owner/name", smoke()))


def raising(error):
    def raise_it(*args, **options):
        raise error

    return raise_it


def test_max_tokens_limits_training_text_and_keeps_all_validation_windows(smoke):
    store = prepare(smoke(max_tokens=3000))
    assert len(store.train) == 3000
    assert len(store.validation_windows()) == 16


def test_a_validation_corpus_replaces_the_split(smoke, text_file, tmp_path):
    (tmp_path / "other.txt").write_text("Something else entirely. " * 400)
    store = prepare(smoke(corpus=str(text_file), validation_corpus=str(tmp_path / "other.txt")))
    assert "Something else" in store.tokenizer.decode(store.validation_windows()[0])
    assert store.info["training"]["bytes"] == sum(
        len(text.encode()) for text in documents(str(text_file), smoke())
    )


def test_a_pretrained_tokenizer_is_loaded_from_a_folder(smoke, text_file):
    first = prepare(smoke(corpus=str(text_file)))
    second = prepare(smoke(corpus=str(text_file), tokenizer=str(first.folder), vocab_size=None))
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab() and second.vocab_size == len(
        first.tokenizer
    )
    with pytest.raises(ValueError, match="vocab_size 300 is less than the tokenizer's 512 tokens"):
        prepare(smoke(corpus=str(text_file), tokenizer=str(first.folder), vocab_size=300))


def test_the_store_is_reused_rebuilt_if_corrupted_and_keyed_by_content(smoke, tmp_path):
    corpus = tmp_path / "c.txt"
    corpus.write_text(
        "\n\n".join(f"Paragraph {n} says something of its own. " * 20 for n in range(100))
    )
    config = smoke(corpus=str(corpus), validation_fraction=0.3)
    store = prepare(config)
    before = (store.folder / "train.bin").stat().st_mtime_ns
    assert prepare(config).folder == store.folder
    assert (store.folder / "train.bin").stat().st_mtime_ns == before
    content = (store.folder / "train.bin").read_bytes()
    (store.folder / "train.bin").write_bytes(content[:-2])
    assert (prepare(config).folder / "train.bin").read_bytes() == content
    corpus.write_text(corpus.read_text() + "More.\n")
    assert prepare(config).folder != store.folder


def test_two_runs_may_build_the_same_store_at_once(smoke, text_file, tmp_path):
    config = smoke(corpus=str(text_file), output_dir=tmp_path)
    stores, threads = [], []
    for _ in range(4):
        threads.append(threading.Thread(target=lambda: stores.append(prepare(config))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 4 and len({store.folder for store in stores}) == 1
    assert [path.name for path in (tmp_path / ".tokens").iterdir()] == [stores[0].folder.name]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "There is no corpus"),
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b"\n \n\t\n", "holds no text"),
        ("latin.txt", "Où est-il allé? ".encode("latin-1") * 100, "is not UTF-8 text"),
        ("short.txt", b"Too short.", "less than one window"),
        (
            "column.jsonl",
            b'{"body": "x"}\n',
            "has no column 'text'; set text_column to one of: body",
        ),
        ("numbers.jsonl", b'{"text": 5}\n', "holds int, not text"),
        (
            "broken.jsonl",
            b'{"text": "a"}\n{"text": \n',
            "broken.jsonl cannot be read: line 2 is not valid JSON",
        ),
        (
            "cut.jsonl",
            b'[{"text": "a"},',
            "cut.jsonl cannot be read: it begins with '[' but is not valid JSON",
        ),
        ("list.jsonl", b'{"text": "a"}\n5\n', "holds a JSON int; each row must be an object"),
        ("bytes.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "is not UTF-8 text"),
        ("broken.parquet", b"nothing of the kind", "broken.parquet cannot be read"),
        ("book.pdf", b"%PDF", "must end in one of"),
    ],
)
def test_an_unusable_corpus_is_an_error_that_says_why(smoke, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        prepare(smoke(corpus=str(tmp_path / name), output_dir=tmp_path / "out"))
    assert message in str(caught.value)
    assert not list((tmp_path / "out").glob("*")) or not list(
        (tmp_path / "out" / ".tokens").glob("*.*")
    )


def test_a_corpus_without_line_breaks_is_cut_at_spaces(smoke, tmp_path):
    words = " ".join(f"word{n % 700}" for n in range(20_000))
    (tmp_path / "flat.txt").write_text(words)
    texts = list(documents(str(tmp_path / "flat.txt"), smoke()))
    assert len(texts) > 25 and "".join(texts).replace("\n", "") == words


def test_a_vocabulary_smaller_than_the_bytes_cannot_be_trained(smoke, text_file):
    with pytest.raises(ValueError, match="needs 257 or more"):
        prepare(smoke(corpus=str(text_file), vocab_size=100))


def test_a_missing_tokenizer_is_an_error_that_says_why(smoke, text_file, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(ValueError, match="The tokenizer .* cannot be loaded"):
        prepare(smoke(corpus=str(text_file), tokenizer=str(tmp_path / "tokenizer")))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """200 MB of text may add at most 120 MB to the peak of a 5 MB corpus's build."""
    import subprocess
    import sys

    code = (
        "import resource, sys; from lmlib import RunConfig; from lmlib.data.prepare import prepare;"
        "prepare(RunConfig(corpus=sys.argv[1], output_dir=sys.argv[2], vocab_size=300));"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    words = np.random.default_rng(0).integers(0, 5000, 12_000)
    line = " ".join(f"word{w}" for w in words)
    peaks = []
    for copies in (50, 2000):
        file = tmp_path / f"{copies}.txt"
        with open(file, "w") as out:
            for n in range(copies):
                out.write(f"{n} {line}\n\n")
        done = subprocess.run(
            [sys.executable, "-c", code, file, tmp_path / "out"],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 120, peaks
