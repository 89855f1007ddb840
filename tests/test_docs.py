"""What the pages in docs/ show is executed as it stands there: formulas, commands, a patch."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
import torch
import torch.nn.functional as F
from pyarrow import parquet

import lmlib
from lmlib import optim, training
from lmlib.cli.parser import main
from lmlib.config import RunConfig
from lmlib.data.corpus import corpus_files
from lmlib.data.prepare import prepare
from lmlib.errors import UserError
from lmlib.files import PROJECT_ROOT, read_json
from lmlib.model.attention import rotary_angles
from lmlib.model.huggingface import model_tensors
from lmlib.model.moe import update_router_bias
from lmlib.run.records import read_records

LMLIB = PROJECT_ROOT / "lmlib"


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


# ---- corpus.md ----


@pytest.fixture
def texts(tmp_path, monkeypatch) -> Path:
    """Make the files that the page names, in the current folder."""
    plays = [file.read_text("utf-8") for file in corpus_files("shakespeare")[:8]]
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("\n\n".join(plays[:2]))
    Path("my_texts", "more").mkdir(parents=True)
    Path("my_texts", "a.txt").write_text(plays[3])
    Path("my_texts", "more", "b.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for play in plays[4:] for text in play.split("\n## "))
    )
    rows = [text for play in plays for text in play.split("\n### ")]
    Path("posts.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in rows))
    parquet.write_table(pyarrow.table({"text": rows}), "pages.parquet")
    Path("notes.md").write_text("# Notes\n")
    Path("empty").mkdir()
    Path("latin.txt").write_bytes("café, ".encode("latin-1") * 10)
    Path("broken.jsonl").write_text('{"text": "a"}\n{oops\n')
    Path("numbers.jsonl").write_text('{"text": 3}\n')
    Path("short.txt").write_text(plays[0][:12_000])
    return tmp_path


def test_the_commands_on_corpora_do_what_the_page_says(texts, capsys):
    [commands, network] = blocks("corpus.md", "bash")
    lines = [line.split("  #")[0] for line in commands.splitlines()]
    assert [line.split()[1] for line in lines] == ["data"] * 5 + ["train"]
    for line in lines:
        short = ["-p", "total_steps", "2"] * ("train" in line)
        status = main([*shlex.split(line)[1:], *short, "-p", "output_dir", str(texts / "out")])
        printed = capsys.readouterr().out
        assert status == 0, printed
        assert "Done: 2 steps" in printed if short else "read the training text" in printed
    assert len(list((texts / "out" / ".tokens").glob("*/store.json"))) == 5  # the run built none


def test_the_description_of_shakespeare_is_what_is_printed(outputs, capsys):
    assert main(["data", "quickstart", "-p", "output_dir", str(outputs)]) == 0
    [shown] = blocks("corpus.md", "text")
    assert capsys.readouterr().out.startswith(shown)


def rows_of_table(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, without its first two lines."""
    text = (PROJECT_ROOT / "docs" / page).read_text("utf-8").split(f"\n## {heading}\n")[1]
    lines = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_each_message_about_a_corpus_is_the_one_that_is_raised(texts):
    rows = rows_of_table("corpus.md", "When it does not work")
    corpora = [re.search(r"[\w.]+\.(txt|md|jsonl)|empty", message)[0] for message, _ in rows]
    assert len(rows) == len(set(corpora)) == 8
    for corpus, (message, _) in zip(corpora, rows, strict=True):
        config = RunConfig.load(
            PROJECT_ROOT / "params" / "quickstart.yaml", corpus=corpus, output_dir=texts / "out"
        )
        with pytest.raises(UserError) as raised:
            prepare(config)
        assert message in str(raised.value)


# ---- audit.md ----


def test_every_check_of_the_audit_is_explained():
    """The page has a row for each check of a run and of `lmlib audit`."""
    text = (PROJECT_ROOT / "docs" / "audit.md").read_text("utf-8")
    section = text.split("\n## My run failed a check\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([\w ]+?) \|", section, re.MULTILINE)
    sources = [*(LMLIB / "audit").glob("*.py"), LMLIB / "run" / "preflight.py"]
    source = "".join(file.read_text("utf-8") for file in [*sources, LMLIB / "run" / "run_audit.py"])
    assert {"causality", "init_from"} < set(re.findall(r'Report\("([\w ]+)"', source))
    assert set(re.findall(r'Report\("([\w ]+)"', source)) == set(rows) - {"check"}


# ---- run.md ----


def test_every_kind_of_record_is_explained():
    kinds = [row[0].strip("`") for row in rows_of_table("run.md", "A step")]
    source = (LMLIB / "training.py").read_text("utf-8")
    assert sorted(kinds) == sorted(set(re.findall(r'emit\(run, "(\w+)"', source)))
