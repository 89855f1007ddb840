"""Runs as frames and tables: finished, interrupted, damaged, and still running."""

import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from lmlib.analysis import figures, frames, render
from lmlib.files import PROJECT_ROOT
from lmlib.run.lock import run_status


def write(folder, lines: list[str], **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "config.json").write_text(
        json.dumps({"batch_size": 2, "sequence_length": 8, **config})
    )
    return folder


def step(number: int, loss=5.0, **rest) -> str:
    return (
        json.dumps(
            {
                "kind": "step",
                "step": number,
                "loss": loss,
                "timing": {"seconds": number * 6.0},
                **rest,
            }
        )
        + "\n"
    )


def test_every_record_is_a_row_with_its_cost(trained):
    frame = frames.read_runs(trained.run_dir)
    counts = frame["kind"].value_counts()
    assert [
        counts[kind] for kind in ("step", "eval", "sample", "checkpoint", "profile", "done")
    ] == [20, 5, 5, 4, 1, 1]
    assert {"loss", "learning_rate", "val_loss", "tokens_per_second", "seconds"} <= set(
        frame
    ) and "timing" not in frame
    last = frame.iloc[-1]
    assert (
        last["tokens"] == 20 * 4 * 64
        and last["flops"] == 20 * 4 * 64 * 240_000
        and last["minutes"] == last["seconds"] / 60
    )
    assert frame.attrs["runs"] == {"trained": str(trained.run_dir)}
    notes = frame.attrs["notes"]["trained"]
    assert all(note.startswith("scored on only") for note in notes)


DAMAGED = {
    "no records": ([], ["no records yet"]),
    "infinite": ([step(1, float("inf")), step(2, 1e308)], ["some losses are not finite"]),
    "no loss": (
        [json.dumps({"kind": "step", "step": 1, "train_loss": 5.0}) + "\n"],
        ["its losses have names that this version does not know"],
    ),
    "timing of the wrong kind": (
        ['{"kind": "step", "step": 1, "loss": 5.0, "timing": {"kind": [1], "step": 1e999}}\n'],
        [],
    ),
    "negative standard error": (
        ['{"kind": "eval", "step": 1, "val_loss": 5.0, "val_loss_stderr": -1}\n'],
        [],
    ),
    "no experts": ([step(1, expert_load=[[]])], []),
    "one record": ([step(1)], []),
    "a truncated last line": (
        [step(1), '{"kind": "step", "st'],
        ["1 line of metrics.jsonl cannot be read"],
    ),
    "not numbers": ([step(1, float("nan")), step(2, "nan")], ["some losses are not finite"]),
    "fields of another version": (
        [step(1, surprise={"a": [1]}, loss_2=3), '{"kind": ["x"], "step": 2}\n', '{"epoch": 3}\n'],
        None,
    ),
    "types of another version": (
        [
            step(1, {"value": 5.0}),
            '{"kind": "eval", "step": 2, "val_loss": "low"}\n',
            "5\n[]\nnull\n",
        ],
        None,
    ),
    "numbers out of range": (
        [
            step(1),
            '{"kind": "step", "step": 1e999}\n',
            '{"kind": "eval", "step": 1.5, "val_loss": 1e999}\n',
        ],
        None,
    ),
    "two records on a line": (
        [step(1), step(2).strip() + "," + step(3)],
        ["1 line of metrics.jsonl cannot be read"],
    ),
    "bytes that are not text": (["\x00\x01\n", "\ud7ff\n"], None),
    "lists of the wrong kind": (
        [
            step(1, expert_load=["x"]),
            step(2, expert_load=[[0.5, "y"]]),
            step(3, expert_load=[[1.0]]),
        ],
        [],
    ),
    "samples of the wrong kind": (
        [json.dumps({"kind": "sample", "step": 1, "prompts": "x", "texts": 5}) + "\n"],
        [],
    ),
    "a profile of the wrong kind": (
        [json.dumps({"kind": "profile", "step": 1, "val_loss_by_position": ["x", 2]}) + "\n"],
        [],
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_runs_are_shown_as_far_as_they_can_be_read(name, tmp_path, trained):
    lines, notes = DAMAGED[name]
    folder = write(tmp_path / "damaged", lines, total_steps=9)
    for folders in ([folder], [folder, trained.run_dir]):
        frame = frames.read_runs(folders)
        assert notes is None or frame.attrs["notes"]["damaged"] == notes
        table = frames.results_table(folders)
        assert table.loc["damaged", "state"] == "; ".join(
            ["stopped", *frame.attrs["notes"]["damaged"]]
        )
        assert frames.headline(frame, "damaged").startswith("stopped")
        frames.samples_at(frame)
        for draw in (figures.training_curves, figures.loss_by_position, figures.expert_load):
            draw(frame)
        figures.cost(table)
        assert render.png(figures.training_curves(frame)).startswith(b"\x89PNG")
    assert len(frames.read_runs(trained.run_dir)) == 37  # other runs are not affected


@pytest.mark.parametrize("file", ["config.json", "environment.json", "results.json"])
@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1]",
        '{"sessions": 5, "model": 7}',
        '{"model": {"parameter_count": 1e999, "flops_per_token": "x"}}',
    ],
)
def test_records_are_read_although_other_files_are_damaged(file, content, tmp_path):
    folder = write(tmp_path / "run", [step(1), step(2)])
    (folder / file).write_text(content)
    frame = frames.read_runs(folder)
    assert list(frame["loss"]) == [5.0, 5.0]
    assert len(frames.results_table([folder])) == 1 and frames.resumes(folder) == []
    assert bool(frame.attrs["notes"]["run"]) == (file == "config.json" and '": ' not in content)
    frames.parameters_table([folder])


def test_a_missing_run_is_an_error_and_equal_names_get_their_parent_folder(tmp_path):
    with pytest.raises(ValueError, match=r"There is no run .*nothing"):
        frames.read_runs(tmp_path / "nothing")
    a, b = (write(tmp_path / parent / "same", [step(1)]) for parent in ("a", "b"))
    assert list(frames.results_table([a, b, a]).index) == ["a/same", "b/same"]
    c = write(tmp_path / "x" / "a" / "same", [step(1)])
    assert list(frames.named_folders([a, b, c])) == [
        f"{tmp_path.name}/a/same",
        "b/same",
        "x/a/same",
    ]
    assert frames.find_runs(tmp_path / "x", nested=True) == [c]
    assert frames.find_runs(tmp_path, nested=True) == [a, b, c] and frames.find_runs(
        tmp_path / "a"
    ) == [a]
    assert frames.find_runs(tmp_path) == frames.find_runs(tmp_path / "nothing") == []


def test_parameters_table_shows_only_the_parameters_that_differ(tmp_path):
    a = write(tmp_path / "a", [], seed=0, dropout=0.1, run_name="a")
    b = write(tmp_path / "b", [], seed=1, dropout=0.1, run_name="b", extra="x")
    table = frames.parameters_table([a, b])
    assert table.to_dict("index") == {
        "seed": {"a": 0, "b": 1},
        "extra": {"a": "(not given)", "b": "x"},
    }
    assert {"batch_size", "dropout", "tokenizer"} < set(
        frames.parameters_table([a, b], differences_only=False).index
    )
    c = write(tmp_path / "c", [], seed=1, dropout=0.1, attention="mha")
    ranks = {
        "kv_lora_rank",
        "qk_rope_head_dim",
        "qk_nope_head_dim",
        "v_head_dim",
        "rope_interleave",
        "q_lora_rank",
    }
    table = frames.parameters_table([a, c])
    assert set(table.index) == ranks | {"seed", "attention"} and set(
        table.loc[list(ranks), "c"]
    ) == {"-"}


def evaluated(folder, results: dict, **values):
    record = {"kind": "eval", "step": 2, "val_loss": 5.0, "val_loss_stderr": 0.1, **values}
    write(folder, [json.dumps(record) + "\n"])
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_the_table_shows_documents_and_the_test_scores(tmp_path):
    test = {"test_loss": 5.1, "test_loss_stderr": 0.2, "test_bits_per_byte": 2.5}
    new = evaluated(tmp_path / "new", test | {"test_steps": [2]}, val_documents=7)
    old = evaluated(tmp_path / "old", {})
    one = evaluated(tmp_path / "one", {"test_loss": {}, "test_steps": 5}, val_documents=1)
    table = frames.results_table([new, old, one])
    assert list(table.columns[1:4]) == ["validation loss", "± standard error", "documents"]
    columns = ["± standard error", "documents", *frames.TEST_SCORES]
    rows = table[columns].astype(float).to_numpy().tolist()
    unknown = [math.nan] * 3
    # Older versions took windows for independent: their errors are not shown.
    expected = [[0.1, 7, 5.1, 0.2, 2.5], [math.nan, math.nan, *unknown], [math.nan, 1, *unknown]]
    for row, numbers in zip(rows, expected, strict=True):
        assert row == pytest.approx(numbers, nan_ok=True)
    assert list(table["state"]) == ["finished", "finished", "finished; scored on only 1 document"]


def test_notes_tell_unknown_lineage_and_repeated_tests(tmp_path):
    again = evaluated(tmp_path / "again", {"test_steps": [2, 4]}, val_documents=4)
    child = write(tmp_path / "child", [step(1)], init_from="outputs/parent")
    known = write(tmp_path / "known", [step(1)], init_from="outputs/parent")
    (known / "environment.json").write_text('{"lineage": "complete"}')
    marked = write(tmp_path / "marked", [step(1)])
    (marked / "environment.json").write_text('{"lineage": "unknown"}')
    assert frames.read_runs([again, child, known, marked]).attrs["notes"] == {
        "again": ["scored on only 4 documents", "its test text was scored at 2 steps"],
        "child": ["lineage unknown"],  # an older version trained it from something
        "known": [],
        "marked": ["lineage unknown"],
    }


def test_later_parameters_are_absent_from_older_runs_whatever_the_defaults(tmp_path):
    config = frames.whole_config(write(tmp_path / "old", []))
    absent = {"test_fraction": 0.0, "score_test": False, "keep_checkpoints": None}
    assert {name: config[name] for name in absent} == absent
    assert (
        frames.whole_config(write(tmp_path / "new", [], test_fraction=0.2))["test_fraction"] == 0.2
    )


def test_status_of_a_run_that_runs_is_killed_and_resumes(smoke, tmp_path):
    """A process that trains, is killed by SIGKILL, and is started again."""
    config = smoke(total_steps=100_000, eval_every=50_000, checkpoint_every=10, log_every=1)
    assert not config.run_dir.exists() and run_status(config.run_dir) == "empty"
    pairs = [
        ("output_dir", config.output_dir),
        ("run_name", config.run_name),
        ("total_steps", "100000"),
        ("eval_every", "50000"),
    ]
    command = [sys.executable, "-m", "lmlib", "train", str(PROJECT_ROOT / "params" / "smoke.yaml")]
    command += [
        word
        for pair in [*pairs, ("checkpoint_every", "10"), ("log_every", "1")]
        for word in ("-p", *pair)
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while "Step 25/" not in process.stdout.readline():
            pass
        assert run_status(config.run_dir) == "running"
        assert frames.headline(frames.read_runs(config.run_dir), config.run_name).startswith(
            "running | step "
        )
        process.send_signal(signal.SIGKILL)
    assert run_status(config.run_dir) == "died"
    beat = config.run_dir / "heartbeat.json"
    beat.write_text(
        json.dumps({"machine": "another"})
    )  # on another machine only the heartbeat's age counts
    assert run_status(config.run_dir) == "running"
    beat.write_text("")  # read while it is being renewed
    assert run_status(config.run_dir) == "running"
    os.utime(beat, (time.time() - 60,) * 2)
    assert run_status(config.run_dir) == "died" and platform.node() != "another"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while "Checkpoint saved" not in process.stdout.readline():
            pass
        process.send_signal(signal.SIGTERM)
    assert run_status(config.run_dir) == "stopped" and len(frames.resumes(config.run_dir)) == 1
    marks = figures.marks(frames.read_runs(config.run_dir))
    assert {mark["x0"] for mark in marks if mark["name"] == "resumed"} == set(
        frames.resumes(config.run_dir)
    )


def test_samples_at_returns_the_samples_of_the_last_evaluation(trained):
    frame = frames.read_runs(trained.run_dir)
    first, last = frames.samples_at(frame, 0), frames.samples_at(frame)
    assert [heading for heading, _, _ in first + last] == ["trained, step 0"] * 3 + [
        "trained, step 20"
    ] * 3
    assert [prompt for _, prompt, _ in first] == [prompt for _, prompt, _ in last]
    assert frames.samples_at(frame, 7)[0][0] == "trained, step 5"


def test_the_british_spelling_of_earlier_versions_is_read(tmp_path):
    old = step(1, timing={"seconds": 1.0, "utilisation": 0.5})
    new = step(2, timing={"seconds": 2.0, "utilization": 0.25})
    frame = frames.read_runs(write(tmp_path / "run", [old, new]))
    assert list(frame["utilization"]) == [0.5, 0.25] and "utilisation" not in frame


# ---- All runs under a folder ----


def test_overview_lists_runs_of_sweeps_too_newest_first(tmp_path, trained):
    for name, started in (("a", "2026-01-02T10:00:00Z"), ("sweep/b", "2026-01-03T10:00:00Z")):
        shutil.copytree(trained.run_dir, tmp_path / name)
        file = tmp_path / name / "environment.json"
        known = json.loads(file.read_text())
        known["sessions"][-1]["started"] = started
        file.write_text(json.dumps(known))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text("{}")
    table = frames.overview(tmp_path)
    assert list(table.index) == ["sweep/b", "a", "c"]
    assert list(table["state"]) == ["finished", "finished", "empty"]
    bits = json.loads((trained.run_dir / "results.json").read_text())["val_bits_per_byte"]
    assert table.loc["a", "bits per byte"] == bits and table.loc["a", "total"] == 20
    assert pd.isna(table.loc["c", "date"])
    (tmp_path / "d" / "metrics.jsonl").mkdir(parents=True)
    assert "d" in frames.overview(tmp_path).index
    assert frames.overview(tmp_path / "nothing here").empty


def test_losses_in_other_tokens_are_compared_in_bits_per_byte(tmp_path, trained):
    other = tmp_path / "other"
    shutil.copytree(trained.run_dir, other)
    assert frames.loss_column([trained.run_dir, other]) == ("val_loss", "")
    file = other / "environment.json"
    known = json.loads(file.read_text())
    known["data"]["tokenizer"] = "another"
    file.write_text(json.dumps(known))
    column, warning = frames.loss_column([trained.run_dir, other])
    assert column == "val_bits_per_byte" and "These runs differ in tokenizer" in warning
    assert "other text" not in warning
