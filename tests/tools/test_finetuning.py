"""docs/finetuning.md: every command and block, at a smaller size, with peft and trl."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from pages import blocks, replaced, run

import lmlib
from lmlib.data.corpus import corpus_files
from lmlib.files import PROJECT_ROOT, read_mapping

pytestmark = [
    pytest.mark.ecosystem,
    pytest.mark.skipif(not find_spec("trl"), reason="no ecosystem packages: make ecosystem"),
]
PAGE = "finetuning.md"
SMALL = " -p total_steps 3 -p checkpoint_every 3 -p validation_windows 4"
PARENT = {"checkpoint_step_1000": "checkpoint_step_3"}


@pytest.fixture(scope="module")
def place(tmp_path_factory, text_file) -> Path:
    """Return a folder with a parent of quickstart's shape and another play as one's own text."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "outputs").mkdir()
    (folder / "my_texts").mkdir()
    [play] = [file for file in corpus_files("shakespeare") if file.name == "macbeth.md"]
    (folder / "my_texts" / "letters.txt").write_text(play.read_text()[:60_000])
    run(f"lmlib train quickstart -p corpus {text_file} {SMALL}", folder)
    return folder


def check_same_logits(folder: Path):
    """Compare the logits of lmlib and stock transformers: in float64, since float32 rounds."""
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    model, tokenizer = lmlib.load(folder)
    ids = torch.tensor([tokenizer.encode("To be, or not to be, that is the question.")])
    with torch.no_grad():
        ours, theirs = model(ids), stock(ids).logits
        torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=2e-5)
        torch.testing.assert_close(model.double()(ids), theirs, rtol=0, atol=1e-12)


def commands() -> list[str]:
    lines = [line for block in blocks(PAGE, "bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("lmlib ")]


def test_the_page_has_what_these_tests_run():
    assert len(commands()) == 4 and len(blocks(PAGE, "python")) == 2
    pins = (PROJECT_ROOT / "requirements-ecosystem.txt").read_text().split()
    installed = [b.split()[-1] for b in blocks(PAGE, "bash") if b.startswith(".venv/bin/pip")]
    assert len(installed) == 2 and set(installed) <= set(pins)


def test_own_text(place):
    train, generate, *_ = commands()
    assert "A new run of 3 steps in" in run(train + SMALL, place)
    results = read_mapping(place / "outputs" / "mine" / "results.json")
    assert results["lineage"] == "complete" and results["audit"]["passed"]
    assert "Generated: My lord, the" in run(generate, place)


def test_lora(place):
    script = replaced(blocks(PAGE, "python")[0], {**PARENT, "range(100)": "range(3)"})
    assert "trainable params: " in run(script, place)
    merged = place / "outputs" / "lora"
    parent = place / "outputs" / "quickstart" / "checkpoints" / "checkpoint_step_3"
    before, after = (lmlib.load(folder)[0].state_dict() for folder in (parent, merged))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("_proj" in name or "_a_" in name for name in changed)
    check_same_logits(merged)
    assert "Generated: My lord, the" in run(commands()[2], place)


def test_instruct_tuning(place):
    run(replaced(blocks(PAGE, "python")[1], PARENT), place)
    chat = place / "outputs" / "chat"
    check_same_logits(chat)
    for question, answer in [
        ("Who are you?", "A model of plays."),
        ("What is the time?", "It is late."),
    ]:
        said = run(commands()[3], place, f"{question}\n")
        assert f"🤖 {answer}\n(" in said and "end-of-text token" in said
    # The folder stays a parent, whose training history is unknown.
    again = f"lmlib train quickstart -p init_from outputs/chat -p corpus my_texts -p run_name again{SMALL}"
    run(again, place)
    results = read_mapping(place / "outputs" / "again" / "results.json")
    assert results["lineage"] == "unknown"
    shutil.rmtree(place / "outputs" / "again")
