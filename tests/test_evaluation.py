"""Scores equal their definitions."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from lmlib import evaluation
from lmlib.config import RunConfig
from lmlib.data.tokens import EvaluationText
from lmlib.model.transformer import LanguageModel


def text_of(tokens, lengths, units) -> EvaluationText:
    return EvaluationText.cut(
        "validation",
        tokens,
        lengths,
        units,
        windows=99,
        sequence_length=16,
        unit="documents",
        data="",
    )


@pytest.fixture
def model():
    return LanguageModel(RunConfig(vocab_size=300, sequence_length=16, dropout=0.5)).double()


def test_scores_match_their_definitions(model):
    tokens = torch.randint(0, 300, (200,), generator=torch.Generator().manual_seed(0)).numpy()
    text = text_of(tokens, lengths=[30, 70, 45, 55], units=["a", "b", "a", "c"])
    windows = text.windows
    token_bytes = torch.randint(0, 5, (300,), generator=torch.Generator().manual_seed(1))
    model.train()
    found = evaluation.evaluate(model, text, token_bytes, batch_size=3)
    scores = found.summary()
    assert model.training  # restored; during the evaluation dropout was off:
    model.eval()
    logits, targets = model(windows[:, :-1]), windows[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    losses = losses.view(-1, 16)
    assert scores["val_loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
    # The slow, obvious way: the tokens of each unit one by one.
    units, nats, count = "a" * 30 + "b" * 70 + "a" * 45 + "c" * 55, Counter(), Counter()
    for window, start in enumerate(text.starts):
        for place in range(16):
            nats[units[start + 1 + place]] += losses[window, place].item()
            count[units[start + 1 + place]] += 1
    mean = sum(nats.values()) / sum(count.values())
    variance = 3 / 2 * sum((nats[u] - mean * count[u]) ** 2 for u in "abc") / losses.numel() ** 2
    assert scores["val_loss_stderr"] == pytest.approx(math.sqrt(variance), rel=1e-5)
    assert scores["val_documents"] == 3
    assert scores["val_accuracy"] == (logits.argmax(-1) == targets).double().mean().item()
    assert scores["val_perplexity"] == pytest.approx(math.exp(losses.mean().item()), rel=1e-6)
    nats_per_byte = losses.sum().item() / token_bytes[targets].sum().item()
    assert scores["val_bits_per_byte"] == pytest.approx(nats_per_byte / math.log(2), rel=1e-6)


def test_scoring_in_chunks_of_positions_changes_no_score(model):
    ids = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(2))
    whole = evaluation.token_scores(model.eval(), ids[:, :-1], ids[:, 1:])
    chunked = evaluation.token_scores(model, ids[:, :-1], ids[:, 1:], rows=5)
    assert torch.allclose(whole[0], chunked[0], atol=1e-6) and torch.equal(whole[1], chunked[1])


def test_one_document_has_no_standard_error(model):
    text = text_of(torch.arange(200).numpy(), lengths=[200], units=["a"])
    scores = evaluation.evaluate(model, text, torch.ones(300, dtype=torch.long), 1).summary()
    assert scores["val_loss_stderr"] is None and scores["val_documents"] == 1


def test_an_evaluation_is_kept_by_window_and_document(model):
    text = text_of(torch.arange(200).numpy(), lengths=[30, 70, 100], units=["a", "b", "a"])
    found = evaluation.evaluate(model, text, torch.full((300,), 2), 4)
    kept = found.to_json(step=5)
    rows = list(zip(kept["window"], kept["document"], kept["tokens"], strict=True))
    assert rows[:4] == [(0, 0, 16), (1, 0, 13), (1, 1, 3), (2, 1, 16)]
    assert kept["clusters"] == ["a", "b"] and kept["cluster"][:3] == [0, 0, 1]
    assert sum(kept["tokens"]) == found.losses.numel() and kept["bytes"][0] == 32
    assert sum(kept["nats"]) == pytest.approx(found.losses.sum().item())
    assert sum(kept["hits"]) == found.correct.sum()
    last = [n for n, window in enumerate(kept["window"]) if window == 11]
    assert sum(kept["nats"][n] for n in last) == pytest.approx(found.losses[11].sum().item())
