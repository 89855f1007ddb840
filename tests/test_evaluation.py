"""Scores equal their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F

from lmlib import evaluation
from lmlib.config import RunConfig
from lmlib.model.transformer import LanguageModel


@pytest.fixture
def model():
    return LanguageModel(RunConfig(vocab_size=300, sequence_length=16, dropout=0.5)).double()


def test_scores_match_their_definitions(model):
    windows = torch.randint(0, 300, (7, 17), generator=torch.Generator().manual_seed(0))
    token_bytes = torch.randint(0, 5, (300,), generator=torch.Generator().manual_seed(1))
    model.train()
    scores = evaluation.evaluate(model, windows, token_bytes, batch_size=3)
    assert model.training  # restored; during the evaluation dropout was off:
    model.eval()
    logits, targets = model(windows[:, :-1]), windows[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(7, 16)
    assert scores["val_loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert scores["val_loss_stderr"] == pytest.approx(
        losses.mean(1).std().item() / math.sqrt(7), rel=1e-5
    )
    assert scores["val_accuracy"] == (logits.argmax(-1) == targets).double().mean().item()
    assert scores["val_perplexity"] == pytest.approx(math.exp(losses.mean().item()), rel=1e-6)
    nats_per_byte = losses.sum().item() / token_bytes[targets].sum().item()
    assert scores["val_bits_per_byte"] == pytest.approx(nats_per_byte / math.log(2), rel=1e-6)


def test_scoring_in_chunks_of_positions_changes_no_score(model):
    ids = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(2))
    whole = evaluation.token_scores(model.eval(), ids[:, :-1], ids[:, 1:])
    chunked = evaluation.token_scores(model, ids[:, :-1], ids[:, 1:], rows=5)
    assert torch.allclose(whole[0], chunked[0], atol=1e-6) and torch.equal(whole[1], chunked[1])


def test_one_window_has_no_standard_error(model):
    windows = torch.zeros(1, 17, dtype=torch.long)
    assert (
        evaluation.evaluate(model, windows, torch.ones(300, dtype=torch.long), 1)["val_loss_stderr"]
        is None
    )
