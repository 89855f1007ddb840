"""Several processes of which one is killed, stopped, or finds something wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fingerprint import fingerprint
from process import LONG, command, processes_of, start, wait_for, wait_until
from together import EXACT

from lmlib.checkpoint import checkpoint_steps
from lmlib.files import PROJECT_ROOT
from lmlib.run.lock import run_status

pytestmark = pytest.mark.slow
STEPS = {**EXACT, "total_steps": 12, "checkpoint_every": 4, "eval_every": 4}
INJECT = PROJECT_ROOT / "tests" / "support" / "inject"
KILLS = {
    "mid-step, rank 0": (0, "lmlib.run.parallel:clip_gradients", 7),
    "mid-step, rank 1": (1, "lmlib.run.parallel:clip_gradients", 7),
    "mid-save, rank 0": (0, "lmlib.checkpoint:write_manifest", 4),  # weights are there, no state
    "mid-save, rank 1": (1, "lmlib.distributed:collect", 2),
    "mid-evaluation, rank 0": (0, "lmlib.evaluation:token_scores", 17),
    "preflight, rank 0": (0, "lmlib.evaluation:token_scores", 8),
    "mid-evaluation, rank 1": (1, "lmlib.evaluation:token_scores", 6),
    "a divided model, rank 1": (1, "lmlib.run.parallel:_exchange", 200),  # in step 7
}


def launched(folder: Path, name: str, *words: str, **changes) -> list[str]:
    """Return the command that trains a run in two processes."""
    parameters = {"output_dir": folder, "run_name": name, **STEPS, **changes}
    return [*command("train", **parameters), "--processes", "2", *words]


def fault(folder: Path, rank: int, function: str, call: int, do: str) -> dict[str, str]:
    """Return the variable that makes a fault happen once, to one process."""
    values = {"rank": rank, "function": function, "call": call, "do": do}
    return {"LMLIB_FAULT": json.dumps({**values, "mark": str(folder / "happened")})}


def environment(**variables) -> dict[str, str]:
    paths = filter(None, [str(INJECT), os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables}


def finish(words: list[str], **variables) -> subprocess.CompletedProcess:
    """Run a command to its end, with variables in its environment and its output as text."""
    options = {"cwd": PROJECT_ROOT, "env": environment(**variables)}
    return subprocess.run(words, capture_output=True, text=True, **options)


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
    done = finish(launched(folder, "run"))
    assert done.returncode == 0, done.stdout + done.stderr
    return fingerprint(folder / "run")


@pytest.mark.parametrize("where", KILLS)
def test_a_killed_process_is_started_again_and_no_bit_differs(tmp_path, undisturbed, where):
    sharding = "full" if where.startswith("a divided model") else "none"
    words = launched(tmp_path, "run", "--restarts", "1", sharding=sharding)
    done = finish(words, **fault(tmp_path, *KILLS[where], do="SIGKILL"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "happened").exists() and "Traceback" not in done.stderr
    assert "Starting again from the newest checkpoint (restart 1 of 1)" in done.stderr
    begins = "A new run" if where.startswith("preflight") else "Resuming from step 4 of 12"
    assert begins in done.stdout[len("A new run") :]
    assert fingerprint(tmp_path / "run") == undisturbed
    assert processes_of(tmp_path) == []


def test_a_process_that_hangs_is_given_up_after_the_limit(tmp_path, undisturbed):
    """SIGSTOP: the others wait for LMLIB_EXCHANGE_LIMIT, and the launcher kills it in the end."""
    variables = fault(tmp_path, 1, "lmlib.run.parallel:clip_gradients", 7, do="SIGSTOP")
    variables |= {"LMLIB_EXCHANGE_LIMIT": "20", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
    done = finish(launched(tmp_path, "run", "--restarts", "1"), **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "restart 1 of 1" in done.stderr and "Traceback" not in done.stderr
    assert fingerprint(tmp_path / "run") == undisturbed
    assert processes_of(tmp_path) == []


def test_a_save_may_take_longer_than_the_limit(tmp_path, undisturbed):
    variables = fault(tmp_path, 0, "lmlib.checkpoint:write_manifest", 2, do="slow")
    done = finish(launched(tmp_path, "run"), LMLIB_EXCHANGE_LIMIT="20", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "happened").exists()
    assert fingerprint(tmp_path / "run") == undisturbed


@pytest.mark.parametrize(
    ("rank", "function", "call"),
    [
        (0, "lmlib.checkpoint:write_manifest", 2),  # of which all learn
        (0, "lmlib.training:emit", 9),
        (1, "lmlib.run.parallel:clip_gradients", 7),
    ],
)
def test_a_full_disk_is_said_once_and_not_started_again(
    tmp_path, undisturbed, rank, function, call
):
    words = launched(tmp_path, "run", "--restarts", "3")
    done = finish(words, **fault(tmp_path, rank, function, call, do="full"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.count("Error:") == done.stderr.count("No space left on device") == 1
    assert "Traceback" not in done.stderr and "Starting again" not in done.stderr
    assert processes_of(tmp_path) == []
    assert finish(words).returncode == 0
    assert fingerprint(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("whom", ["launcher", "rank 0", "rank 1", "stop file"])
def test_a_request_to_stop_saves_one_step_and_is_not_started_again(tmp_path, undisturbed, whom):
    log = tmp_path / "log"
    changes = {"total_steps": 200, "checkpoint_every": 200, "eval_every": 200}
    changes["sharding"] = "full" if whom == "rank 1" else "none"
    process = start(log, *launched(tmp_path, "run", "--restarts", "3", **changes))
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


def test_a_killed_launcher_leaves_no_process_behind(tmp_path):
    log = tmp_path / "log"
    process = start(log, *launched(tmp_path, "run", **LONG))
    wait_for(process, log, "Step 3/")
    process.kill()
    process.wait()
    wait_until(lambda: processes_of(tmp_path) == [])
    assert run_status(tmp_path / "run") == "stopped"  # it was saved
    assert checkpoint_steps(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"learning_rate": 1e30}, "is not finite"),
        ({"corpus": "no/such/file.txt"}, "no/such/file.txt"),
        ({"init_from": "no/such/run"}, "no/such/run"),
    ],
)
def test_an_error_is_said_once_and_not_started_again(tmp_path, changes, sentence):
    done = finish(launched(tmp_path, "run", "--restarts", "3", **changes))
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.count("Error:") == 1 and sentence in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "Starting again" not in done.stderr


def test_a_run_that_is_held_elsewhere_is_refused_by_all(tmp_path):
    log = tmp_path / "log"
    holder = start(log, *launched(tmp_path, "run", **LONG))
    wait_for(holder, log, "Step 3/")
    done = finish(launched(tmp_path, "run", **LONG))
    holder.terminate()
    holder.wait()
    assert done.returncode == 1
    assert done.stderr.count("is being written by process") == 1, done.stderr


# ---- torchrun ----

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "3"]


def test_torchrun_does_not_start_a_stopped_run_again(tmp_path):
    log = tmp_path / "log"
    words = command("train", output_dir=tmp_path, run_name="run", **{**STEPS, **LONG})[1:]
    words = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *words]
    process = start(log, *words, env=environment(OMP_NUM_THREADS="1"))
    wait_for(process, log, "Step 3/")
    (tmp_path / "run" / "stop").touch()
    assert process.wait(180) == 0, log.read_text()
    assert log.read_text().count("The checkpoint is saved") == 1
    assert len(checkpoint_steps(tmp_path / "run")) == 1


def test_a_single_process_of_torchrun_starts_no_others(tmp_path):
    """As the one that is left of two machines, whatever the recipe says."""
    words = command("train", output_dir=tmp_path, run_name="run", **STEPS, processes=2)[1:]
    done = finish([*TORCHRUN, "--standalone", "--nproc-per-node", "1", *words])
    assert done.returncode == 0, done.stderr
    assert "processes train" not in done.stdout
    environment_file = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment_file["processes"] == 1


# ---- Two machines ----


@pytest.fixture
def machines():
    """Two network namespaces that see each other: their names and addresses."""
    names = [f"lmlib-{os.getpid()}-{letter}" for letter in "ab"]
    addresses, ends = ["10.77.0.1", "10.77.0.2"], [f"lm{os.getpid()}{letter}" for letter in "ab"]
    lines = [f"ip netns add {name}" for name in names]
    lines += [
        f"ip link add {ends[0]} netns {names[0]} type veth peer name {ends[1]} netns {names[1]}"
    ]
    for name, address, end in zip(names, addresses, ends, strict=True):
        lines += [f"ip -n {name} addr add {address}/24 dev {end}", f"ip -n {name} link set lo up"]
        lines += [f"ip -n {name} link set {end} up"]
    try:
        for line in lines:
            subprocess.run(line.split(), check=True, capture_output=True)
        yield list(zip(names, addresses, ends, strict=True))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no network namespaces: they need root and the command ip")
    finally:
        for name in names if shutil.which("ip") else ():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_machines_train_and_when_one_dies_the_other_finishes(tmp_path, machines):
    changes = {**STEPS, "output_dir": tmp_path, "run_name": "run", "total_steps": 200}
    changes |= {"checkpoint_every": 50, "eval_every": 50}
    torchrun = [*TORCHRUN, "--nnodes", "1:2", "--rdzv-id", "x"]
    torchrun += ["--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", f"{machines[0][1]}:29500"]
    nodes, logs = [], []
    for number, (name, address, end) in enumerate(machines):
        enter = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c"]
        enter += ['hostname "$0" && exec "$@"', name]  # whose heartbeat is that of another machine
        where = ["--local-addr", address, "--rdzv-conf"]
        where += [f"is_host={number == 0},last_call_timeout=5"]
        logs.append(tmp_path / f"{number}.log")
        words = [*enter, *torchrun, *where, *command("train", **changes)[1:]]
        variables = environment(GLOO_SOCKET_IFNAME=end, OMP_NUM_THREADS="1")
        nodes.append(start(logs[-1], *words, env=variables))
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and '"step": 60' in metrics.read_text(), *nodes)
    killed = nodes[1].pid
    children = Path(f"/proc/{killed}/task/{killed}/children").read_text().split()
    for pid in (killed, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    nodes[1].wait()
    assert nodes[0].wait(300) == 0, logs[0].read_text()
    sessions = json.loads((tmp_path / "run" / "environment.json").read_text())["sessions"]
    assert sessions[-1]["from_step"] == 50  # it may have begun alone, and waited for the other
    alone = finish(command("train", **{**changes, "run_name": "alone"}))
    assert alone.returncode == 0, alone.stderr
    assert fingerprint(tmp_path / "alone")["tensors"] == fingerprint(tmp_path / "run")["tensors"]
