"""The lock: one writer, its pid beside it, and no POSIX-only import."""

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from lmlib.files import PROJECT_ROOT
from lmlib.run import lock
from lmlib.run.lock import hold_lock, is_running, lock_holder, stop_requests


def test_lock_names_its_holder_and_is_free_afterwards(tmp_path):
    run_dir = tmp_path / "run"
    assert lock_holder(run_dir) is None and not (tmp_path / ".locks").exists()
    with hold_lock(run_dir):
        assert lock_holder(run_dir) == f"{os.getpid()} on {platform.node()}"
        refused = pytest.raises(ValueError, match=f"being written by process {os.getpid()} on")
        with refused, hold_lock(run_dir):
            pass
    assert lock_holder(run_dir) is None
    with hold_lock(run_dir):
        pass


@contextmanager
def looking(run_dir):
    """Another process that looks at the lock without pause."""
    look = "import sys; from pathlib import Path; from lmlib.run.lock import lock_holder\n"
    look += "print(flush=True)\nwhile True: lock_holder(Path(sys.argv[1]))"
    with hold_lock(run_dir):  # so that there is a lock file
        pass
    with subprocess.Popen([sys.executable, "-c", look, run_dir], stdout=subprocess.PIPE) as watcher:
        try:
            watcher.stdout.readline()
            yield
        finally:
            watcher.kill()


def test_looking_at_a_lock_never_refuses_its_next_holder(tmp_path):
    """`lock_holder` takes the lock for an instant; `hold_lock` waits that long."""
    with looking(tmp_path / "run"):
        for _ in range(50):
            with hold_lock(tmp_path / "run"):
                pass


def test_two_processes_that_look_do_not_see_each_other_as_the_holder(tmp_path):
    with looking(tmp_path / "run"):
        assert {lock_holder(tmp_path / "run") for _ in range(100)} == {None}


def test_a_locked_run_and_one_that_beats_elsewhere_are_running(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    assert not is_running(run_dir)
    with hold_lock(run_dir):
        assert is_running(run_dir)
    (run_dir / "heartbeat.json").write_text('{"machine": "another"}')
    assert is_running(run_dir)


def test_a_run_is_taken_once_the_heartbeat_of_another_machine_is_stale(tmp_path, monkeypatch):
    beat, run_dir = tmp_path / "run" / "heartbeat.json", tmp_path / "run"
    run_dir.mkdir()
    beat.write_text('{"machine": "another", "pid": 7}')
    monkeypatch.setattr(lock, "STALE", 2.0)
    monkeypatch.setattr(lock, "BEAT", 0.5)
    began = time.monotonic()
    with hold_lock(run_dir):
        assert time.monotonic() > began + 1
    beat.touch()
    threading.Timer(0.5, beat.touch).start()  # the other machine is alive
    refused = pytest.raises(ValueError, match="run is being written by process 7 on another; stop")
    with refused, hold_lock(run_dir):
        pass


@pytest.mark.usefixtures("sighup")
@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM", "SIGINT"])
def test_signals_ask_to_stop_and_only_a_second_ctrl_c_interrupts(tmp_path, name):
    before = signal.getsignal(signal.Signals[name])
    with stop_requests(tmp_path) as reason:
        assert reason() == ""
        signal.raise_signal(signal.Signals[name])
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
        assert reason() == name
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.Signals[name]) is before


def test_sighup_stays_ignored_under_nohup(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests(tmp_path) as reason:
            signal.raise_signal(signal.SIGHUP)
            assert reason() == ""
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_core_imports_where_fcntl_is_missing():
    """As on Windows."""
    code = "import sys; sys.modules['fcntl'] = None\n"
    code += "import lmlib, lmlib.training, lmlib.checkpoint, lmlib.run.lock, lmlib.cli.parser\n"
    code += "import lmlib.run.run_audit, lmlib.generation.text; print(lmlib.train, lmlib.generate)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=PROJECT_ROOT)
