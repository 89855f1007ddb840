"""The field's own tools on our files: `make ecosystem`, which installs them."""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from models import write_model
from process import start, wait_for

import lmlib
from lmlib.cli.parser import main
from lmlib.config import RunConfig
from lmlib.data.prepare import prepare
from lmlib.files import PROJECT_ROOT, read_mapping
from lmlib.tools import gguf
from lmlib.tools.benchmark import benchmark, cut_items

HAS_LLAMA = shutil.which("node") and (Path(sys.prefix) / "node_modules" / "node-llama-cpp").is_dir()
pytestmark = [
    pytest.mark.ecosystem,
    pytest.mark.skipif(not find_spec("lm_eval"), reason="no ecosystem packages: make ecosystem"),
]
needs_llama = pytest.mark.skipif(not HAS_LLAMA, reason="no llama.cpp: make ecosystem, with node")
PROMPTS = ["My lord, the", "**HAMLET**\nTo be, or", "naïve café — 123's\n\n  'twas\ttwo <|end"]


def llama(file: Path, count: int) -> list[dict]:
    """Return llama.cpp's greedy continuations of PROMPTS."""
    script = PROJECT_ROOT / "tests" / "support" / "llama.mjs"
    command = ["node", script, sys.prefix, file, str(count), json.dumps(PROMPTS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def greedy(folder: Path, count: int) -> list[dict]:
    """Return our greedy continuations of PROMPTS, by whole forward passes."""
    model, tokenizer = lmlib.load(folder)
    found = []
    for prompt in map(tokenizer.encode, PROMPTS):
        ids = list(prompt)
        for _ in range(count):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        new = ids[len(prompt) :]
        found.append({"prompt": prompt, "ids": new, "text": tokenizer.decode(new)})
    return found


@needs_llama
@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"q_lora_rank": 24, "tie_word_embeddings": False},
        {"num_hidden_layers": 27},
        {"num_attention_heads": 3, "rope_theta": 500.0},
        {"attention": "mha"},
        {"attention": "mha", "num_attention_heads": 6, "tie_word_embeddings": False},
    ],
    ids=str,
)
def test_llama_cpp_gives_our_greedy_text(tmp_path, text_file, parameters):
    folder = write_model(tmp_path / "model", text_file.read_text(), **parameters)
    gguf.export(folder, tmp_path / "m.gguf")
    ours, theirs = greedy(folder, 24), llama(tmp_path / "m.gguf", 24)
    assert [of["prompt"] for of in theirs] == [of["prompt"] for of in ours]
    assert [of["ids"] for of in theirs] == [of["ids"] for of in ours]
    assert len({id for of in ours for id in of["ids"]}) > 6  # not one token again and again


# ---- lm-eval ----


@pytest.fixture(scope="module")
def run(outputs) -> RunConfig:
    """Return the config of a finished run with windows as long as quickstart's."""
    config = RunConfig.load(
        PROJECT_ROOT / "params" / "smoke.yaml",
        output_dir=outputs,
        run_name="scored",
        sequence_length=256,
        total_steps=40,
        checkpoint_every=20,
    )
    list(lmlib.train(config))
    return config


def by_task(scores: list[dict]) -> dict:
    return {(score["task"], score["metric"]): score for score in scores}


def as_lm_eval_scores(run: RunConfig) -> float:
    """Return our bits per byte with the end-of-text token before each window, and nowhere else."""
    (model, tokenizer), nats, size = lmlib.load(run.run_dir), 0.0, 0
    for item in cut_items(prepare(run))["run_text"]:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(item["text"])]])
        with torch.no_grad():
            logits = model(ids[:, :-1])[0]
        nats += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        size += len(item["text"].encode())
    return nats / math.log(2) / size


def test_scores_by_checkpoint_agree_with_our_own(run, capsys):
    assert main(["benchmark", str(run.run_dir), "--steps", "all"]) == 0
    shown = capsys.readouterr().out
    files = [run.run_dir / "benchmarks" / f"step_{step}.json" for step in (20, 40)]
    early, late = (by_task(read_mapping(file)["scores"]) for file in files)
    results = read_mapping(run.run_dir / "results.json")
    bits = late["run_text", "bits_per_byte"]
    assert bits["score"] == pytest.approx(results["test_bits_per_byte"], rel=0.02)
    assert bits["score"] == pytest.approx(as_lm_eval_scores(run), rel=1e-4)  # the rest
    assert bits["clusters"] == results["test_documents"] and bits["stderr"] > 0
    assert early["run_text", "bits_per_byte"]["score"] > 1.02 * bits["score"]
    assert late["run_choice", "acc"]["chance"] == 0.25
    assert 0 < late["run_cloze", "acc"]["chance"] < 0.2
    for score in late.values():
        assert f"{score['task']:<16} {score['metric']:<13} {score['score']:>7.4f}" in shown


def test_another_model_has_other_scores(run, tmp_path):
    """The weights in the folder are scored: another model in their place is noticed."""
    folder = run.run_dir / "checkpoints" / "checkpoint_step_40"
    other = shutil.copytree(folder, tmp_path / "planted")
    (other / "checkpoint.json").unlink()
    weights = run.run_dir / "checkpoints" / "checkpoint_step_20" / "model.safetensors"
    shutil.copy(weights, other)
    tasks = ["run_text"]
    [(_, [ours])], [(_, [planted])], [(_, [again])] = (
        list(benchmark(source, [None], tasks, run.run_dir)) for source in (folder, other, folder)
    )
    assert ours == again and planted["score"] != ours["score"]
    assert {**planted, "score": 0, "stderr": 0} == {**ours, "score": 0, "stderr": 0}
    assert not (other / "benchmarks").exists()


def test_a_model_of_another_class_is_scored(run, tmp_path, capsys):
    folder = tmp_path / "gpt2"
    tokenizer = lmlib.load(run.run_dir)[1]
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 256}
    settings = transformers.GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, **sizes)
    transformers.GPT2LMHeadModel(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = ["benchmark", str(folder), "--text", str(run.run_dir), "--tasks", "run_text"]
    assert main(words) == 0 and "run_text" in capsys.readouterr().out
    assert main(words[:2]) == 1
    assert "is a model without text of its own" in capsys.readouterr().err


def test_what_cannot_be_scored(run, smoke, tmp_path, text_file, capsys, monkeypatch):
    text = text_file.read_text()
    maskless = write_model(tmp_path / "maskless", text, causal_mask=False)
    mixed = write_model(tmp_path / "mixed", text, vocab_size=299)
    empty, untested = smoke(), smoke(score_test=False, total_steps=5)
    list(lmlib.train(untested))
    empty.run_dir.mkdir(parents=True)
    own = ["--text", str(run.run_dir), "--tasks", "run_text"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for words, said in [
        (
            [run.run_dir, "--tasks", "run_clozes"],
            "run_clozes is not a task; did you mean run_cloze",
        ),
        ([run.run_dir, "--steps", "30"], "no checkpoint of step 30"),
        ([empty.run_dir], "neither a run with checkpoints"),
        ([empty.run_dir, "--steps", "all"], "has no checkpoints"),
        ([untested.run_dir], "has no test score"),
        ([maskless, *own], "lm-eval would score another model"),
        ([mixed, *own], "has 300 tokens, and its model rows for 299"),
        ([run.run_dir, "--tasks", "lambada_openai"], "is there a network?"),
    ]:
        assert main(["benchmark", *map(str, words)]) == 1
        assert said in capsys.readouterr().err


# ---- transformers serve ----


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


@pytest.fixture
def served(run, tmp_path) -> Path:
    """Return a copy of a checkpoint whose tokenizer has a chat template."""
    folder = shutil.copytree(run.run_dir / "checkpoints" / "checkpoint_step_40", tmp_path / "chat")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    (folder / "checkpoint.json").unlink()  # which does not list the template
    return folder


@pytest.fixture
def server(served, tmp_path) -> Iterator[tuple[list[str], dict[str, str], int]]:
    """Serve the copy; yield the command, its environment and the port."""
    folder, port = served, free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    command += ["--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    (tmp_path / "hub").mkdir()  # without it /v1/models fails
    log = tmp_path / "log"
    process = start(log, *command, env=environment)
    try:
        wait_for(process, log, "Uvicorn running")
        yield command, environment, port
    finally:
        process.terminate()
        process.wait()


def test_a_checkpoint_is_served(served, server, capsys):
    command, environment, port = server
    folder = str(served)
    model, tokenizer = lmlib.load(folder)
    [ours] = lmlib.generate(model, tokenizer, ["My lord, the"], max_new_tokens=30, temperature=0)

    page = (PROJECT_ROOT / "docs" / "ecosystem.md").read_text()
    [script] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    script = script.replace("outputs/quickstart/checkpoints/checkpoint_step_1000", folder)
    assert len(list(filter(None, script.splitlines()))) == 5
    names: dict = {}
    exec(script.replace("8000", str(port)), names)
    assert capsys.readouterr().out == ours + "\n"

    def ask(**options):
        asked = {"model": folder, "prompt": "My lord, the", "temperature": 0, "max_tokens": 30}
        return names["client"].completions.create(**asked, **options)

    pieces = [event.choices[0].text for event in ask(stream=True)]
    assert len(pieces) > 10 and "".join(pieces) == ours
    stopped = ask(stop=ours[10:12]).choices[0]
    assert stopped.finish_reason == "stop"
    assert ours.startswith(stopped.text) and len(stopped.text) < len(ours)
    chat = names["client"].chat.completions.create(
        model=folder,
        messages=[{"role": "user", "content": "Who's there?"}],
        temperature=0,
        max_tokens=30,
    )
    turn = "user: Who's there?\n"
    [answer] = lmlib.generate(model, tokenizer, [turn], max_new_tokens=30, temperature=0)
    assert chat.choices[0].message.content == answer.removeprefix(turn)
    assert names["client"].models.list().data == []  # of the hub cache folder, which is empty
    second = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert second.returncode != 0 and "address already in use" in second.stderr
