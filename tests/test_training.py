"""The training loop: records, exact resume, errors, stopping, and losses that are not finite."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fingerprint import fingerprint

import lmlib
from lmlib import checkpoint, optim, training
from lmlib.files import PROJECT_ROOT
from lmlib.model import moe
from lmlib.run.lock import hold_lock
from lmlib.run.prepare import prepare
from lmlib.run.records import read_records
from lmlib.run.start import build_model, find_start, greeting, open_store


def test_records_come_in_order_and_equal_the_lines_of_metrics_jsonl(smoke):
    config = smoke(total_steps=7, eval_every=3, checkpoint_every=4, log_every=2)
    records = list(lmlib.train(config))
    assert [(r.kind, r.step) for r in records] == [
        ("eval", 0),
        ("sample", 0),
        ("audit", 0),
        ("step", 2),
        ("eval", 3),
        ("sample", 3),
        ("step", 4),
        ("checkpoint", 4),
        ("step", 6),
        ("eval", 6),
        ("sample", 6),
        ("step", 7),
        ("eval", 7),
        ("sample", 7),
        ("profile", 7),
        ("checkpoint", 7),
        ("done", 7),
    ]
    assert (config.run_dir / "metrics.jsonl").read_text().splitlines() == [
        r.to_json() for r in records
    ]
    assert (
        records[-1].val_loss
        == records[-5].val_loss
        == json.loads((config.run_dir / "results.json").read_text())["val_loss"]
    )
    assert records[3].loss > 0 and records[3].tokens_per_second > 0
    assert sum(records[-3].val_loss_by_position) / 64 == pytest.approx(
        records[-1].val_loss, abs=1e-4
    )
    assert sum(records[-3].val_accuracy_by_position) / 64 == pytest.approx(
        records[-1].val_accuracy, abs=1e-4
    )
    assert records[1].prompts == records[5].prompts and len(records[1].texts) == 3
    model, tokenizer = lmlib.load(config.run_dir)
    assert (
        lmlib.generate(model, tokenizer, records[-4].prompts, max_new_tokens=24, temperature=0)
        == records[-4].texts
    )
    assert not (config.run_dir / "heartbeat.json").exists()
    with pytest.raises(AttributeError, match="a record of kind 'eval' has no 'loss'"):
        records[0].loss  # noqa: B018


def test_training_lowers_the_validation_loss(smoke):
    config = smoke(
        total_steps=60,
        hidden_size=64,
        dropout=0.0,
        eval_every=60,
        checkpoint_every=60,
        learning_rate=0.01,
    )
    evals = [record.val_loss for record in lmlib.train(config) if record.kind == "eval"]
    assert evals[0] == pytest.approx(6.24, abs=0.02)  # ln 512: a uniform guess
    assert evals[-1] < 4.9


def test_expert_load_is_recorded_for_the_whole_batch(smoke):
    """All micro-batches count; each step moves a bias by at most one BIAS_UPDATE_SPEED."""
    config = smoke(feed_forward="moe", batch_size=4, micro_batch_size=3, total_steps=6, dropout=0.0)
    steps = [record for record in lmlib.train(config) if record.kind == "step"]
    for record in steps:
        assert [len(layer) for layer in record.expert_load] == [4, 4]
        assert all(abs(sum(layer) - 1) < 1e-3 for layer in record.expert_load)
    whole = smoke(feed_forward="moe", batch_size=4, total_steps=6, dropout=0.0)
    assert [r.expert_load for r in lmlib.train(whole) if r.kind == "step"][:2] == [
        r.expert_load for r in steps
    ][:2]
    model, _ = lmlib.load(config.run_dir)
    for router in moe.routers(model):
        moved = router.e_score_correction_bias / moe.BIAS_UPDATE_SPEED
        assert torch.allclose(moved, moved.round(), atol=1e-3) and moved.abs().max() <= 6
    with pytest.raises(ValueError, match="num_experts_per_tok is 5; it must be at least 2"):
        smoke(feed_forward="moe", num_experts_per_tok=5)
    smoke(feed_forward="mlp", num_experts_per_tok=5)  # not checked, since it is not used


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("optimizer", "feed_forward"), [("muon", "mlp"), ("adamw", "mlp"), ("muon", "moe")]
)
def test_interrupted_run_resumes_bit_for_bit(smoke, text_file, threads, optimizer, feed_forward):
    """Across epochs, with dropout and micro-batches that do not divide the batch."""
    shape = {
        "corpus": str(text_file),
        "batch_size": 60,
        "micro_batch_size": 25,
        "total_steps": 10,
        "optimizer": optimizer,
    }
    shape["feed_forward"] = feed_forward
    whole = smoke(**shape)
    records = list(lmlib.train(whole))
    expected = fingerprint(whole.run_dir)
    interrupted = smoke(**shape)
    interruptions = [("step", 3), ("eval", 5), ("step", 7), ("step", 9)]
    for kind, step in interruptions:
        run = lmlib.train(interrupted)
        for record in run:
            if (record.kind, record.step) == (kind, step):
                break
        run.close()
    resumed = list(lmlib.train(interrupted))
    assert fingerprint(interrupted.run_dir) == expected
    assert [r.values for r in resumed] == [r.values for r in records[-len(resumed) :]]


def test_finished_run_trains_nothing_and_changes_no_byte(smoke, trained):
    def content():
        return {
            path: (path.read_bytes(), path.stat().st_mtime_ns)
            for path in trained.run_dir.rglob("*")
            if path.is_file()
        }

    before = content()
    assert [(record.kind, record.step) for record in lmlib.train(trained)] == [("done", 20)]
    assert content() == before


def test_raising_total_steps_extends_a_finished_run(smoke):
    config = smoke(total_steps=5)
    list(lmlib.train(config))
    longer = replace(config, total_steps=10)
    said = greeting(find_start(longer))
    assert "schedule, which ended at step 5, is stretched to it" in said
    peak = longer.learning_rate
    jump = [optim.schedule(step, total, longer.warmup_ratio) for step, total in ((5, 5), (6, 10))]
    rates = [f"{peak * factor:.2g}" for factor in jump]
    assert f"With its next step the rate jumps from {rates[0]} to {rates[1]}." in said
    records = list(lmlib.train(longer))
    assert (records[0].kind, records[0].step) == ("step", 6)
    lines = [
        json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 11))
    assert [line["kind"] for line in lines].count("done") == 1
    with pytest.raises(ValueError, match="is at step 10, beyond total_steps 5"):
        list(lmlib.train(config))


def test_results_stay_until_a_longer_run_has_saved(smoke):
    config = smoke(total_steps=5, checkpoint_every=5)
    list(lmlib.train(config))
    before = (config.run_dir / "results.json").read_bytes()
    run = lmlib.train(replace(config, total_steps=20))
    assert next(run).step == 6
    assert (config.run_dir / "results.json").read_bytes() == before
    run.close()  # which saves step 6
    assert not (config.run_dir / "results.json").exists()
    done = list(lmlib.train(replace(config, total_steps=20)))[-1]
    assert done.test_steps == [5, 20]


def test_total_steps_may_be_lowered_to_any_step_still_to_come(smoke):
    config = smoke(total_steps=20, eval_every=20, checkpoint_every=20)
    stop_at(config, 7)
    for total_steps in (10, 7):
        copy = replace(config, run_name=f"{config.run_name}-{total_steps}")
        shutil.copytree(config.run_dir, copy.run_dir)
        shorter = replace(copy, total_steps=total_steps)
        greeted = greeting(find_start(shorter))
        assert "schedule, which ended at step 20, is shortened to it" in greeted
        done = list(lmlib.train(shorter))[-1]
        assert (done.kind, done.step) == ("done", total_steps)
        assert json.loads((copy.run_dir / "results.json").read_text())["val_loss"] == done.val_loss
    with pytest.raises(ValueError, match="is at step 7, beyond total_steps 6"):
        find_start(replace(config, total_steps=6))


def stop_at(config, step: int):
    """Train to a step and leave."""
    run = lmlib.train(config)
    for record in run:
        if record.step == step:
            break
    run.close()


def test_the_greeting_says_what_trains_where_there_is_a_choice(smoke, monkeypatch):
    start = find_start(smoke())
    assert "train" not in greeting(start) and "processes" not in greeting(start)
    together = replace(start, config=replace(start.config, processes=2))
    assert "2 processes train, all on the CPU." in greeting(together)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    on_gpu = replace(start, device=torch.device("cuda"))
    assert "One of the 4 CUDA devices trains; see the parameter processes." in greeting(on_gpu)
    together = replace(together, device=torch.device("cuda"))
    assert "2 processes train, each on a CUDA device of its own." in greeting(together)


def test_a_kill_after_the_last_checkpoint_leaves_nothing_behind(smoke, trained, monkeypatch):
    """Between the renaming of the checkpoint's folder and the deletion of what it makes needless."""

    class Killed(BaseException):
        pass

    def kill(*args):
        if checkpoint.checkpoint_steps(config.run_dir)[-1] == config.total_steps:
            raise Killed

    config = smoke()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "prune", kill)
        with pytest.raises(Killed):
            list(lmlib.train(config))
    assert not (config.run_dir / "results.json").exists()
    list(lmlib.train(config))
    assert fingerprint(config.run_dir) == fingerprint(trained.run_dir)


# ---- The consumer of the records ----


def test_closing_the_generator_completes_the_records_of_the_step_and_saves(smoke):
    config = smoke(eval_every=3, checkpoint_every=20)
    run = lmlib.train(config)
    for record in run:
        if record.kind == "step" and record.step == 6:
            break
    run.close()
    kinds = [r["kind"] for r in read_records(config.run_dir) if r["step"] == 6]
    assert kinds == ["step", "eval", "sample"]
    assert checkpoint.checkpoint_steps(config.run_dir) == [6]
    whole = smoke(eval_every=3, checkpoint_every=20)
    list(lmlib.train(whole))
    list(lmlib.train(config))
    assert fingerprint(config.run_dir) == fingerprint(whole.run_dir)


def test_an_exception_in_the_consumer_leaves_a_saved_run(smoke):
    config = smoke()

    def consume():
        for record in lmlib.train(config):
            if record.step == 7:
                raise RuntimeError("the display failed")

    with pytest.raises(RuntimeError, match="the display failed"):
        consume()
    assert checkpoint.checkpoint_steps(config.run_dir) == [5, 7]


def test_leaving_before_the_first_step_saves_nothing_and_at_the_last_finishes(smoke):
    config = smoke(total_steps=6)
    run = lmlib.train(config)
    next(run)
    run.close()
    assert checkpoint.checkpoint_steps(config.run_dir) == []
    stop_at(config, 6)
    assert json.loads((config.run_dir / "results.json").read_text())["total_steps"] == 6


def test_max_hours_saves_and_stops_in_time(smoke, monkeypatch):
    config = smoke(total_steps=1000, eval_every=1000, checkpoint_every=1000, max_hours=1.0)
    began, looks = time.monotonic(), itertools.count(1)
    clock = SimpleNamespace(monotonic=lambda: began + 60 * next(looks))  # a step takes a minute
    monkeypatch.setattr("lmlib.run.deadline.time", clock)
    with pytest.raises(training.Stopped, match=r"of 1000 \(max_hours\)\. The checkpoint is saved"):
        list(lmlib.train(config))
    [step] = checkpoint.checkpoint_steps(config.run_dir)
    assert 50 < step < 60  # an hour's steps, less what the last step and its save may take


# ---- What may change ----


def test_before_the_first_checkpoint_anything_may_change(smoke):
    """A run that was killed for memory in its first step, and is started again with less."""
    config = smoke()
    run = lmlib.train(config)
    next(run)
    run.close()
    assert (config.run_dir / "config.json").exists()
    smaller = replace(config, micro_batch_size=2, hidden_size=64, total_steps=2)
    assert list(lmlib.train(smaller))[-1].kind == "done"


def test_micro_batch_size_may_change_and_is_said_not_to_be_exact(smoke):
    config = smoke(total_steps=6, checkpoint_every=3)
    stop_at(config, 3)
    with pytest.warns(UserWarning, match="not bit-identical: micro_batch_size was None, is 2"):
        records = list(lmlib.train(replace(config, micro_batch_size=2)))
    assert records[-1].kind == "done"


def test_other_parameters_for_a_runs_folder_are_an_error_and_change_nothing(smoke, trained):
    before = fingerprint(trained.run_dir)
    with pytest.raises(ValueError) as caught:
        list(lmlib.train(replace(trained, hidden_size=64, seed=5)))
    assert "hidden_size is 64 and was 32" in str(caught.value) and "seed is 5 and was 0" in str(
        caught.value
    )
    assert fingerprint(trained.run_dir) == before


def test_gradients_of_micro_batches_sum_to_those_of_the_batch(smoke):
    model = lmlib.LanguageModel(smoke(dropout=0.0)).double()
    ids = torch.randint(0, 512, (8, 17), generator=torch.Generator().manual_seed(0))
    grads = []
    for micro in (8, 3, 1):
        loss = training.accumulate_gradients(
            model, ids[:, :-1], ids[:, 1:], micro, 0, 1, torch.float32
        )
        grads.append((float(loss), [p.grad.clone() for p in model.parameters()]))
    for loss, parameters in grads[1:]:
        assert loss == pytest.approx(grads[0][0], rel=1e-12)
        assert all(
            torch.allclose(a, b, rtol=0, atol=1e-12)
            for a, b in zip(parameters, grads[0][1], strict=True)
        )


def test_dropout_is_a_function_of_seed_step_and_micro_batch(smoke):
    model = lmlib.LanguageModel(smoke(dropout=0.5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    ids = torch.randint(0, 512, (4, 17), generator=torch.Generator().manual_seed(0))
    x, y = ids[:, :-1], ids[:, 1:]
    state = torch.random.get_rng_state()
    loss = training.accumulate_gradients(model, x, y, 2, 0, 1, torch.float32)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(1)
    assert training.accumulate_gradients(model, x, y, 2, 0, 1, torch.float32) == loss
    assert training.accumulate_gradients(model, x, y, 2, 0, 2, torch.float32) != loss
    assert training.accumulate_gradients(model, x, y, 2, 1, 1, torch.float32) != loss
    halves = training.accumulate_gradients(
        model, x[:1].repeat(4, 1), y[:1].repeat(4, 1), 2, 0, 1, torch.float32
    )
    assert halves != training.accumulate_gradients(
        model, x[:1].repeat(2, 1), y[:1].repeat(2, 1), 2, 0, 1, torch.float32
    )


def test_init_from_starts_from_the_weights_of_another_run(smoke, trained, text_file):
    config = smoke(
        init_from=str(trained.run_dir), init_step=10, corpus=str(text_file), total_steps=5
    )
    start = lmlib.load(trained.run_dir, 10)[0]
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            start.parameters(),
            build_model(config, find_start(config).source).parameters(),
            strict=True,
        )
    )
    assert next(lmlib.train(config)).val_loss < 6.1  # not the 6.24 of random weights
    list(lmlib.train(config))
    environment = json.loads((config.run_dir / "environment.json").read_text())
    assert environment["init_from"].endswith("checkpoint_step_10")
    assert lmlib.load(config.run_dir)[1].get_vocab() == lmlib.load(trained.run_dir)[1].get_vocab()
    with pytest.raises(
        ValueError, match="has another shape. To start from it, set hidden_size to 32"
    ):
        list(lmlib.train(smoke(init_from=str(trained.run_dir), hidden_size=64)))


def test_branch_resumes_from_a_past_step_with_its_optimizer_state(smoke, trained):
    """With the same parameters it equals its parent; with another learning rate it does not."""
    parent = smoke(total_steps=10)
    list(lmlib.train(parent))
    same = smoke(total_steps=10, init_from=str(parent.run_dir), init_step=5, init_state="full")
    records = list(lmlib.train(same))
    assert (records[0].kind, records[0].step) == ("eval", 5) and (
        records[3].kind,
        records[3].step,
    ) == ("step", 6)
    name = "checkpoints/checkpoint_step_10/model.safetensors"
    weights = [fingerprint(config.run_dir)["tensors"][name] for config in (parent, same)]
    assert weights[0] == weights[1]
    other = replace(same, run_name=same.run_name + "b", learning_rate=0.1)
    list(lmlib.train(other))
    assert fingerprint(other.run_dir)["tensors"][name] != weights[0]
    stateless = smoke(init_from=str(trained.run_dir), init_step=5, init_state="full")
    with pytest.raises(ValueError, match="has no training state any more"):
        list(lmlib.train(stateless))
    assert not stateless.run_dir.exists()


def test_run_started_from_a_checkpoint_resumes_without_its_parent(smoke, trained, tmp_path):
    parent = shutil.copytree(
        trained.run_dir / "checkpoints" / "checkpoint_step_10", tmp_path / "checkpoint_step_10"
    )
    config = smoke(init_from=str(parent), total_steps=10)
    for record in lmlib.train(config):
        if record.kind == "checkpoint":
            break
    shutil.rmtree(parent)
    assert list(lmlib.train(config))[-1].kind == "done"


def test_checkpoints_between_evaluations_record_the_step_of_their_validation_loss(smoke):
    whole, interrupted = (
        smoke(total_steps=12, eval_every=10, checkpoint_every=4) for _ in range(2)
    )
    records = list(lmlib.train(whole))
    assert [(r.step, r.val_loss_step) for r in records if r.kind == "checkpoint"] == [
        (4, 0),
        (8, 0),
        (12, 12),
    ]
    for record in lmlib.train(interrupted):
        if record.kind == "checkpoint":
            break
    list(lmlib.train(interrupted))
    assert fingerprint(interrupted.run_dir) == fingerprint(whole.run_dir)


def test_finished_run_without_checkpoints_is_not_trained_from_scratch(smoke):
    config = smoke(total_steps=5)
    list(lmlib.train(config))
    shutil.rmtree(config.run_dir / "checkpoints")
    before = (config.run_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="checkpoints are gone"):
        list(lmlib.train(replace(config, total_steps=10)))
    assert (config.run_dir / "metrics.jsonl").read_bytes() == before


def test_parameters_that_attention_does_not_use_may_differ_on_resume(smoke):
    config = smoke(total_steps=10, attention="mha")
    for record in lmlib.train(config):
        if record.kind == "checkpoint":
            break
    assert list(lmlib.train(replace(config, kv_lora_rank=20)))[-1].kind == "done"


def test_loss_spike_is_recorded(smoke, monkeypatch):
    real = training.accumulate_gradients
    monkeypatch.setattr(
        training, "accumulate_gradients", lambda *a: real(*a) + (3.0 if a[5] == 33 else 0.0)
    )
    records = list(lmlib.train(smoke(total_steps=35)))
    assert [(r.step, r.usual_loss < r.loss - 2) for r in records if r.kind == "spike"] == [
        (33, True)
    ]


def test_tokenizer_other_than_that_of_the_weights_is_an_error(smoke, trained, text_file):
    other = smoke(corpus=str(text_file), total_steps=1)
    list(lmlib.train(other))
    tokenizer = other.run_dir / "checkpoints" / "checkpoint_step_1"
    with pytest.raises(ValueError, match="is not the one that .* was trained with"):
        list(lmlib.train(smoke(init_from=str(trained.run_dir), tokenizer=str(tokenizer))))


def test_loss_that_is_not_finite_changes_no_weight(smoke, monkeypatch):
    real = training.accumulate_gradients

    def nan_at_step_7(model, ids, targets, micro, seed, step, dtype):
        loss = real(model, ids, targets, micro, seed, step, dtype)
        return float("nan") if step == 7 else loss

    monkeypatch.setattr(training, "accumulate_gradients", nan_at_step_7)
    config = smoke(total_steps=10)
    with pytest.raises(training.NonFinite, match="step 7 is not finite. No weight was changed"):
        list(lmlib.train(config))
    last = json.loads((config.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "nonfinite" and last["step"] == 7 and len(last["windows"]) == 4
    assert checkpoint.checkpoint_steps(config.run_dir) == [5]

    skipping = smoke(total_steps=10, on_nonfinite="skip")
    records = list(lmlib.train(skipping))
    assert records[-1].steps_skipped == [7] and ("step", 7) not in [
        (r.kind, r.step) for r in records
    ]
    before = fingerprint(skipping.run_dir)
    shutil.rmtree(skipping.run_dir / "checkpoints" / "checkpoint_step_10")
    (skipping.run_dir / "results.json").unlink()
    list(lmlib.train(skipping))
    assert fingerprint(skipping.run_dir) == before


@pytest.mark.parametrize("feed_forward", ["mlp", "moe"])
def test_after_a_loss_that_is_not_finite_nothing_changes_until_it_is_read(smoke, feed_forward):
    config = smoke(total_steps=10, feed_forward=feed_forward)
    run = prepare(find_start(config))
    run.metrics = []  # no folder is written

    def state():
        tensors = {**run.model.state_dict(), **optim.state_tensors(run.model, run.optimizers)}
        return {name: tensor.clone() for name, tensor in tensors.items()}

    training.apply_update(run, 1, 1.0)
    before = state()
    weight = run.model.model.norm.weight
    handle = weight.register_hook(lambda grad: grad * math.inf)
    training.apply_update(run, 2, 1.0)
    handle.remove()
    training.apply_update(run, 3, 1.0)  # finite, but blocked
    after = state()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(before[name].signbit().equal(after[name].signbit()) for name in before)
    run.progress.step = 3
    found = []
    with pytest.raises(training.NonFinite, match="step 2 is not finite"):
        found.extend(training.read_updates(run))
    assert [(record.kind, record.step) for record in run.metrics] == [("nonfinite", 2)]


def test_skipped_updates_block_no_later_ones(smoke):
    config = smoke(total_steps=10, on_nonfinite="skip")
    run = prepare(find_start(config))
    run.metrics = []
    handle = run.model.model.norm.weight.register_hook(lambda grad: grad * math.nan)
    training.apply_update(run, 1, 1.0)
    handle.remove()
    before = run.model.lm_head.weight.clone()
    training.apply_update(run, 2, 1.0)
    assert not torch.equal(before, run.model.lm_head.weight)
    kinds = [(record.kind, record.step) for record in training.read_updates(run, 1.0)]
    assert kinds[0] == ("nonfinite", 1) and kinds[-1][0] == "step"
    assert run.progress.skipped == [1]


def test_events_are_read_before_a_record_of_a_later_step(smoke, monkeypatch):
    real = training.accumulate_gradients
    monkeypatch.setattr(
        training, "accumulate_gradients", lambda *a: real(*a) + (3.0 if a[5] == 33 else 0.0)
    )
    config = smoke(total_steps=60, log_every=20, eval_every=60, checkpoint_every=60)
    records = list(lmlib.train(config))
    kinds = [(r.kind, r.step) for r in records if r.kind in ("spike", "step")]
    assert kinds == [("step", 20), ("spike", 33), ("step", 40), ("step", 60)]


def test_running_out_of_gpu_memory_halves_the_micro_batch(smoke, monkeypatch):
    real, sizes = training.accumulate_gradients, []

    def out_of_memory_above_one_window(model, ids, targets, micro, seed, step, dtype):
        sizes.append(micro)
        if micro > 1:
            raise torch.cuda.OutOfMemoryError("simulated")
        return real(model, ids, targets, micro, seed, step, dtype)

    monkeypatch.setattr(training, "accumulate_gradients", out_of_memory_above_one_window)
    config = smoke(total_steps=2)
    records = list(lmlib.train(config))
    assert sizes == [4, 2, 1, 1] and [
        r.micro_batch_size for r in records if r.kind == "out_of_memory"
    ] == [2, 1]
    assert checkpoint.verify_state(checkpoint.newest_good(config.run_dir))["micro_batch_size"] == 1


def test_second_process_on_a_run_is_refused_with_the_pid_of_the_first(smoke):
    config = smoke(total_steps=10)
    run = lmlib.train(config)
    next(run)
    file = str(config.run_dir / "config.json")
    code = f"import lmlib; list(lmlib.train(lmlib.RunConfig.load({file!r})))"
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"is being written by process {os.getpid()}" in second.stderr
    run.close()
    with hold_lock(config.run_dir):
        pass


def start_long_run(config, tmp_path) -> subprocess.Popen:
    """Start a long run in a process of its own, and wait until it has made a few steps."""
    command = [
        sys.executable,
        "-m",
        "lmlib",
        "train",
        "params/smoke.yaml",
        "-p",
        "total_steps",
        "100000",
    ]
    for name in ("output_dir", "run_name"):
        command += ["-p", name, str(getattr(config, name))]
    command += ["-p", "checkpoint_every", "50000", "-p", "eval_every", "50000"]
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.PIPE, text=True, cwd=PROJECT_ROOT
        )
    deadline = time.monotonic() + 120
    while "Step 3/" not in (tmp_path / "out").read_text():
        assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "stop"])
def test_stop_request_saves_and_says_how_to_resume(smoke, tmp_path, how):
    config = smoke()
    process = start_long_run(config, tmp_path)
    if how == "stop":
        subprocess.run(
            [sys.executable, "-m", "lmlib", "stop", config.run_dir], check=True, cwd=PROJECT_ROOT
        )
    else:
        process.send_signal(getattr(signal, how))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "The checkpoint is saved; run the same command to resume" in errors
    [step] = checkpoint.checkpoint_steps(config.run_dir)
    assert step >= 3 and f"Stopped at step {step} of 100000" in errors
    checkpoint.verify_state(checkpoint.newest_good(config.run_dir))
    lines = [
        json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines[-1]["step"] == step and "checkpoint" not in [line["kind"] for line in lines]


def test_interrupt_in_python_raises_after_saving_and_the_run_resumes_exactly(smoke):
    whole = smoke(total_steps=10)
    list(lmlib.train(whole))
    config = smoke(total_steps=10)
    with pytest.raises(training.Stopped, match="Stopped at step 7 of 10 .SIGINT"):
        for record in lmlib.train(config):
            if record.step == 7:
                os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    list(lmlib.train(config))
    ours, expected = fingerprint(config.run_dir), fingerprint(whole.run_dir)
    assert (ours["metrics"], ours["results"]) == (expected["metrics"], expected["results"])
    name = "checkpoints/checkpoint_step_10/model.safetensors"
    assert ours["tensors"][name] == expected["tensors"][name]


def test_resuming_on_a_changed_corpus_is_an_error(smoke, tmp_path):
    corpus = tmp_path / "c.txt"
    corpus.write_text(
        "\n\n".join(f"Paragraph {n} says something of its own. " * 20 for n in range(200))
    )
    config = smoke(corpus=str(corpus), validation_fraction=0.3, total_steps=10)
    for record in lmlib.train(config):
        if (record.kind, record.step) == ("checkpoint", 5):
            break
    corpus.write_text(corpus.read_text().replace("own", "OWN"))
    with pytest.raises(ValueError, match="The data of this run have changed"):
        list(lmlib.train(config))


def test_resuming_with_another_number_of_threads_warns(smoke):
    config = smoke(total_steps=10)
    for record in lmlib.train(config):
        if record.kind == "checkpoint":
            break
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(UserWarning, match=f"threads was {threads}, is {threads + 1}"):
            list(lmlib.train(config))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("place", ["a file", "/proc"])
def test_output_folder_that_cannot_be_written_is_a_clear_error(smoke, tmp_path, text_file, place):
    (tmp_path / "a file").write_text("x")
    with pytest.raises(ValueError, match="cannot be used"):
        list(lmlib.train(smoke(output_dir=tmp_path / place, corpus=str(text_file))))


def test_missing_device_is_a_clear_error(smoke):
    with pytest.raises(ValueError, match="torch finds . CUDA devices"):
        list(lmlib.train(smoke(device="cuda:7")))


def test_core_needs_only_the_core_packages(smoke, trained, tmp_path):
    """A machine that only trains needs no datasets, plotly, pandas or Jupyter."""
    code = """
import sys
for name in ("datasets", "plotly", "pandas", "matplotlib", "ipywidgets", "IPython", "papermill"):
    sys.modules[name] = None  # importing it fails
import lmlib
from lmlib import checkpoint, evaluation, optim, training
from lmlib.data import prepare
settings = {"total_steps": 2, "output_dir": sys.argv[1], "run_name": "core"}
run = lmlib.RunConfig.load("params/smoke.yaml", **settings)
assert [r.kind for r in lmlib.train(run)][-1] == "done"
print(lmlib.generate(*lmlib.load(run.run_dir), ["To be"], max_new_tokens=3))
"""
    subprocess.run([sys.executable, "-c", code, trained.output_dir], check=True, cwd=PROJECT_ROOT)


def test_finished_run_without_checkpoints_still_opens_its_text(smoke, trained):
    """Its tokenizer is then its parent's."""
    config = smoke(init_from=str(trained.run_dir), init_step=10, total_steps=2)
    list(lmlib.train(config))
    shutil.rmtree(config.run_dir / "checkpoints")
    store = open_store(find_start(config))
    assert store.tokenizer.get_vocab() == lmlib.load(trained.run_dir)[1].get_vocab()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_cpu_and_resumes(smoke):
    losses = {}
    for device in ("cpu", "cuda"):
        run = smoke(device=device, dtype="float32", dropout=0.0, total_steps=10)
        losses[device] = [r.loss for r in lmlib.train(run) if r.kind == "step"]
    assert losses["cuda"] == pytest.approx(losses["cpu"], abs=0.02)
    whole, interrupted = (
        smoke(device="cuda", deterministic=True, total_steps=10) for _ in range(2)
    )
    list(lmlib.train(whole))
    run = lmlib.train(interrupted)
    for record in run:
        if record.kind == "step" and record.step == 7:
            break
    run.close()
    list(lmlib.train(interrupted))
    assert fingerprint(interrupted.run_dir)["metrics"] == fingerprint(whole.run_dir)["metrics"]


def test_nothing_trained_on_damaged_tokens_is_saved_and_they_are_built_again(smoke, monkeypatch):
    """A store too large to verify before step 1 is verified while the run trains."""
    config = smoke(validation_fraction=0.21)  # a store of its own
    store = open_store(find_start(config))
    monkeypatch.setattr("lmlib.data.verify.AT_ONCE", 0)
    content = bytearray((store.folder / "train.bin").read_bytes())
    content[1000] ^= 1
    (store.folder / "train.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged \(train.bin\), so nothing .* is saved"):
        list(lmlib.train(config))
    assert checkpoint.checkpoint_steps(config.run_dir) == []
    with pytest.warns(UserWarning, match="is built again"):
        records = list(lmlib.train(config))
    assert records[-1].kind == "done"
