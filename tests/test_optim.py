"""Optimisers and schedule."""

import math

import pytest
import torch

from lmlib import optim
from lmlib.config import RunConfig
from lmlib.model.transformer import LanguageModel


@pytest.mark.parametrize("shape", [(16, 16), (10, 40), (40, 10)])
def test_orthogonalise_keeps_the_singular_vectors_and_levels_the_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    levelled = u.T @ optim.orthogonalize(matrix, torch.float64) @ vt.T  # diagonal if the vectors are kept
    values = levelled.diagonal()
    assert torch.allclose(levelled, values.diag(), atol=1e-8)
    assert values.min() > 0.3 and values.max() < 1.3


def test_muon_takes_nesterov_steps_written_out_by_hand():
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 3, generator=generator))
    expected, momentum = weight.detach().clone(), torch.zeros(6, 3)
    optimizer = optim.Muon([weight], lr=0.1, weight_decay=0.01)
    for _ in range(3):
        weight.grad = torch.randn(6, 3, generator=generator)
        momentum = 0.95 * momentum + 0.05 * weight.grad
        update = optim.orthogonalize(0.05 * weight.grad + 0.95 * momentum, torch.float32)
        expected = expected * (1 - 0.1 * 0.01) - 0.1 * math.sqrt(2) * update
        optimizer.step()
        assert torch.allclose(weight, expected, atol=1e-6)


def test_each_parameter_has_one_optimiser_and_only_matrices_decay():
    model = LanguageModel(RunConfig(vocab_size=300, tie_word_embeddings=False, attention_bias=True, q_lora_rank=32))
    for name in ("muon", "adamw"):
        optimizers = optim.build_optimizers(model, RunConfig(optimizer=name))
        groups = [(type(o).__name__, g) for o in optimizers for g in o.param_groups]
        owned = [id(p) for _, g in groups for p in g["params"]]
        assert sorted(owned) == sorted(id(p) for p in model.parameters())
        for kind, group in groups:
            for parameter in group["params"]:
                assert (group["weight_decay"] > 0) == (parameter.dim() == 2)
                assert kind == "AdamW" or parameter.dim() == 2
    tables = {id(model.model.embed_tokens.weight), id(model.lm_head.weight)}
    muon = optim.build_optimizers(model, RunConfig())[0]
    assert isinstance(muon, optim.Muon) and not tables & {id(p) for p in muon.param_groups[0]["params"]}


def test_the_schedule_warms_up_over_5_percent_and_falls_to_10():
    shares = [optim.schedule(step, 1000, 0.05) for step in range(1, 1001)]
    assert shares[0] == pytest.approx(1 / 50) and shares[49] == 1 and shares[-1] == pytest.approx(0.1)
    assert shares[:50] == sorted(shares[:50]) and shares[49:] == sorted(shares[49:], reverse=True)
    assert shares[49 + 475] == pytest.approx(0.55, abs=0.01)  # half way down
    assert [optim.schedule(step, 1, 0.0) for step in (1,)] == [pytest.approx(0.1)]


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_optimiser_state_survives_as_named_tensors(name):
    config = RunConfig(vocab_size=300, optimizer=name)

    def steps(model, optimizers, numbers):
        for number in numbers:
            ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(number))
            model.zero_grad()
            model.loss(ids[:, :-1], ids[:, 1:]).backward()
            for optimizer in optimizers:
                optimizer.step()

    whole = LanguageModel(config)
    optimizers = optim.build_optimizers(whole, config)
    steps(whole, optimizers, range(3))
    tensors = {key: tensor.clone() for key, tensor in optim.state_tensors(whole, optimizers).items()}
    assert sum(t.nbytes for t in tensors.values()) == pytest.approx(optim.state_bytes(optimizers), rel=0.01)
    half = LanguageModel(config)
    half.load_state_dict(whole.state_dict())
    restored = optim.build_optimizers(half, config)
    optim.load_state_tensors(half, restored, tensors)
    steps(whole, optimizers, range(3, 6))
    steps(half, restored, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), half.parameters(), strict=True))
