"""Documents, split, tokenizer, store and batches."""

import json
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from lmlib.data.corpus import documents, is_held_out
from lmlib.data.prepare import prepare
from lmlib.data.tokenizer import END_OF_TEXT, token_bytes
from lmlib.data.tokens import permute, window_count


def test_a_duplicate_lands_on_the_same_side_whatever_its_case_and_spacing():
    sides = Counter()
    for number in range(2000):
        text = f"Document number {number}, of some length."
        side = is_held_out(text, 0.1)
        assert side == is_held_out(f"  DOCUMENT   number\n{number}, of some length. ", 0.1)
        sides[side] += 1
    assert 150 < sides[True] < 250
    assert all(is_held_out(str(n), 0.5) for n in range(100) if is_held_out(str(n), 0.2))


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 1000, 4097])
def test_permute_is_a_permutation_fixed_by_seed_and_epoch(size):
    orders = [permute(np.arange(size), size, seed, epoch) for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert (orders[0] == orders[1]).all()
    if size >= 16:
        assert (orders[0] != orders[2]).any() and (orders[0] != orders[3]).any() and (orders[0] != np.arange(size)).any()
        one = permute(np.array([7]), size, 0, 1)
        assert one[0] == orders[2][7]


def test_every_window_is_drawn_once_an_epoch_and_a_batch_needs_no_history(smoke, text_file):
    config = smoke(corpus=str(text_file), batch_size=5)
    store = prepare(config)
    count = window_count(store.train, config.sequence_length)
    draws = np.concatenate([store.window_indices(step) for step in range(1, 3 * count)])
    for epoch in range(3):
        assert sorted(draws[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert (draws[:count] != draws[count : 2 * count]).any()

    ids, targets = store.batch(10**9)  # at once, without the steps before
    assert ids.shape == targets.shape == (5, config.sequence_length) and ids.dtype == torch.int64
    first = int(store.window_indices(10**9)[0]) * config.sequence_length
    assert ids[0].tolist() == store.train[first : first + config.sequence_length].tolist()
    assert torch.equal(ids[:, 1:], targets[:, :-1])


def test_tokens_decode_to_the_documents_each_on_one_side(smoke, text_file):
    config = smoke(corpus=str(text_file))
    store = prepare(config)
    pieces = list(documents(config.corpus, config))
    assert len(pieces) > 20 and all(1900 < len(text) < 4100 for text in pieces[:-1])
    for side, tokens in ((False, store.train), (True, store.validation)):
        expected = [text for text in pieces if is_held_out(text, config.validation_fraction) == side]
        text = store.tokenizer.decode(tokens.astype(np.int64).tolist())
        assert text == "".join(document + END_OF_TEXT for document in expected)
    assert store.train.dtype == np.uint16
    shares = [store.info[side]["tokens"] for side in ("training", "held-out")]
    assert store.info["held_out_share"] == shares[1] / sum(shares)


def test_the_tokenizer_never_sees_held_out_text(smoke, tmp_path):
    secret = "zyzzyvaquuxplugh"
    texts = [f"An ordinary sentence about the weather, number {n}. " * 5 for n in range(200)]
    texts = [text + (f" {secret}" * 50 if is_held_out(text + f" {secret}" * 50, 0.3) else "") for text in texts]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    assert sum(secret in text for text in texts) > 10
    config = smoke(corpus=str(tmp_path / "c.jsonl"), validation_fraction=0.3, vocab_size=400)
    vocabulary = prepare(config).tokenizer.get_vocab()
    assert not any("zyzz" in token or "plugh" in token for token in vocabulary)
    assert any("weather" in token for token in vocabulary)


def test_the_validation_windows_are_whole_fixed_and_held_out(smoke, text_file):
    store = prepare(smoke(corpus=str(text_file), validation_fraction=0.3))
    windows = store.validation_windows()
    assert windows.shape == (16, 65)
    assert torch.equal(windows, prepare(smoke(corpus=str(text_file), validation_fraction=0.3)).validation_windows())
    held_out = store.validation.astype(np.int64)
    for window in windows.numpy():
        assert any((held_out[i : i + 65] == window).all() for i in range(0, len(held_out) - 64, 64))


def test_text_that_spells_a_special_token_stays_text(smoke, tmp_path):
    lines = [{"text": f"{n} before <|endoftext|> after " * 20} for n in range(60)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    store = prepare(smoke(corpus=str(tmp_path / "c.jsonl"), validation_fraction=0.3, vocab_size=300))
    total = sum((tokens == store.tokenizer.eos_token_id).sum() for tokens in (store.train, store.validation))
    assert total == 60


def test_bytes_of_tokens_add_up_to_the_text(smoke, tmp_path):
    lines = [{"text": f"{n} Žluťoučký kůň 🐎 шёл по полю, " * 20} for n in range(60)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    store = prepare(smoke(corpus=str(tmp_path / "c.jsonl"), validation_fraction=0.3))
    sizes = token_bytes(store.tokenizer, 512)
    for side, tokens in (("training", store.train), ("held-out", store.validation)):
        assert sizes[torch.from_numpy(tokens.astype(np.int64))].sum() == store.info[side]["bytes"]


def test_parquet_and_jsonl_and_txt_in_a_folder_are_all_read(smoke, tmp_path):
    import pandas

    (tmp_path / "in").mkdir()
    pandas.DataFrame({"body": ["parquet one", "parquet two"]}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "in" / "b.jsonl").write_text('{"body": "json one"}\n{"body": null}\n')
    (tmp_path / "c.txt").write_text("plain\r\n\r\ntext")
    (tmp_path / "notes.md").write_text("not read")
    texts = list(documents(str(tmp_path), smoke(text_column="body")))
    assert texts == ["parquet one", "parquet two", "plain\n\ntext\n", "json one"]


def test_max_tokens_limits_training_and_leaves_enough_to_judge(smoke):
    store = prepare(smoke(max_tokens=3000))
    assert len(store.train) == 3000
    assert len(store.validation_windows()) == 16


def test_a_validation_corpus_replaces_the_split(smoke, text_file, tmp_path):
    (tmp_path / "other.txt").write_text("Something else entirely. " * 400)
    store = prepare(smoke(corpus=str(text_file), validation_corpus=str(tmp_path / "other.txt")))
    assert "Something else" in store.tokenizer.decode(store.validation_windows()[0])
    assert store.info["training"]["bytes"] == sum(len(text.encode()) for text in documents(str(text_file), smoke()))


def test_a_ready_made_tokenizer_comes_from_a_folder(smoke, text_file):
    first = prepare(smoke(corpus=str(text_file)))
    second = prepare(smoke(corpus=str(text_file), tokenizer=str(first.folder), vocab_size=None))
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab() and second.vocab_size == len(first.tokenizer)
    with pytest.raises(ValueError, match="vocab_size 300 is less than the tokenizer's 512 tokens"):
        prepare(smoke(corpus=str(text_file), tokenizer=str(first.folder), vocab_size=300))


def test_the_store_is_reused_rebuilt_when_damaged_and_keyed_by_content(smoke, tmp_path):
    corpus = tmp_path / "c.txt"
    corpus.write_text("\n\n".join(f"Paragraph {n} says something of its own. " * 20 for n in range(100)))
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
    ("name", "content", "sentence"),
    [
        ("missing.txt", None, "There is no corpus"),
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b"\n \n\t\n", "holds no text"),
        ("latin.txt", "Où est-il allé? ".encode("latin-1") * 100, "is not UTF-8 text"),
        ("short.txt", b"Too short.", "less than one window"),
        ("column.jsonl", b'{"body": "x"}\n', "has no column 'text'; set text_column to one of: body"),
        ("numbers.jsonl", b'{"text": 5}\n', "holds int, not text"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "broken.jsonl cannot be read"),
        ("broken.parquet", b"nothing of the kind", "broken.parquet cannot be read"),
        ("book.pdf", b"%PDF", "must end in one of"),
    ],
)
def test_a_corpus_that_cannot_be_used_is_one_sentence(smoke, tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        prepare(smoke(corpus=str(tmp_path / name), output_dir=tmp_path / "out"))
    assert sentence in str(caught.value)
    assert not list((tmp_path / "out").glob("*")) or not list((tmp_path / "out" / ".tokens").glob("*.*"))


def test_a_corpus_without_line_breaks_is_cut_at_spaces(smoke, tmp_path):
    words = " ".join(f"word{n % 700}" for n in range(20_000))
    (tmp_path / "flat.txt").write_text(words)
    texts = list(documents(str(tmp_path / "flat.txt"), smoke()))
    assert len(texts) > 25 and "".join(texts).replace("\n", "") == words


def test_a_vocabulary_below_the_bytes_cannot_be_trained(smoke, text_file):
    with pytest.raises(ValueError, match="needs 257 or more"):
        prepare(smoke(corpus=str(text_file), vocab_size=100))


def test_a_tokenizer_that_is_not_there_is_one_sentence(smoke, text_file, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(ValueError, match="The tokenizer .* cannot be loaded"):
        prepare(smoke(corpus=str(text_file), tokenizer=str(tmp_path / "tokenizer")))


@pytest.mark.slow
def test_a_large_corpus_does_not_need_its_size_in_memory(tmp_path):
    """200 MB of text may add at most 120 MB to the peak of a 5 MB corpus's build."""
    import subprocess
    import sys

    code = (
        "import resource, sys; from lmlib import RunConfig, data;"
        "data.prepare(RunConfig(corpus=sys.argv[1], output_dir=sys.argv[2], vocab_size=300));"
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
        done = subprocess.run([sys.executable, "-c", code, file, tmp_path / "out"], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 120, peaks
