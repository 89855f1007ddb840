"""Several processes on gloo: the same bits as one, and what happens when one of them ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fingerprint import fingerprint
from process import SMOKE, command, start, wait_for

import lmlib
from lmlib import distributed
from lmlib.checkpoint import checkpoint_steps
from lmlib.config import RunConfig
from lmlib.errors import UserError
from lmlib.files import PROJECT_ROOT
from lmlib.run.together import check_processes

EXACT = {"deterministic": True, "micro_batch_size": 1, "batch_size": 8, "total_steps": 6}
EXACT |= {"eval_every": 3, "checkpoint_every": 3, "validation_windows": 5, "dropout": 0.1}
VARIANTS = {
    "muon": {**EXACT, "grad_clip": 0.05},  # below every norm, so that clipping is active
    "moe": {**EXACT, "feed_forward": "moe"},
    "adamw": {**EXACT, "optimizer": "adamw", "micro_batch_size": 2, "learning_rate": 0.001},
}
# The variant in which a fault is planted, and the number of processes that can show it.
FAULTS = {"all_reduce": ("muon", 4), "dropout": ("muon", 4), "router": ("moe", 4)}
FAULTS["order"] = ("muon", 2)  # of the rounds, of which four processes have two


def train_together(folder: Path, processes: int, runs: list[dict]):
    """Train runs one after the other in one launch of so many processes."""
    runs = [{"output_dir": str(folder), **run} for run in runs]
    script = [sys.executable, "tests/support/together.py", json.dumps(runs)]
    script += [str(processes)] if processes > 1 else []
    done = subprocess.run(script, cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def by_count(tmp_path_factory) -> dict[int, Path]:
    """Return the folder of the variants' runs by number of processes."""
    folders = {}
    for count in (1, 2, 4):
        folders[count] = tmp_path_factory.mktemp(f"processes-{count}")
        runs = [{"run_name": name, **changes} for name, changes in VARIANTS.items()]
        runs += [
            {"run_name": f"planted-{fault}", "plant": fault, **VARIANTS[name]}
            for fault, (name, shown_by) in FAULTS.items()
            if shown_by == count
        ]
        train_together(folders[count], count, runs)
    return folders


@pytest.mark.parametrize("name", VARIANTS)
def test_one_two_and_four_processes_give_the_same_bits(by_count, name):
    one, two, four = (fingerprint(by_count[count] / name) for count in (1, 2, 4))
    assert len(one["tensors"]) == 4 and len(one["metrics"]) > 6
    assert one == two == four


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_changes_the_bits(by_count, fault):
    name, count = FAULTS[fault]
    whole, planted = (by_count[count] / run for run in (name, f"planted-{fault}"))
    assert fingerprint(planted)["tensors"] != fingerprint(whole)["tensors"]


def test_no_file_but_the_environment_tells_the_number_of_processes(by_count):
    def names(folder: Path) -> set[str]:
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}

    assert names(by_count[1] / "muon") == names(by_count[4] / "muon")
    for name in ("config.json", "checkpoints/checkpoint_step_6/config.json"):
        texts = [(by_count[n] / "muon" / name).read_text() for n in (1, 4)]
        assert texts[0].replace(str(by_count[1]), "") == texts[1].replace(str(by_count[4]), "")


def test_the_number_of_processes_may_change_in_the_middle(by_count, tmp_path):
    for count, leave_at in ((2, 2), (1, 4), (4, None)):
        train_together(
            tmp_path, count, [{"run_name": "muon", **VARIANTS["muon"], "leave_at": leave_at}]
        )
    changed, whole = fingerprint(tmp_path / "muon"), fingerprint(by_count[1] / "muon")
    assert changed["results"] == whole["results"]
    last = "checkpoints/checkpoint_step_6/"
    assert {k: v for k, v in changed["tensors"].items() if k.startswith(last)} == {
        k: v for k, v in whole["tensors"].items() if k.startswith(last)
    }
    sessions = json.loads((tmp_path / "muon" / "environment.json").read_text())["sessions"]
    assert [session["from_step"] for session in sessions] == [0, 2, 4]


def test_without_deterministic_the_losses_are_close(tmp_path):
    changes = {"run_name": "plain", "total_steps": 50, "batch_size": 4, "dropout": 0.0}
    changes |= {"checkpoint_every": 50, "eval_every": 50}
    losses = []
    for count in (1, 2):
        train_together(tmp_path / str(count), count, [changes])
        lines = (tmp_path / str(count) / "plain" / "metrics.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        losses.append([line["loss"] for line in found if line["kind"] == "step"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 50


# ---- What goes wrong ----


def launched(folder: Path, name: str, *words: str, **changes) -> list[str]:
    changes = {**EXACT, "total_steps": 200, "checkpoint_every": 50, "eval_every": 50, **changes}
    parameters = {"output_dir": folder, "run_name": name, **changes}
    return [*command("train", **parameters), "--processes", "2", *words]


def workers(launcher: subprocess.Popen) -> dict[int, int]:
    """Return the process ids of the launcher's processes by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = dict(
                part.split("=", 1)
                for part in (folder / "environ").read_text().split("\0")
                if "=" in part
            )
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError):
            continue
        if parent == launcher.pid and "RANK" in variables:
            found[int(variables["RANK"])] = int(folder.name)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = subprocess.run(launched(folder, "run"), cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return fingerprint(folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_started_again_and_no_bit_differs(tmp_path, undisturbed, rank):
    log = tmp_path / "log"
    process = start(log, *launched(tmp_path, "run", "--restarts", "1"))
    wait_for(process, log, "Step 67/200")
    os.kill(workers(process)[rank], signal.SIGKILL)
    assert process.wait(180) == 0, log.read_text()
    text = log.read_text()
    assert "Starting again from the newest checkpoint (restart 1 of 1)" in text
    assert "Resuming from step 50 of 200" in text and "Traceback" not in text
    assert fingerprint(tmp_path / "run") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["launcher", "rank 0", "rank 1", "stop file"])
def test_a_request_to_stop_saves_one_step_and_is_not_started_again(tmp_path, undisturbed, whom):
    log = tmp_path / "log"
    process = start(log, *launched(tmp_path, "run", "--restarts", "3"))
    wait_for(process, log, "Step 3/200")
    if whom == "stop file":
        (tmp_path / "run" / "stop").touch()
    else:
        pid = process.pid if whom == "launcher" else workers(process)[int(whom[-1])]
        os.kill(pid, signal.SIGTERM)
    assert process.wait(180) == 130, log.read_text()
    [step] = checkpoint_steps(tmp_path / "run")
    assert 3 <= step < 200 and "Starting again" not in log.read_text()
    assert log.read_text().count("The checkpoint is saved") == 1
    again = subprocess.run(launched(tmp_path, "run"), cwd=PROJECT_ROOT, capture_output=True)
    assert again.returncode == 0
    assert fingerprint(tmp_path / "run")["results"] == undisturbed["results"]


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_process_behind(tmp_path):
    log = tmp_path / "log"
    process = start(log, *launched(tmp_path, "run", total_steps=100_000, checkpoint_every=50_000))
    wait_for(process, log, "Step 3/")
    pids = workers(process).values()
    process.kill()
    process.wait()
    until = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"learning_rate": 1e30}, "is not finite"),
        ({"corpus": "no/such/file.txt"}, "no/such/file.txt"),
        ({"init_from": "no/such/run"}, "no/such/run"),
    ],
)
def test_an_error_is_said_once_and_not_started_again(tmp_path, changes, sentence):
    words = launched(tmp_path, "run", "--restarts", "3", **changes)
    done = subprocess.run(words, cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.count("Error:") == 1 and sentence in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "Starting again" not in done.stderr


@pytest.mark.slow
def test_a_run_that_is_held_elsewhere_is_refused_by_all(tmp_path):
    log = tmp_path / "log"
    holder = start(log, *launched(tmp_path, "run", total_steps=100_000, checkpoint_every=50_000))
    wait_for(holder, log, "Step 3/")
    words = launched(tmp_path, "run", total_steps=100_000, checkpoint_every=50_000)
    done = subprocess.run(words, cwd=PROJECT_ROOT, capture_output=True, text=True)
    holder.kill()
    holder.wait()
    assert done.returncode == 1
    assert done.stderr.count("is being written by process") == 1, done.stderr


def test_one_process_follows_those_that_train(tmp_path, by_count):
    """`lmlib.train` with `processes` yields what the others record; leaving it saves the run."""
    config = RunConfig.load(
        SMOKE, output_dir=str(tmp_path), run_name="muon", processes=2, **VARIANTS["muon"]
    )
    records = lmlib.train(config)
    for record in records:
        if record.kind == "step" and record.step == 2:
            break
    records.close()
    [left] = checkpoint_steps(config.run_dir)
    rest = list(lmlib.train(config))
    assert [r.step for r in rest if r.kind == "step"] == [*range(left + 1, 7)]
    assert rest[-1].kind == "done"
    whole = fingerprint(by_count[1] / "muon")
    assert fingerprint(config.run_dir)["results"] == whole["results"]
    assert fingerprint(config.run_dir)["metrics"] == whole["metrics"]
    [done] = lmlib.train(config)
    assert done.kind == "done"


def test_what_the_processes_say_is_raised_where_they_are_followed(tmp_path):
    config = RunConfig.load(SMOKE, output_dir=str(tmp_path), processes=3, batch_size=4)
    with pytest.raises(UserError, match=r"^3 processes cannot share 4 windows"):
        list(lmlib.train(config))


@pytest.mark.parametrize(
    ("changes", "count", "sentence"),
    [
        ({"batch_size": 6}, 4, r"4 processes cannot share 6 windows .*: use 1, 2, 3, 6, or"),
        (
            {"batch_size": 12, "micro_batch_size": 2, "deterministic": True},
            4,
            r"cannot share 6 micro-batches of 2 windows equally: use 1, 2, or",
        ),
        ({"deterministic": True, "micro_batch_size": 1}, 3, "another power of two"),
        ({"deterministic": True}, 2, "need a micro_batch_size.* as in 4"),
    ],
)
def test_processes_that_cannot_share_the_batch_are_refused(changes, count, sentence):
    with pytest.raises(UserError, match=sentence):
        check_processes(RunConfig(**changes), count)


def test_one_process_needs_no_group():
    assert (distributed.rank(), distributed.world_size(), distributed.is_first()) == (0, 1, True)
    assert distributed.gather({"a": 1}) == [{"a": 1}]
    assert list(distributed.deal("abc")) == [(0, "a"), (1, "b"), (2, "c")]
    assert distributed.first_reason("stop") == "stop"
    with pytest.raises(UserError, match="once"):
        distributed.agree(lambda: (_ for _ in ()).throw(UserError("once")))
