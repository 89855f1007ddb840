"""What the pages in docs/ show is executed as it stands there: formulas, commands, a patch."""

import math
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import lmlib
from lmlib import optim, training
from lmlib.files import PROJECT_ROOT, read_json
from lmlib.model.attention import rotary_angles
from lmlib.model.huggingface import model_tensors
from lmlib.model.moe import update_router_bias
from lmlib.run.records import read_records


def blocks(page: str, language: str) -> list[str]:
    """Return a page's code blocks in a language."""
    text = (PROJECT_ROOT / "docs" / page).read_text("utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


# ---- model.md ----


@pytest.fixture(scope="module")
def page() -> SimpleNamespace:
    """Return the functions that the page defines."""
    names = {"torch": torch, "F": F, "math": math}
    for block in blocks("model.md", "python"):
        exec(block, names)
    return SimpleNamespace(**names)


def trained_layer(config) -> tuple[lmlib.LanguageModel, dict[str, torch.Tensor]]:
    """Return the model of a run's checkpoint in float64, and its last layer's weights by name."""
    list(training.train(config))
    model, _ = lmlib.load(config.run_dir)
    model.double()
    start = f"model.layers.{config.num_hidden_layers - 1}."
    tensors = model_tensors(model).items()
    return model, {name.removeprefix(start): t for name, t in tensors if name.startswith(start)}


def part(weights: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Return the weights of one module of a layer."""
    return {key.removeprefix(name): t for key, t in weights.items() if key.startswith(name)}


@pytest.mark.parametrize("interleave", [True, False])
def test_the_attention_formula_is_the_models(page, smoke, interleave):
    config = smoke(total_steps=5, rope_interleave=interleave)
    model, weights = trained_layer(config)
    x = torch.randn(9, config.hidden_size, dtype=torch.float64)
    angles = rotary_angles(torch.arange(9), config.qk_rope_head_dim, config.rope_theta, x.dtype)
    layer = model.model.layers[-1]
    expected = layer.self_attn(x[None], angles)[0]
    assert expected.abs().max() > 1e-4  # its output projection starts at zero
    found = page.attention(x, part(weights, "self_attn."), config)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)
    norm = layer.input_layernorm
    torch.testing.assert_close(page.norm(x, norm.weight).float(), norm(x).float())


def test_the_formula_of_experts_is_the_models(page, smoke):
    model, weights = trained_layer(smoke(total_steps=5, feed_forward="moe", num_experts=5))
    layer = model.model.layers[-1].mlp
    bias = torch.randn(5)  # so that it decides the choice
    layer.gate.e_score_correction_bias.copy_(bias)
    weights["mlp.gate.e_score_correction_bias"] = bias
    tokens = torch.randn(12, model.config.hidden_size, dtype=torch.float64)
    expected = layer(tokens[None])[0]
    found = [page.moe(x, part(weights, "mlp."), model.config.num_experts_per_tok) for x in tokens]
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-5, atol=1e-8)
    layer.gate.load = load = torch.tensor([3, 9, 4, 8, 0])
    model.model.layers = model.model.layers[-1:]
    update_router_bias(model)
    found, expected = page.balance(bias, load.double()), layer.gate.e_score_correction_bias
    torch.testing.assert_close(found, expected, check_dtype=False)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_the_formula_of_muon_is_the_optimizers(page, shape):
    W, m = torch.nn.Parameter(torch.randn(shape)), torch.zeros(shape)
    muon, expected = optim.Muon([W], 0.02, 0.1, momentum=0.9), W.detach()
    for _ in range(3):
        W.grad = torch.randn(shape)
        expected, m = page.muon(expected, W.grad, m, 0.02, 0.9, 0.1)
        muon.step()
    torch.testing.assert_close(W.detach(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.6, 1.0])
def test_the_formula_of_the_schedule_is_the_optimizers(page, decay):
    for n in range(1, 201):
        expected = optim.schedule(n, 200, 0.05, decay)
        assert math.isclose(page.schedule(n, 200, 0.05, decay), expected, abs_tol=1e-12)


# ---- architecture.md ----


def test_the_architecture_of_the_page_trains_and_equals_its_stock_class(tmp_path):
    """Its patch is applied to a copy of the project, where its Python is executed."""
    [patch], [script] = blocks("architecture.md", "diff"), blocks("architecture.md", "python")
    assert len(patch.splitlines()) < 40
    for name in ("lmlib", "notebooks", "params", "pyproject.toml"):
        copy = shutil.copytree if (PROJECT_ROOT / name).is_dir() else shutil.copy
        copy(PROJECT_ROOT / name, tmp_path / name)
    subprocess.run(["git", "apply", "-"], input=patch, text=True, cwd=tmp_path, check=True)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0].split(maxsplit=1) for line in done.stdout.splitlines()[1:]] == [
        ["pass", name] for name in ("causality", "batch independence", "cache", "labels")
    ]
    run_dir = tmp_path / "outputs" / "relu2"
    losses = [record["val_loss"] for record in read_records(run_dir) if record["kind"] == "eval"]
    assert losses[-1] < losses[0] - 0.1
    stock = read_json(run_dir / "checkpoints" / "checkpoint_step_20" / "config.json")
    assert stock["hidden_act"] == "relu2"
    assert read_json(run_dir / "results.json")["audit"]["passed"]
