"""The checks of splits, tokenizers and evaluations find every planted fault; correct ones pass."""

import numpy as np
import pytest
import torch
from planted import Decoder, V
from torch import nn

from lmlib import audit, evaluation
from lmlib.audit.split import shared_tokens
from lmlib.config import RunConfig
from lmlib.data.corpus import documents, is_held_out
from lmlib.data.tokenizer import train_tokenizer
from lmlib.data.tokens import windows as tokens_windows


@pytest.fixture(scope="module")
def plays():
    """Return (training, held-out) pieces of real plays, split by their hash."""
    texts = [
        piece for play in list(documents("shakespeare", RunConfig()))[:4] for piece in pieces(play)
    ]
    return [t for t in texts if not is_held_out(t, 0.2)], [t for t in texts if is_held_out(t, 0.2)]


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


def test_small_samples_and_noise_are_reported():
    losses, correct, targets = (
        torch.rand(40, 9).double(),
        torch.rand(40, 9) > 0.5,
        torch.ones(40, 9, dtype=torch.int64),
    )
    scores = evaluation.summarize(losses, correct, targets, torch.ones(5, dtype=torch.int64))
    report = audit.check_sample(scores, 40, 360)
    assert (
        report.passed is True
        and f"{losses.mean():.4f}" in report.summary
        and "is noise" in report.summary
    )
    assert (
        audit.check_sample({"val_loss": 1.0, "val_loss_stderr": None}, 1, 9).pattern == "too small"
    )
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
