"""lmlib clean: what no run uses is found, shown and deleted; nothing else is touched."""

import json
import os
import subprocess
import sys
import time

import pexpect
import pytest
from filelock import FileLock

import lmlib
from lmlib.checkpoint import checkpoint_steps
from lmlib.config import RunConfig
from lmlib.files import PROJECT_ROOT
from lmlib.run.clean import delete, find_leftovers
from lmlib.run.lock import hold_lock

KEYS = [digit * 24 for digit in "0123456789ab"]
SMOKE = PROJECT_ROOT / "params" / "smoke.yaml"


def write_store(folder, **info):
    folder.mkdir(parents=True)
    (folder / "train.bin").write_bytes(bytes(1000))
    (folder / "store.json").write_text(json.dumps(info))
    return folder


def write_run(run_dir, **environment):
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text("{}")
    (run_dir / "environment.json").write_text(json.dumps(environment))
    return run_dir


def found(output_dir) -> dict[str, str]:
    """Return what is found, with the reasons."""
    leftovers = find_leftovers(output_dir)
    return {str(item.path.relative_to(output_dir)): item.why for item in leftovers}


def clean(*arguments, **options):
    command = [sys.executable, "-m", "lmlib", "clean", *map(str, arguments)]
    options = {"cwd": PROJECT_ROOT, "capture_output": True, "text": True, **options}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_stores_are_unused_if_no_run_names_them(tmp_path):
    tokens = tmp_path / ".tokens"
    for key in KEYS[:3]:
        write_store(tokens / key, sha256={"train.bin": key})
    write_run(tmp_path / "new", tokens=KEYS[0])
    write_run(tmp_path / "old", fingerprints={"train.bin": KEYS[1]})
    write_run(tmp_path / "broken").joinpath("environment.json").write_text("{")
    write_store(tmp_path / "sweeps" / "rates" / ".tokens" / KEYS[3])
    write_store(tmp_path / "sweeps" / "rates" / ".tokens" / KEYS[4])
    write_run(tmp_path / "sweeps" / "rates" / "rate0.1", tokens=KEYS[4])
    (tokens / "notes.txt").write_text("mine")
    (tokens / "mine").mkdir()
    why = "tokens that no run uses"
    assert found(tmp_path) == {
        f".tokens/{KEYS[2]}": why,
        f"sweeps/rates/.tokens/{KEYS[3]}": why,
    }
    [store, _] = find_leftovers(tmp_path)
    assert store.size == 1000 + (tokens / KEYS[2] / "store.json").stat().st_size


def test_stores_that_are_linked_or_may_be_about_to_be_used_are_kept(tmp_path):
    write_store(tmp_path / "shared" / KEYS[0])
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".tokens").symlink_to(tmp_path / "shared", target_is_directory=True)
    (tmp_path / "b" / ".tokens").mkdir(parents=True)
    (tmp_path / "b" / ".tokens" / KEYS[0]).symlink_to(tmp_path / "shared" / KEYS[0])
    assert found(tmp_path) == {}
    store = write_store(tmp_path / "c" / ".tokens" / KEYS[1])
    run_dir = tmp_path / "c" / "starting"
    run_dir.mkdir()
    (run_dir / "config.json").write_text("{}")
    with hold_lock(run_dir):
        assert found(tmp_path) == {}
    assert list(found(tmp_path)) == [f"c/.tokens/{KEYS[1]}"]
    elsewhere = write_run(tmp_path / "disk" / "moved", tokens=KEYS[1])
    (tmp_path / "c" / "linked").symlink_to(elsewhere, target_is_directory=True)
    assert found(tmp_path / "c") == {} and store.exists()


def test_drafts_are_found_once_their_builder_is_gone(tmp_path):
    tokens = tmp_path / ".tokens"
    drafts = {
        "new": f"{KEYS[0]}.draft-x1",
        "old": f"{KEYS[2]}.1234-01234567",
        "aged": f"{KEYS[3]}.1234-01234567",
        "damaged": f"{KEYS[4]}.damaged",
        "kept": f"{KEYS[1]}.draft-shards",
        "forgotten": f"{KEYS[2]}.draft-shards",
    }
    for name in drafts.values():
        write_store(tokens / name)
    long_ago = time.time() - 2 * 24 * 60 * 60
    os.utime(tokens / drafts["aged"], (long_ago, long_ago))
    long_ago -= 6 * 24 * 60 * 60
    os.utime(tokens / drafts["forgotten"], (long_ago, long_ago))
    with FileLock(tokens / f"{KEYS[0]}.lock"):  # it is being built
        building = sorted(found(tmp_path))
    assert building == [f".tokens/{drafts[name]}" for name in ("forgotten", "aged", "damaged")]
    names = ("new", "forgotten", "aged", "damaged")
    assert sorted(found(tmp_path)) == [f".tokens/{drafts[name]}" for name in names]


@pytest.fixture
def littered(tmp_path) -> RunConfig:
    """A finished run with what kills leave behind, and its token store, which it names."""
    config = RunConfig.load(SMOKE, output_dir=tmp_path, run_name="run", total_steps=5)
    list(lmlib.train(config))
    for name in (".draft_step_9", ".deleted_step_1", ".draft_step_9/training_state"):
        (config.run_dir / "checkpoints" / name).mkdir()
    (config.run_dir / ".results.json.draft").write_text("{")
    (config.run_dir / "evaluations").mkdir(exist_ok=True)
    (config.run_dir / "evaluations" / ".validation_step_5.json.draft").write_text("{")
    return config


LITTER = {
    "run/checkpoints/.draft_step_9",
    "run/checkpoints/.deleted_step_1",
    "run/.results.json.draft",
    "run/evaluations/.validation_step_5.json.draft",
}


def test_clean_shows_first_and_deletes_what_it_showed(littered, tmp_path):
    store = write_store(tmp_path / ".tokens" / KEYS[0])
    before = sorted(tmp_path.rglob("*"))
    shown = clean(tmp_path)
    names = {*LITTER, f".tokens/{KEYS[0]}"}
    assert all(f"  {name}  (" in shown for name in names)
    assert "Nothing is deleted. To delete these: lmlib clean --yes" in shown
    assert sorted(tmp_path.rglob("*")) == before
    assert f"Deleted: {len(names)}." in clean(tmp_path, "--yes")
    gone = {tmp_path / name for name in names}
    locks = {store.with_name(f"{KEYS[0]}.lock")}
    left = [path for path in before if not any(path.is_relative_to(name) for name in gone)]
    assert set(tmp_path.rglob("*")) - locks == set(left)
    assert "There is nothing to delete" in clean(tmp_path)
    assert checkpoint_steps(littered.run_dir) == [5]


def test_clean_asks_on_a_terminal(littered, tmp_path):
    arguments = ["-m", "lmlib", "clean", str(tmp_path)]
    for answer, outcome in (("", "Nothing is deleted."), ("y", "Deleted: 4.")):
        child = pexpect.spawn(sys.executable, arguments, cwd=str(PROJECT_ROOT), timeout=60)
        child.expect_exact("Delete? [y/N] ")
        child.sendline(answer)
        child.expect_exact(outcome)
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 0


def test_a_running_run_is_left_alone(littered, tmp_path):
    leftovers = find_leftovers(tmp_path)
    assert {str(item.path.relative_to(tmp_path)) for item in leftovers} == LITTER
    with hold_lock(littered.run_dir):
        assert find_leftovers(tmp_path) == []
        assert delete(tmp_path, leftovers) == leftovers  # it has started since they were found
    (littered.run_dir / "heartbeat.json").write_text('{"machine": "another"}')
    assert find_leftovers(tmp_path) == []
    (littered.run_dir / "heartbeat.json").unlink()
    assert delete(tmp_path, leftovers) == [] == find_leftovers(tmp_path)


def test_a_store_in_use_since_it_was_found_is_kept(tmp_path):
    store = write_store(tmp_path / ".tokens" / KEYS[0])
    [leftover] = find_leftovers(tmp_path)
    assert not (tmp_path / ".tokens" / f"{KEYS[0]}.lock").exists()  # looking leaves nothing
    with FileLock(tmp_path / ".tokens" / f"{KEYS[0]}.lock"):
        assert delete(tmp_path, [leftover]) == [leftover] and store.exists()
    run_dir = write_run(tmp_path / "started", tokens=KEYS[0])
    assert delete(tmp_path, [leftover]) == [leftover] and store.exists()
    (run_dir / "environment.json").unlink()
    assert delete(tmp_path, [leftover]) == [] and not store.exists()


def test_a_folder_that_is_missing_is_named(tmp_path):
    command = [sys.executable, "-m", "lmlib", "clean", str(tmp_path / "gone")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT_ROOT)
    assert done.returncode == 1 and "There is no folder" in done.stderr
