"""Documents, splits, tokenizer, token store and batches."""

import hashlib
import json
import re
import shutil
import sys
import threading

import numpy as np
import pytest
import torch
from filelock import FileLock

from lmlib.config import RunConfig
from lmlib.data import corpus as corpus_module
from lmlib.data import prepare as prepare_module
from lmlib.data import verify
from lmlib.data.corpus import content_hash, cut, split_rules
from lmlib.data.prepare import prepare
from lmlib.data.tokenizer import END_OF_TEXT, token_bytes
from lmlib.data.tokens import permute, window_count


def documents(corpus: str, config: RunConfig) -> list[str]:
    return [text for text, _ in corpus_module.documents(corpus, config)]


def texts_of(config: RunConfig) -> dict[str, list[str]]:
    """The documents of each split."""
    found = {split: [] for split in verify.SPLITS}
    for corpus, rule in split_rules(config):
        for text in documents(corpus, config):
            found[rule.split_of(content_hash(text))].append(text)
    return found


def write_jsonl(file, texts):
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(file)


def test_duplicates_that_differ_in_case_and_spacing_land_in_the_same_split():
    for number in range(200):
        text = f"Document number {number}, of some length."
        assert content_hash(text) == content_hash(
            f"  DOCUMENT   number\n{number}, of some length. "
        )


def test_fractions_divide_documents_into_three_splits(smoke, tmp_path):
    corpus = write_jsonl(
        tmp_path / "c.jsonl", (f"Document {n} of some length." for n in range(2000))
    )
    three = texts_of(smoke(corpus=corpus, validation_fraction=0.1, test_fraction=0.2))
    assert 150 < len(three["validation"]) < 250 and 350 < len(three["test"]) < 450
    more = texts_of(smoke(corpus=corpus, validation_fraction=0.3, test_fraction=0.2))
    assert set(three["validation"]) < set(more["validation"]) and three["test"] == more["test"]
    none = texts_of(smoke(corpus=corpus, validation_fraction=0.1, test_fraction=0))
    assert none["validation"] == three["validation"] and none["test"] == []
    assert sorted(sum(three.values(), [])) == sorted(sum(none.values(), []))


def test_a_validation_corpus_is_divided_between_validation_and_test(smoke, text_file, tmp_path):
    other = write_jsonl(tmp_path / "c.jsonl", (f"Document {n} of some length." for n in range(600)))
    given = {"corpus": str(text_file), "validation_corpus": other}
    found = texts_of(smoke(**given, validation_fraction=0.1, test_fraction=0.2))
    assert found["training"] == documents(str(text_file), smoke())
    assert len(found["validation"]) + len(found["test"]) == 600
    assert 160 < len(found["validation"]) < 240
    assert len(texts_of(smoke(**given, test_fraction=0))["validation"]) == 600


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


def test_permute_scatters_the_windows_of_ten_billion_tokens():
    """No table: a million places of a permutation of 10^10 are distinct, in range, and even."""
    size = 10**10
    places = permute(np.arange(size - 10**6, size), size, 0, 0)
    assert len(np.unique(places)) == 10**6 and places.min() >= 0 and places.max() < size
    counts = np.bincount(places * 100 // size, minlength=100)  # expected: 10,000 +- 100
    assert counts.min() > 9_500 and counts.max() < 10_500


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
    tokens = {"training": store.train, "validation": store.validation, "test": store.test}
    for split, expected in texts_of(config).items():
        text = store.tokenizer.decode(tokens[split].astype(np.int64).tolist())
        assert text == "".join(document + END_OF_TEXT for document in expected)
        assert list(store.texts(split)) == expected
    assert store.train.dtype == np.uint16
    counts = [store.info[split]["tokens"] for split in verify.SPLITS]
    assert store.info["held_out_share"] == pytest.approx(sum(counts[1:]) / sum(counts))


def test_the_tokenizer_is_trained_on_training_documents_only(smoke, tmp_path):
    secret = "zyzzyvaquuxplugh"
    texts = [f"An ordinary sentence about the weather, number {n}. " * 5 for n in range(200)]
    held_out = (content_hash(text + f" {secret}" * 50) < 0.3 * 2**64 for text in texts)
    texts = [
        text + (f" {secret}" * 50 if is_held_out else "")
        for text, is_held_out in zip(texts, held_out, strict=True)
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    assert sum(secret in text for text in texts) > 10
    config = smoke(corpus=str(tmp_path / "c.jsonl"), validation_fraction=0.3, vocab_size=400)
    vocabulary = prepare(config).tokenizer.get_vocab()
    assert not any("zyzz" in token or "plugh" in token for token in vocabulary)
    assert any("weather" in token for token in vocabulary)


def test_evaluation_windows_are_whole_and_at_equal_distances_whatever_the_seed(smoke):
    stores = [prepare(smoke(seed=seed)) for seed in (0, 1, 7)]
    for split in ("validation", "test"):
        texts = [store.evaluation_text(split) for store in stores]
        assert all(torch.equal(text.windows, texts[0].windows) for text in texts)
        tokens = stores[0].test if split == "test" else stores[0].validation
        starts = texts[0].starts
        assert len(starts) == 16 and len(set(np.diff(starts))) == 1 and starts[0] == 0
        assert len(tokens) - starts[-1] < 2 * np.diff(starts)[0]
        for start, window in zip(starts, texts[0].windows.numpy(), strict=True):
            assert (tokens[start : start + 65] == window).all()


def test_each_target_of_an_evaluation_knows_its_document(smoke, text_file):
    store = prepare(smoke(corpus=str(text_file), validation_fraction=0.4))
    text, end = store.evaluation_text("validation"), store.tokenizer.eos_token_id
    ends = np.flatnonzero(store.validation == end)
    for row, start in enumerate(text.starts):
        for place in range(64):
            token = start + 1 + place
            assert text.documents[row, place] == (ends < token).sum()


def test_pieces_of_one_file_are_clustered_by_tenths_and_those_of_several_by_file(smoke, tmp_path):
    def units(config):
        text = prepare(config).evaluation_text("validation")
        return text.unit, len(set(text.units)), len(text.units)

    folder = tmp_path / "several"
    folder.mkdir()
    for name in "abc":
        lines = (f"Line {n} of file {name} says something.\n\n" * 20 for n in range(60))
        (folder / f"{name}.txt").write_text("".join(lines))
    common = {"validation_fraction": 0.4, "test_fraction": 0}
    unit, count, number = units(smoke(corpus=str(folder), **common))
    assert (unit, count) == ("files", 3) and number > 10
    unit, count, number = units(smoke(corpus=str(folder / "a.txt"), **common))
    assert unit == "tenths of one file" and 1 < count <= 10 and number > 5
    corpus = write_jsonl(tmp_path / "c.jsonl", (f"Text {n} is a row. " * 20 for n in range(100)))
    unit, count, number = units(smoke(corpus=corpus, **common))
    assert unit == "documents" and count == number > 20


def test_text_that_spells_a_special_token_stays_text(smoke, tmp_path):
    lines = [{"text": f"{n} before <|endoftext|> after " * 20} for n in range(60)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    store = prepare(
        smoke(corpus=str(tmp_path / "c.jsonl"), validation_fraction=0.3, vocab_size=300)
    )
    ends = [tokens == store.tokenizer.eos_token_id for tokens in (store.train, store.validation)]
    assert sum(map(np.sum, ends)) + (store.test == store.tokenizer.eos_token_id).sum() == 60


def test_token_bytes_add_up_to_the_bytes_of_the_text(smoke, tmp_path):
    lines = [{"text": f"{n} Žluťoučký kůň 🐎 шёл по полю, " * 20} for n in range(60)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    store = prepare(smoke(corpus=str(tmp_path / "c.jsonl"), validation_fraction=0.3))
    sizes = token_bytes(store.tokenizer, 512)
    for split, tokens in (("training", store.train), ("validation", store.validation)):
        assert sizes[torch.from_numpy(tokens.astype(np.int64))].sum() == store.info[split]["bytes"]


def test_parquet_and_jsonl_and_txt_in_a_folder_are_all_read(smoke, tmp_path):
    import pandas

    (tmp_path / "in").mkdir()
    pandas.DataFrame({"body": ["parquet one", "parquet two"]}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "in" / "b.jsonl").write_text('{"body": "json one"}\n{"body": null}\n')
    (tmp_path / "c.txt").write_text("plain\r\n\r\ntext")
    (tmp_path / "notes.md").write_text("not read")
    (tmp_path / "D.TXT").write_text("loud")
    texts = documents(str(tmp_path), smoke(text_column="body"))
    assert texts == ["loud\n", "parquet one", "parquet two", "plain\n\ntext\n", "json one"]


def test_file_names_are_no_patterns(smoke, tmp_path):
    """The package datasets takes them as globs: "ch[1]" would read "ch1"."""
    import pandas

    names = ["ch[1]", "ch1", "who?", "whom", "Othello [Garnett]", "a*", "ab"]
    for suffix in ("txt", "jsonl", "parquet"):
        folder = tmp_path / suffix
        folder.mkdir()
        for name in names:
            file = folder / f"{name}.{suffix}"
            if suffix == "txt":
                file.write_text(name)
            elif suffix == "jsonl":
                write_jsonl(file, [name])
            else:
                pandas.DataFrame({"text": [name]}).to_parquet(file)
        assert sorted(text.strip() for text in documents(str(folder), smoke())) == sorted(names)


def test_a_file_without_documents_is_said(smoke, tmp_path):
    (tmp_path / "full.txt").write_text("text")
    (tmp_path / "blank.txt").write_text(" \n\n")
    write_jsonl(tmp_path / "rows.jsonl", [" ", ""])
    with pytest.warns(UserWarning, match="2 of the 3 files of .* blank.txt, rows.jsonl"):
        assert documents(str(tmp_path), smoke()) == ["text\n"]


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
    assert documents(str(file), smoke()) == list(cut(by_datasets("text", file)))


@pytest.mark.parametrize("name", JSON_FILES)
def test_jsonl_files_are_read_as_the_package_datasets_reads_them(smoke, tmp_path, name):
    file = tmp_path / "corpus.jsonl"
    file.write_bytes(JSON_FILES[name])
    assert documents(str(file), smoke()) == [
        text for text in by_datasets("json", file) if text is not None and text.strip()
    ]


def test_half_a_surrogate_pair_is_replaced(smoke, tmp_path):
    """The package datasets cannot read such a file."""
    (tmp_path / "c.jsonl").write_text(r'{"text": "a\ud83d b"}')
    assert documents(str(tmp_path / "c.jsonl"), smoke()) == ["a? b"]


def test_only_parquet_and_hugging_face_need_further_packages(smoke, tmp_path, monkeypatch):
    for package in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it raises ImportError
    (tmp_path / "c.txt").write_text("text")
    (tmp_path / "c.jsonl").write_text('{"text": "json"}')
    assert [
        *documents(str(tmp_path / "c.txt"), smoke()),
        *documents(str(tmp_path / "c.jsonl"), smoke()),
    ] == ["text\n", "json"]
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    for corpus, package in ((str(tmp_path / "c.parquet"), "pyarrow"), ("owner/name", "datasets")):
        with pytest.raises(
            ValueError, match=rf"needs? the package {package}: pip install -e \"\.\[notebook\]\""
        ):
            documents(corpus, smoke())


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
            documents("owner/name", smoke())


def raising(error):
    def raise_it(*args, **options):
        raise error

    return raise_it


def test_max_tokens_limits_training_alone_and_reads_on_until_held_out_splits_are_full(smoke):
    store = prepare(smoke(max_tokens=3000))
    assert len(store.train) == 3000
    for split in ("validation", "test"):
        assert len(store.evaluation_text(split).windows) == 16


def test_smoke_holds_out_two_documents_or_more_in_each_split(smoke):
    info = prepare(smoke()).info
    assert info["validation"]["documents"] >= 2 and info["test"]["documents"] >= 2


def test_a_validation_corpus_replaces_the_split(smoke, text_file, tmp_path):
    (tmp_path / "other.txt").write_text("Something else entirely. " * 400)
    store = prepare(
        smoke(
            corpus=str(text_file), validation_corpus=str(tmp_path / "other.txt"), test_fraction=0.0
        )
    )
    assert "Something else" in store.tokenizer.decode(store.validation_windows()[0])
    assert store.info["training"]["bytes"] == sum(
        len(text.encode()) for text in documents(str(text_file), smoke())
    )


def test_splits_that_are_too_short_name_the_fractions_that_work(smoke, tmp_path):
    texts = [f"Text {n} says number {n * 7} and then {n * 13} in words. " * 12 for n in range(8)]
    given = {"corpus": write_jsonl(tmp_path / "c.jsonl", texts)}
    config = smoke(**given, validation_fraction=0.001, test_fraction=0.001)
    with pytest.raises(ValueError, match="validation and test split .* is shorter") as caught:
        prepare(config)
    message = str(caught.value)
    assert "validation 0 tokens in 0 documents" in message
    found = re.search(r"validation_fraction ([\d.]+) and test_fraction ([\d.]+) would", message)
    fractions = {"validation_fraction": float(found[1]), "test_fraction": float(found[2])}
    prepare(smoke(**given, **fractions))
    prepare(smoke(**given, validation_fraction=float(found[1]), test_fraction=0.0))
    # Without a test score no test split is needed.
    prepare(smoke(**given, **fractions | {"test_fraction": 0.001}, score_test=False))
    with pytest.raises(ValueError, match="test split .* is shorter"):
        prepare(smoke(**given, **fractions | {"test_fraction": 0.001}))


def test_a_pretrained_tokenizer_is_loaded_from_a_folder(smoke, text_file):
    first = prepare(smoke(corpus=str(text_file)))
    second = prepare(smoke(corpus=str(text_file), tokenizer=str(first.folder), vocab_size=None))
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab() and second.vocab_size == len(
        first.tokenizer
    )
    with pytest.raises(ValueError, match="vocab_size 300 is less than the tokenizer's 512 tokens"):
        prepare(smoke(corpus=str(text_file), tokenizer=str(first.folder), vocab_size=300))


@pytest.fixture
def small(smoke, tmp_path):
    """Return a config with a small corpus and outputs of its own."""
    texts = (f"Paragraph {n} says something of its own. " * 20 for n in range(100))
    corpus = write_jsonl(tmp_path / "c.jsonl", texts)
    return smoke(corpus=corpus, output_dir=tmp_path / "out")


def test_the_store_is_reused_and_keyed_by_content(small, tmp_path):
    store = prepare(small)
    before = (store.folder / "train.bin").stat().st_mtime_ns
    assert prepare(small).folder == store.folder
    assert (store.folder / "train.bin").stat().st_mtime_ns == before
    (tmp_path / "c.jsonl").write_text((tmp_path / "c.jsonl").read_text() + '\n{"text": "More."}')
    assert prepare(small).folder != store.folder


def garble(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "train.bin": garble,
    "validation.bin": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "test.bin": lambda file: file.write_bytes(file.read_bytes()[:-2]),
    "training_documents.bin": garble,
    "validation_documents.bin": lambda file: file.unlink(),
    "tokenizer.json": lambda file: file.write_bytes(file.read_bytes()[:1000]),
    "store.json": lambda file: file.write_text(file.read_text().replace("0", "1", 1)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_store_is_said_and_built_again(small, name, tmp_path):
    store = prepare(small)
    before = {file.name: file.read_bytes() for file in store.folder.iterdir()}
    # A new run trains the tokenizer again; a resumed one has it in its checkpoint.
    store.tokenizer.save_pretrained(tmp_path / "checkpoint")
    for tokenizer in (None, str(tmp_path / "checkpoint")):
        DAMAGE[name](store.folder / name)
        with pytest.warns(UserWarning, match=rf"damaged \({name}.*\); it is built again"):
            again = prepare(small, tokenizer)
        assert again.folder == store.folder and len(list(store.folder.parent.glob("*/"))) == 1
        for file, content in before.items():
            if file.endswith(".bin") or file == "tokenizer.json":
                assert (again.folder / file).read_bytes() == content


def test_a_large_store_is_verified_while_training_and_once_per_machine(small, monkeypatch):
    monkeypatch.setattr(verify, "AT_ONCE", 0)
    store = prepare(small)
    store.wait_until_verified()
    assert prepare(small).verification is None  # this machine has verified it
    garble(store.folder / "train.bin")
    damaged = prepare(small)
    with pytest.raises(ValueError, match=r"damaged \(train.bin\), so nothing .* is saved"):
        damaged.wait_until_verified()
    monkeypatch.setenv("LOCAL_RANK", "1")  # of several processes here the first verifies
    (store.folder / "damaged").unlink()
    assert prepare(small).verification is None
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ValueError, match="damaged"):
        prepare(small).wait_until_verified()
    with pytest.warns(UserWarning, match="is built again"):
        prepare(small).wait_until_verified()


def test_the_identity_of_a_stream_is_that_of_its_pieces(small, monkeypatch):
    monkeypatch.setattr(verify, "PIECE", 1000)
    store = prepare(small)
    content, pieces = (store.folder / "train.bin").read_bytes(), store.info["training"]["pieces"]
    expected = [
        hashlib.sha256(content[start : start + 1000]).hexdigest()
        for start in range(0, len(content), 1000)
    ]
    assert pieces == expected and len(pieces) > 5


def test_drafts_of_killed_builds_are_swept(small):
    store = prepare(small)
    stores = store.folder.parent
    for name in (store.folder.name, "0" * 24, "1" * 24):
        (stores / f"{name}.draft-12345678").mkdir()
    (store.folder / "store.json").unlink()
    with FileLock(stores / f"{'1' * 24}.lock"), pytest.warns(UserWarning, match="built again"):
        prepare(small)  # while another process builds the last
    assert [draft.name[0] for draft in stores.glob("*.draft-*")] == ["1"]


def test_a_resumed_run_finds_its_store_by_the_tokenizer_in_its_checkpoint(small, tmp_path):
    store = prepare(small)
    store.tokenizer.save_pretrained(tmp_path / "checkpoint")
    assert prepare(small, tokenizer=str(tmp_path / "checkpoint")).folder == store.folder
    shutil.rmtree(store.folder)
    rebuilt = prepare(small, tokenizer=str(tmp_path / "checkpoint"))
    assert verify.data_hash(rebuilt.info) == verify.data_hash(store.info)


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
    folders = [path.name for path in (tmp_path / ".tokens").iterdir() if path.is_dir()]
    assert folders == [stores[0].folder.name]


def test_a_store_is_tokenized_once_however_many_runs_want_it(small, monkeypatch):
    builds = []
    build = prepare_module._build
    monkeypatch.setattr(
        prepare_module, "_build", lambda *given: builds.append(build(*given)) or builds[-1]
    )
    threads = [threading.Thread(target=prepare, args=(small,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "There is no corpus"),
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b"\n \n\t\n", "holds no text"),
        ("latin.txt", "Où est-il allé? ".encode("latin-1") * 100, "is not UTF-8 text"),
        ("short.txt", b"Too short.", "is shorter than one window"),
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
    assert not list((tmp_path / "out").glob(".tokens/*.draft*"))


def test_long_lines_are_cut_at_spaces_and_gain_no_line_breaks(smoke, tmp_path):
    words = " ".join(f"word{n % 700}" for n in range(20_000))
    (tmp_path / "flat.txt").write_text(words)
    texts = documents(str(tmp_path / "flat.txt"), smoke())
    assert len(texts) > 25 and "".join(texts) == words + "\n"
    assert all(text.endswith((" ", "\n")) for text in texts)


def test_cutting_a_long_line_is_linear():
    """Counts the characters that are copied: all of the rest for every piece would be quadratic."""

    class Line(str):
        copied = 0

        def __getitem__(self, key):
            part = str.__getitem__(self, key)
            Line.copied += len(part)
            return part

    line = Line("word " * 100_000)
    assert "".join(cut([line])) == line + "\n"
    assert Line.copied < 3 * len(line)


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
