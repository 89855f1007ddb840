"""A run is what its folder says: it moves between folders, machines and versions of the library."""

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from fingerprint import fingerprint

import lmlib
from lmlib import checkpoint, config
from lmlib.analysis import frames
from lmlib.run.run_audit import audit
from lmlib.run.start import find_start, greeting


def stop_at(run_config, step: int):
    run = lmlib.train(run_config)
    for record in run:
        if record.step == step:
            break
    run.close()


@pytest.fixture
def moved(smoke, tmp_path):
    """Return (config of a whole run, config of the same run: stopped, then moved with its text)."""
    texts = [f"Document {n} says {n * n} and then {n * 31}. " * 9 for n in range(80)]
    home = tmp_path / "home"
    home.mkdir()
    corpus = home / "c.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    whole = smoke(corpus=str(corpus), output_dir=home / "outputs", allow_leaks=True)
    list(lmlib.train(whole))
    part = replace(whole, run_name="part")
    stop_at(part, 7)
    away = tmp_path / "away"
    (away / "runs").mkdir(parents=True)
    shutil.move(part.run_dir, away / "runs" / "renamed")
    shutil.copy(corpus, away / "text.jsonl")
    away_config = replace(
        part, run_name="renamed", output_dir=str(away / "runs"), corpus=str(away / "text.jsonl")
    )
    return whole, away_config


def test_a_moved_run_loads_is_audited_and_resumes_bit_for_bit(moved):
    whole, away = moved
    assert lmlib.load(away.run_dir)[0].config.hidden_size == 32
    list(lmlib.train(away))
    ours, theirs = fingerprint(away.run_dir), fingerprint(whole.run_dir)
    del ours["results"], theirs["results"]  # which name the corpus
    assert ours == theirs
    verdicts = {report.check: report for report in audit(away.run_dir)}
    assert verdicts["record"].passed is True


def test_a_moved_run_whose_text_differs_says_what_differs(moved):
    _, away = moved
    text = Path(away.corpus)
    text.write_text(text.read_text().replace("then", "than", 1))
    with pytest.raises(ValueError, match=r"The data of this run have changed \(training"):
        list(lmlib.train(away))
    (away.run_dir / "environment.json").unlink()  # the checkpoint knows it too
    with pytest.raises(ValueError, match=r"The data of this run have changed \(tokens\)"):
        list(lmlib.train(away))


def test_other_defaults_leave_old_runs_theirs(smoke, monkeypatch):
    """What a later version of the library does: it changes a default and adds a parameter."""
    run = smoke(total_steps=8, checkpoint_every=4)
    stop_at(run, 4)
    key = run.key()
    for field in ("learning_rate", "weight_decay"):
        default = config.RunConfig.__dataclass_fields__[field].default
        monkeypatch.setattr(config.RunConfig.__dataclass_fields__[field], "default", default * 0.5)
    assert lmlib.RunConfig.recorded(run.run_dir).key() == key
    again = lmlib.RunConfig.load(run.run_dir / "config.json")
    assert again.learning_rate == 0.01
    assert lmlib.load(run.run_dir, 4)[0] is not None
    assert list(lmlib.train(again))[-1].kind == "done"


@pytest.fixture
def first_format(tmp_path):
    """Return the folder of a run that the first format's code left at step 4 of 6."""
    archive = Path(__file__).parents[1] / "support" / "format1.tar.gz"
    with tarfile.open(archive) as files:
        files.extractall(tmp_path / "outputs", filter="data")
    return tmp_path / "outputs" / "old"


def test_a_run_of_the_first_format_is_read(first_format):
    model, tokenizer = lmlib.load(first_format)
    assert lmlib.generate(model, tokenizer, ["abc"], max_new_tokens=3)
    assert (
        json.loads(
            (first_format / "checkpoints" / "checkpoint_step_4" / "checkpoint.json").read_text()
        )["format"]
        == 1
    )
    table = frames.results_table(first_format)
    assert table["steps"].iloc[0] == 4 and table["validation loss"].iloc[0] > 0
    recorded = lmlib.RunConfig.recorded(first_format)
    assert recorded.test_fraction == 0 and recorded.score_test is False


def test_a_run_of_the_first_format_resumes_and_says_what_is_not_exact(first_format):
    corpus = first_format.parent / "corpus.jsonl"
    run = lmlib.RunConfig.load(
        first_format / "config.json", output_dir=str(first_format.parent), corpus=str(corpus)
    )
    assert "Resuming from step 4 of 6" in greeting(find_start(run))
    with pytest.warns(UserWarning) as warned:
        records = list(lmlib.train(run))
    said = [str(warning.message) for warning in warned]
    assert any("arithmetic version 1, now 3" in text for text in said)
    assert records[-1].kind == "done" and "test_loss" not in records[-1].values
    steps = checkpoint.checkpoint_steps(first_format)
    assert steps == [2, 4, 6]
    results = json.loads((first_format / "results.json").read_text())
    assert results["lineage"] == "complete"  # it began at random weights


def test_a_run_of_the_first_format_refuses_other_text(first_format):
    corpus = first_format.parent / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("a", "b", 1))
    run = lmlib.RunConfig.load(
        first_format / "config.json", output_dir=str(first_format.parent), corpus=str(corpus)
    )
    with pytest.raises(ValueError, match="The data of this run have changed"):
        list(lmlib.train(run))
