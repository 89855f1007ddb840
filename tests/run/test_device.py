"""Devices that are not here: what is chosen for them, and what they must not be asked to do."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmlib import optim, training
from lmlib.config import RunConfig
from lmlib.errors import UserError
from lmlib.evaluation import token_scores
from lmlib.generation import sampling
from lmlib.model import loss
from lmlib.model.moe import update_router_bias
from lmlib.model.transformer import LanguageModel
from lmlib.run import gradients, updates
from lmlib.run.compiled import check_device
from lmlib.run.device import pick_device, pick_dtype
from lmlib.run.together import check_processes

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("capability, dtype", [((7, 5), "float32"), ((8, 0), "bfloat16")])
def test_bfloat16_is_chosen_only_for_gpus_that_have_units_for_it(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_dtype("auto", GPU) == getattr(torch, dtype)
    assert optim.has_bfloat16(GPU) == (dtype == "bfloat16")  # for Muon's products too
    assert pick_dtype("bfloat16", GPU) == torch.bfloat16  # as asked


def test_other_devices_compute_in_float32():
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("mps")) == torch.float32


def test_mps_must_be_asked_for_and_be_there(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto").type != "mps" and pick_device("mps").type == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch finds no Apple GPU here"):
        pick_device("mps")
    with pytest.raises(UserError, match="cannot share one GPU"):
        check_processes(RunConfig(device="mps"), 2)


class NoFloat64(TorchDispatchMode):
    """Fail at any operation that takes or gives float64, which Apple's GPUs lack."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        leaves = tree_leaves((arguments, options, result))
        dtypes = {x.dtype for x in leaves if isinstance(x, torch.Tensor)}
        dtypes |= {x for x in leaves if isinstance(x, torch.dtype)}
        assert not dtypes & {torch.float64, torch.complex128}, function
        return result


@pytest.mark.parametrize("kind", [{}, {"attention": "mha", "feed_forward": "moe"}])
def test_a_step_on_mps_needs_no_float64(monkeypatch, smoke, kind):
    config = smoke(**kind)
    widest = loss.widest_float(torch.device("mps"))
    for module in (loss, gradients, updates, sampling):
        monkeypatch.setattr(module, "widest_float", lambda device: widest)
    model, ids = LanguageModel(config), torch.arange(65 * 4).view(4, 65) % 512
    optimizers = optim.build_optimizers(model, config)
    found = updates.Updates(torch.device("cpu"), True)
    with NoFloat64():
        batch = ids[:, :-1], ids[:, 1:]
        value = training.accumulate_gradients(model, *batch, 2, 0, 1, torch.float32)
        found_inf = found.add(1, value, gradients.clip_gradients(model, 1.0))
        for optimizer in optimizers:
            optimizer.found_inf = found_inf
            optimizer.step()
        update_router_bias(model, found_inf)
        token_scores(model, *batch)
        sampling.sample_token(model(ids[:, :-1])[:, -1].detach(), 0.5, 1.0, 50, 0.9)
    [update] = found.read()
    assert update.is_finite


def test_float64_is_noticed():
    with pytest.raises(AssertionError, match="aten"), NoFloat64():
        torch.ones(2).double()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("part", ["mlp", "self_attn"])
def test_a_device_that_computes_something_else_is_refused(smoke, tied, part):
    """On a new model, whose output matrices are zero, so that nothing before them shows."""
    config = smoke(tie_word_embeddings=tied)
    model, ids = LanguageModel(config), torch.arange(65 * 2).view(2, 65) % 512
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_device(model, ids[:, :-1], ids[:, 1:])
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert tied or not after["lm_head.weight"].any()
    layer = getattr(model.model.layers[0], part)
    layer = getattr(layer, "o_proj" if part == "self_attn" else "down_proj")
    right = layer.forward
    layer.forward = lambda x: right(x) * 1.1
    with pytest.raises(UserError, match="The logits on cpu differ by .* Set device to cpu"):
        check_device(model, ids[:, :-1], ids[:, 1:])
    layer.forward = lambda x: Wrong.apply(right(x))
    with pytest.raises(UserError, match="The gradient on cpu differ"):
        check_device(model, ids[:, :-1], ids[:, 1:])


class Wrong(torch.autograd.Function):
    """The identity, with a gradient that is not its own."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.5
