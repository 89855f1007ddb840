"""The checks of splits, tokenizers and evaluations find every planted fault; correct ones pass."""

import random
import tracemalloc

import numpy as np
import pytest
import torch
from planted import Decoder, V
from torch import nn

from lmlib import audit
from lmlib.audit import split
from lmlib.audit.split import shared_tokens
from lmlib.config import RunConfig
from lmlib.data.corpus import content_hash, documents
from lmlib.data.tokenizer import train_tokenizer
from lmlib.data.tokens import cut_windows as tokens_windows


@pytest.fixture(scope="module")
def plays():
    """Return (training, held-out) pieces of real plays, split by their hash."""
    texts = [
        piece
        for play, _ in list(documents("shakespeare", RunConfig()))[:4]
        for piece in pieces(play)
    ]
    split_at = 0.2 * 2**64
    training = [text for text in texts if content_hash(text) >= split_at]
    return training, [text for text in texts if content_hash(text) < split_at]


def pieces(play, size=1500):
    return [play[start : start + size] for start in range(0, len(play), size)]


def test_a_clean_split_passes(plays):
    report = audit.check_split(*plays)
    assert report.passed is True and report.numbers["share of words"] < 0.02


def test_a_document_in_both_splits_is_found(plays):
    training, held_out = plays
    report = audit.check_split([*training, held_out[3]], held_out)
    assert (
        report.passed is False
        and report.pattern == "duplicates"
        and report.numbers["copies"] == [3]
    )


def test_a_document_that_differs_in_case_and_spacing_is_found(plays):
    training, held_out = plays
    report = audit.check_split([*training, held_out[2].upper().replace(" ", "\n  ")], held_out)
    assert (
        report.passed is False
        and report.pattern == "duplicates"
        and report.numbers["normalized copies"] == [2]
    )


def test_a_near_duplicate_is_found(plays):
    training, held_out = plays
    words = held_out[1].split(" ")
    words[:: len(words) // 5] = ["changed"] * len(words[:: len(words) // 5])
    report = audit.check_split([*training, " ".join(words)], held_out)
    assert (
        report.passed is False
        and report.pattern == "near duplicates"
        and report.numbers["near duplicates"] == [1]
    )


def test_shared_runs_equal_those_of_a_slow_search():
    generator = np.random.default_rng(0)
    training, held_out = generator.integers(0, 3, 4000), generator.integers(0, 3, 300)
    held_out[40:70] = training[500:530]
    held_out[100] = -1
    runs = {tuple(training[i : i + 8]) for i in range(len(training) - 7)}
    slow = np.zeros(300, dtype=bool)
    for i in range(300 - 7):
        if tuple(held_out[i : i + 8]) in runs:
            slow[i : i + 8] = True
    assert (
        np.array_equal(shared_tokens(training, held_out, 8), slow)
        and slow[40:70].all()
        and not slow.all()
    )


def test_overlapping_windows_split_at_random_are_found():
    tokens = np.random.default_rng(0).integers(0, 500, 3000)
    starts = np.random.default_rng(1).permutation(len(tokens) - 65)
    clean = tokens_windows(np.random.default_rng(2).integers(0, 500, 3000), range(0, 2900, 64), 64)
    leaky = tokens_windows(tokens, starts[:20], 64)
    report = audit.check_windows(tokens, leaky)
    assert (
        report.passed is False
        and report.pattern == "overlapping windows"
        and report.numbers["share of tokens"] == 1
    )
    assert audit.check_windows(tokens, clean).passed is True


def test_a_tokenizer_that_saw_held_out_text_is_found(plays):
    training, held_out = plays
    clean = train_tokenizer(training, 2000)
    assert audit.check_tokenizer(clean, training, held_out).passed is True
    everything = [*training, *held_out, *(["The Zanzibarian quokka"] * 50)]
    held_out = [*held_out, "The Zanzibarian quokka sleeps."]
    report = audit.check_tokenizer(train_tokenizer(everything, 2000), training, held_out)
    assert report.passed is False and report.pattern == "tokenizer saw held-out text"
    assert any(
        "quok" in text or "Zan" in text for text in report.numbers["unknown to training text"]
    )


# ---------------------------------------------------------------------------------------------------
# Evaluations


def mean_loss(model, windows):
    model.eval()
    logits = model(windows[:, :-1])
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


def in_training_mode(model, windows):
    logits = model(windows[:, :-1])
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


EVALUATIONS = {
    "in training mode": in_training_mode,
    "first batches only": lambda model, windows: mean_loss(model, windows[:5]),
}


def windows(rows=12):
    return torch.randint(V, (rows, 17), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fault", EVALUATIONS)
def test_a_wrong_evaluation_is_found_and_named(fault):
    report = audit.check_evaluation(EVALUATIONS[fault], Decoder(), windows())
    assert report.passed is False and report.pattern == fault


def test_an_evaluation_with_batch_statistics_is_named():
    model = Decoder("batch norm")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    report = audit.check_evaluation(in_training_mode, model, windows())
    assert report.passed is False and "batch statistics" in report.summary


def test_a_correct_evaluation_passes_and_the_model_keeps_its_mode():
    model = Decoder().train()
    assert audit.check_evaluation(mean_loss, model, windows()).passed is True
    assert all(module.training for module in model.modules())
    with pytest.raises(ValueError, match="four windows or more"):
        audit.check_evaluation(mean_loss, model, windows(3))


def test_a_sample_is_judged_by_its_documents():
    scores = {"val_loss": 4.0, "val_loss_stderr": 0.1, "val_documents": 6}
    report = audit.check_sample(scores, 40, 360)
    assert report.passed is True and "4.0000 nats ± 0.2571 (95 %, 6 documents)" in report.summary
    for count in (1, 4):
        report = audit.check_sample(scores | {"val_documents": count}, 40, 360)
        assert report.passed is None and report.pattern == "few documents"
    of_older_version = {"val_loss": 4.0, "val_loss_stderr": 0.1}
    assert audit.check_sample(of_older_version, 40, 360).passed is None
    assert audit.check_sample(scores, 7, 9).pattern == "too small"
    assert (
        audit.is_noise(3.98, 0.03, 4.02, 0.03) is True
        and audit.is_noise(3.98, 0.03, 4.30, 0.03) is False
    )


# ---------------------------------------------------------------------------------------------------
# Profiles


def test_a_missing_mask_is_recognized_by_its_profile():
    L, p, last = 256, 0.22, 4.5
    losses, correct = torch.full((L,), 1e-4), torch.ones(L)
    losses[-1], correct[-1] = last, p
    report = audit.check_profile(losses, correct)
    assert report.passed is False and report.pattern == "missing mask"
    assert (
        "(256 - 1 + 0.22) / 256 = 99.70%" in report.summary
        and "4.50 / 256 = 0.0176" in report.summary
    )


def test_memorized_text_and_visible_answers_are_recognized():
    L = 1024
    falling = 3 + 3 * torch.arange(1, L + 1).double() ** -0.5
    assert audit.check_profile(falling, 1 / falling).passed is True
    memorized = torch.full((L,), 0.002).double()
    memorized[:8] = torch.tensor([5.0, 4, 3, 2, 1.5, 1, 0.8, 0.6])
    report = audit.check_profile(memorized, torch.exp(-memorized))
    assert (
        report.pattern == "memorized" and "the first 8 positions cost 17.9 nats" in report.summary
    )
    assert audit.check_profile(torch.full((L,), 0.01), torch.ones(L)).pattern == "answers are seen"
    with pytest.raises(ValueError, match="four positions or more"):
        audit.check_profile([1.0, 2.0], [0.1, 0.2])


def test_a_profile_that_is_low_everywhere_is_reported():
    report = audit.check_profile(torch.full((8,), 0.02), torch.full((8,), 0.5))
    assert report.passed is False and report.pattern == "memorized"


# ---------------------------------------------------------------------------------------------------
# Contamination


def words(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghijklmnop", k=6)) for _ in range(count)]


def test_a_sixth_of_copied_text_is_contamination_and_a_fiftieth_is_not():
    training = " ".join(words(1, 20_000))
    for share, passed in ((0.15, False), (0.02, True)):
        copied = " ".join(training.split()[: int(2000 * share)])
        held_out = copied + " " + " ".join(words(2, int(2000 * (1 - share))))
        report = audit.check_split([training], [held_out])
        assert report.passed is passed and abs(report.numbers["share of words"] - share) < 0.01


@pytest.mark.parametrize("length", [1, 4, 8, 12, 13, 40])
def test_windows_of_any_length_are_judged_with_the_stream_around_them(length):
    draw = np.random.default_rng(0)
    training, held_out = draw.integers(0, 5000, 8000), draw.integers(0, 5000, 3000)
    held_out[500:900] = training[100:500]
    starts = np.arange(0, 3000 - length - 1, 25)
    rows = torch.from_numpy(np.stack([held_out[s : s + length + 1] for s in starts]))
    found = split.shared_windows(training, rows, 13, held_out, starts)
    slow = [[500 <= s + t < 900 for t in range(length + 1)] for s in starts]
    assert found.tolist() == slow
    report = audit.check_windows(training, rows, 13, held_out, starts)
    assert report.passed is False and report.pattern == "shared text"
    clean = audit.check_windows(training[1000:], rows, 13, held_out, starts)
    assert clean.passed is True
    if length + 1 < 13:
        assert audit.check_windows(training, rows, 13).passed is None


def test_copied_chinese_is_found():
    draw = random.Random(0)
    characters = [chr(0x4E00 + n) for n in range(3000)]

    def sentences(count):
        return "".join("".join(draw.choices(characters, k=30)) + "。" for _ in range(count))

    training, own, thai = sentences(40), sentences(30), "ภาษาไทยไม่มีช่องว่างระหว่างคำ" * 3
    copied = audit.check_split([training], [own + training[:620]])
    assert copied.passed is False and 0.3 < copied.numbers["share of words"] < 0.45
    assert audit.check_split([training], [own]).numbers["share of words"] == 0
    assert audit.check_split([thai + training], [own + thai]).numbers["share of words"] > 0.05


def test_the_tokenizer_check_reads_texts_once_and_in_bounded_memory():
    tokenizer = train_tokenizer([" ".join(words(3, 2000))], 400)
    text = " ".join(words(3, 3000))

    def peak(count):
        tracemalloc.start()
        report = audit.check_tokenizer(tokenizer, (text for _ in range(count)), iter([text]))
        assert report.passed is True
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    never = " ".join(words(9, 500)).upper()  # so that the training text is read to its end
    report = audit.check_tokenizer(
        train_tokenizer([text + never], 1500), (text for _ in range(9)), iter([never])
    )
    assert report.passed is False and report.pattern == "tokenizer saw held-out text"
    small, large = peak(64), peak(640)
    assert large < 1.5 * small


def test_lineage_counts_what_an_ancestor_trained_on():
    trained = np.arange(0, 2000, 2, dtype=np.uint64)
    held_out = np.array([1, 3, 5, 7], np.uint64)
    assert audit.check_lineage(trained, held_out, True).passed is True
    unknown = audit.check_lineage(trained, held_out, False)
    assert unknown.passed is None and unknown.summary.startswith("lineage unknown")
    found = audit.check_lineage(trained, np.array([1, 2, 3, 4], np.uint64), False)
    assert found.passed is False and "2 of 4 held-out documents" in found.summary
    many = np.arange(1, 401, 2, dtype=np.uint64)  # 200
    many[0] = 2
    assert audit.check_lineage(trained, many, True).passed is True
