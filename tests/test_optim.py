"""Optimizers and the learning-rate schedule."""

import math

import pytest
import torch

from lmlib import optim
from lmlib.config import RunConfig
from lmlib.model.transformer import LanguageModel


@pytest.mark.parametrize("shape", [(16, 16), (10, 40), (40, 10)])
def test_orthogonalize_keeps_singular_vectors_and_moves_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    # Diagonal if the singular vectors are kept.
    values_matrix = u.T @ optim.orthogonalize(matrix, torch.float64) @ vt.T
    values = values_matrix.diagonal()
    assert torch.allclose(values_matrix, values.diag(), atol=1e-8)
    assert values.min() > 0.3 and values.max() < 1.3


def test_muon_matches_nesterov_momentum_written_by_hand():
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


@pytest.mark.parametrize("elements", [1, 2**26])
def test_muon_updates_stacks_like_single_matrices(elements, monkeypatch):
    monkeypatch.setattr(optim.Muon, "STACK", elements)
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 24), (8, 24), (24, 8), (3, 8, 24), (3, 8, 24), (8, 8)]
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    expected = []
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
        scale = max(1.0, weight.shape[-2] / weight.shape[-1]) ** 0.5
        momentum = 0.05 * weight.grad
        update = optim.orthogonalize(0.05 * weight.grad + 0.95 * momentum, torch.float32)
        expected.append(weight.detach() * 0.99 - 0.1 * scale * update)
    optim.Muon(weights, lr=0.1, weight_decay=0.1).step()
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(weights, expected, strict=True))


def test_where_found_inf_is_one_nothing_changes():
    weight = torch.nn.Parameter(torch.tensor([[1.0, -0.0], [2.0, 0.0]]))
    muon = optim.Muon([weight], lr=0.1, weight_decay=0.5)
    weight.grad = torch.full((2, 2), math.nan)
    muon.found_inf = torch.tensor(1.0)
    muon.step()
    assert weight.equal(torch.tensor([[1.0, -0.0], [2.0, 0.0]])) and weight.signbit()[0, 1]
    assert not muon.state[weight]["momentum"].any()
    weight.grad = torch.ones(2, 2)
    muon.found_inf = torch.tensor(0.0)
    muon.step()
    assert weight.isfinite().all() and weight[0, 0] != 1.0


def test_each_parameter_has_one_optimizer_and_only_matrices_decay():
    model = LanguageModel(
        RunConfig(vocab_size=300, tie_word_embeddings=False, attention_bias=True, q_lora_rank=32)
    )
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
    assert isinstance(muon, optim.Muon)
    assert not tables & {id(p) for p in muon.param_groups[0]["params"]}


def test_the_schedule_warms_up_over_5_percent_and_decays_to_10_percent():
    fractions = [optim.schedule(step, 1000, 0.05) for step in range(1, 1001)]
    assert fractions[0] == pytest.approx(1 / 50)
    assert fractions[49] == 1
    assert fractions[-1] == pytest.approx(0.1)
    assert fractions[:50] == sorted(fractions[:50])
    assert fractions[49:] == sorted(fractions[49:], reverse=True)
    assert fractions[49 + 475] == pytest.approx(0.55, abs=0.01)  # halfway down
    assert [optim.schedule(step, 1, 0.0) for step in (1,)] == [pytest.approx(0.1)]


def test_the_linear_schedule_stays_at_the_peak_and_falls_to_nearly_zero():
    fractions = [optim.schedule(step, 1000, 0.05, 0.6) for step in range(1, 1001)]
    assert fractions[24] == 0.5 and fractions[49:399] == [1.0] * 350
    assert fractions[699] == pytest.approx(0.5, abs=2e-3)
    assert 0 < fractions[-1] < 2 / 600
    falls = [a - b for a, b in zip(fractions[400:], fractions[401:], strict=False)]
    assert max(falls) == pytest.approx(min(falls))
    assert optim.schedule(1, 1, 0.0, 0.6) > 0


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_optimizer_state_is_restored_from_named_tensors(name):
    config = RunConfig(vocab_size=300, optimizer=name)

    def steps(model, optimizers, numbers):
        for number in numbers:
            ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(number))
            model.zero_grad()
            model.loss(ids[:, :-1], ids[:, 1:]).backward()
            for optimizer in optimizers:
                optimizer.step()

    uninterrupted = LanguageModel(config)
    optimizers = optim.build_optimizers(uninterrupted, config)
    steps(uninterrupted, optimizers, range(3))
    tensors = {
        key: tensor.clone()
        for key, tensor in optim.state_tensors(uninterrupted, optimizers).items()
    }
    assert sum(t.nbytes for t in tensors.values()) == pytest.approx(
        optim.state_bytes(optimizers), rel=0.01
    )
    resumed = LanguageModel(config)
    resumed.load_state_dict(uninterrupted.state_dict())
    restored = optim.build_optimizers(resumed, config)
    optim.load_state_tensors(resumed, restored, tensors)
    steps(uninterrupted, optimizers, range(3, 6))
    steps(resumed, restored, range(3, 6))
    assert all(
        torch.equal(a, b)
        for a, b in zip(uninterrupted.parameters(), resumed.parameters(), strict=True)
    )


def trained_state(name, **shape):
    """Return the optimizer state of a model after one update."""
    config = RunConfig(vocab_size=300, optimizer=name, **shape)
    model = LanguageModel(config)
    optimizers = optim.build_optimizers(model, config)
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    for optimizer in optimizers:
        optimizer.step()
    return model, optimizers, optim.state_tensors(model, optimizers)


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("shape", [{}, {"attention": "mha"}, {"feed_forward": "moe"}], ids=str)
def test_shapes_of_the_state_are_known_before_the_first_update(name, shape):
    model, optimizers, tensors = trained_state(name, **shape)
    assert optim.state_shapes(model, optimizers) == {k: t.shape for k, t in tensors.items()}


@pytest.mark.parametrize(("source", "wanted"), [("adamw", "muon"), ("muon", "adamw")])
def test_state_of_another_optimizer_is_an_error_that_names_both(source, wanted):
    _, _, tensors = trained_state(source)
    config = RunConfig(vocab_size=300, optimizer=wanted)
    model = LanguageModel(config)
    optimizers = optim.build_optimizers(model, config)
    with pytest.raises(
        ValueError,
        match=f"is that of {source}, and this run's optimizer is {wanted}: set optimizer to "
        f"{source}, or init_state to weights",
    ):
        optim.load_state_tensors(model, optimizers, tensors)
    assert not any(optimizer.state for optimizer in optimizers)


@pytest.mark.parametrize("change", ["shape", "missing", "unknown"])
def test_state_of_another_model_is_an_error_that_names_a_tensor(change):
    model, optimizers, tensors = trained_state("muon")
    key = "model.embed_tokens.weight/exp_avg"
    if change == "missing":
        del tensors[key]
    else:
        tensors[key if change == "shape" else "model.extra/exp_avg"] = torch.zeros(3)
    named = "model.extra" if change == "unknown" else key
    with pytest.raises(ValueError, match=f"does not fit this model .*{named}"):
        optim.load_state_tensors(model, optimizers, tensors)
