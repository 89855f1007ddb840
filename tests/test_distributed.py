"""Several processes on gloo: the same bits as one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fingerprint import fingerprint
from process import SMOKE
from together import EXACT

import lmlib
from lmlib import distributed
from lmlib.checkpoint import checkpoint_steps
from lmlib.config import RunConfig
from lmlib.errors import UserError
from lmlib.files import PROJECT_ROOT
from lmlib.run.together import check_processes

VARIANTS = {
    "muon": {**EXACT, "grad_clip": 0.05},  # below every norm, so that clipping is active
    "moe": {**EXACT, "feed_forward": "moe"},
    "adamw": {**EXACT, "optimizer": "adamw", "micro_batch_size": 2, "learning_rate": 0.001},
    # Rows that no number of processes divides; four have no piece of a stack of three experts.
    "uneven": {**EXACT, "feed_forward": "moe", "num_experts": 3, "vocab_size": 509},
}
VARIANTS["uneven"] |= {"tie_word_embeddings": False, "hidden_size": 30, "attention_bias": True}
FULL = ("muon", "adamw", "uneven")  # the variants that are also trained with sharding: full
# The variant in which a fault is planted, and the number of processes that can show it.
FAULTS = {"all_reduce": ("muon", 4), "dropout": ("muon", 4), "router": ("moe", 4)}
FAULTS["order"] = ("muon", 2)  # of the rounds, of which four processes have two
FULL_FAULTS = ("pieces", "norm", "means")  # those of sharding: full
FAULTS |= dict.fromkeys(FULL_FAULTS, ("muon", 2))


def train_together(folder: Path, processes: int, runs: list[dict], status: int = 0) -> str:
    """Train runs one after the other in one launch of so many processes; returns the errors."""
    runs = [{"output_dir": str(folder), **run} for run in runs]
    script = [sys.executable, "tests/support/together.py", json.dumps(runs)]
    script += [str(processes)] if processes > 1 else []
    done = subprocess.run(script, cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def by_count(tmp_path_factory) -> dict[int, Path]:
    """Return the folder of the variants' runs by number of processes."""
    folders = {}
    for count in (1, 2, 4):
        folders[count] = tmp_path_factory.mktemp(f"processes-{count}")
        runs = [{"run_name": name, **changes} for name, changes in VARIANTS.items()]
        full = {"output_dir": str(folders[count] / "full"), "sharding": "full"}
        runs += [{**run, **full} for run in runs if count > 1 and run["run_name"] in FULL]
        for fault, (name, shown_by) in FAULTS.items():
            if shown_by == count:
                runs.append({"run_name": f"planted-{fault}", "plant": fault, **VARIANTS[name]})
                runs[-1]["sharding"] = "full" if fault in FULL_FAULTS else "none"
        train_together(folders[count], count, runs)
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_one_two_and_four_processes_give_the_same_bits(by_count, name):
    one, two, four = (fingerprint(by_count[count] / name) for count in (1, 2, 4))
    assert len(one["tensors"]) == 4 and len(one["metrics"]) > 6
    assert one == two == four


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", FULL)
def test_a_divided_model_gives_the_same_bits(by_count, name, count):
    divided = by_count[count] / "full" / name
    assert fingerprint(divided) == fingerprint(by_count[1] / name)
    environment = json.loads((divided / "environment.json").read_text())
    assert (environment["processes"], environment["sharding"]) == (count, "full")


@pytest.mark.slow
def test_eight_processes_give_the_same_bits(by_count, tmp_path):
    train_together(tmp_path, 8, [{"run_name": "muon", **VARIANTS["muon"]}])
    assert fingerprint(tmp_path / "muon") == fingerprint(by_count[1] / "muon")


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no CUDA device beside the first")
@pytest.mark.parametrize("name", VARIANTS)
def test_one_and_two_gpus_give_the_same_bits(tmp_path, name):
    for count in (1, 2):
        changes = {"run_name": name, "device": "cuda", **VARIANTS[name]}
        train_together(tmp_path / str(count), count, [changes])
    assert fingerprint(tmp_path / "1" / name) == fingerprint(tmp_path / "2" / name)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_changes_the_bits(by_count, fault):
    name, count = FAULTS[fault]
    whole, planted = (by_count[count] / run for run in (name, f"planted-{fault}"))
    assert fingerprint(planted)["tensors"] != fingerprint(whole)["tensors"]


@pytest.mark.slow
def test_no_file_but_the_environment_tells_the_number_of_processes(by_count):
    def names(folder: Path) -> set[str]:
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}

    assert names(by_count[1] / "muon") == names(by_count[4] / "muon")
    for name in ("config.json", "checkpoints/checkpoint_step_6/config.json"):
        texts = [(by_count[n] / "muon" / name).read_text() for n in (1, 4)]
        assert texts[0].replace(str(by_count[1]), "") == texts[1].replace(str(by_count[4]), "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "sessions", [["2 none", "1 none", "4 none"], ["2 none", "4 full", "2 none"]], ids=str
)
def test_the_processes_and_their_sharding_may_change_in_the_middle(by_count, tmp_path, sessions):
    for session, leave_at in zip(sessions, (2, 4, None), strict=True):
        count, sharding = session.split()
        changes = {"sharding": sharding, "leave_at": leave_at, **VARIANTS["muon"]}
        train_together(tmp_path, int(count), [{"run_name": "muon", **changes}])
    changed, whole = fingerprint(tmp_path / "muon"), fingerprint(by_count[1] / "muon")
    assert changed["results"] == whole["results"]
    last = "checkpoints/checkpoint_step_6/"
    assert {k: v for k, v in changed["tensors"].items() if k.startswith(last)} == {
        k: v for k, v in whole["tensors"].items() if k.startswith(last)
    }
    sessions = json.loads((tmp_path / "muon" / "environment.json").read_text())["sessions"]
    assert [session["from_step"] for session in sessions] == [0, 2, 4]


@pytest.mark.slow
def test_without_deterministic_the_losses_are_close(tmp_path):
    changes = {"total_steps": 50, "batch_size": 4, "dropout": 0.0}
    changes |= {"checkpoint_every": 50, "eval_every": 50}
    kinds = {"one": (1, {}), "none": (2, {}), "full": (2, {"sharding": "full"})}
    kinds["micro-batches"] = (2, {"sharding": "full", "micro_batch_size": 1})
    losses = {}
    for name, (count, others) in kinds.items():
        train_together(tmp_path, count, [{"run_name": name, **changes, **others}])
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        losses[name] = [line["loss"] for line in found if line["kind"] == "step"]
    assert len(losses["one"]) == 50
    for name in kinds:
        assert losses[name] == pytest.approx(losses["one"], abs=1e-5), name


@pytest.mark.slow
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


def test_processes_that_differ_refuse_to_start(tmp_path):
    """Each rank raises the same sentence, which names what differs, and nothing is written."""
    differ = {
        "learning_rate": "differ in learning_rate: 0.01 on rank 0 (",
        "threads": "differ in threads: 1 on rank 0 (",
        "commit": "differ in commit: ",
        "folder": "is not that of rank 0. All machines must share it",
    }
    runs = [{"run_name": what, "differ": what, **EXACT} for what in differ]
    errors = train_together(tmp_path, 2, runs, status=1)
    for what, sentence in differ.items():
        assert errors.count(sentence) == 2, errors
        assert not (tmp_path / what).exists()
    assert "'another' on rank 1" in errors and "Traceback" not in errors


def test_a_torch_that_is_too_old_or_lacks_a_backend_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    sentence = r"Several processes need torch 2\.13 or newer, with gloo .* has torch 2\."
    for name, value in (
        ("torch.__version__", "2.11.0"),
        ("torch.distributed.is_gloo_available", bool),
    ):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=sentence):
            patch.setattr(name, value)
            with distributed.join():
                pass


def test_one_process_needs_no_group():
    assert (distributed.rank(), distributed.world_size(), distributed.is_first()) == (0, 1, True)
    assert distributed.gather({"a": 1}) == [{"a": 1}]
    assert list(distributed.deal("abc")) == [(0, "a"), (1, "b"), (2, "c")]
    assert distributed.first_reason("stop") == "stop"
    with pytest.raises(UserError, match="once"):
        distributed.agree(lambda: (_ for _ in ()).throw(UserError("once")))


@pytest.mark.slow
def test_the_recipe_of_1b_trains_at_tiny_size(tmp_path, text_file):
    tiny = RunConfig.load(SMOKE).to_dict()
    sizes = ("vocab_size", "sequence_length", "hidden_size", "num_hidden_layers", "tokenizer")
    sizes += ("num_attention_heads", "intermediate_size", "q_lora_rank", "kv_lora_rank")
    sizes += ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "max_tokens")
    changes = {name: tiny[name] for name in sizes} | {"corpus": str(text_file)}
    changes |= {"total_steps": 4, "batch_size": 8, "micro_batch_size": 2, "processes": 2}
    changes |= {"validation_fraction": 0.2, "test_fraction": 0.2, "eval_every": 4}
    recipe = PROJECT_ROOT / "params" / "exp9_1b.yaml"
    config = RunConfig.load(recipe, output_dir=str(tmp_path), checkpoint_every=2, **changes)
    records = list(lmlib.train(config))
    assert records[-1].kind == "done" and checkpoint_steps(config.run_dir) == [2, 4]
    assert json.loads((config.run_dir / "environment.json").read_text())["sharding"] == "full"
    model, _ = lmlib.load(config.run_dir)
    assert model.config.hidden_size == tiny["hidden_size"]
    # Another run may start from it, without dividing anything.
    start = {"init_from": str(config.run_dir), "init_state": "full", "run_name": "next"}
    later = RunConfig.load(
        recipe,
        output_dir=str(tmp_path),
        checkpoint_every=2,
        **{**changes, **start, "processes": 1, "sharding": "none", "total_steps": 6},
    )
    assert [r.step for r in lmlib.train(later) if r.kind == "step"] == [6]
    assert checkpoint_steps(later.run_dir) == [6]
