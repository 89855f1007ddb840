"""`compile`: the loss as compiled kernels, or a reason why not."""

import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import lmlib
from lmlib.run.compiled import compile_loss
from lmlib.run.prepare import prepare, record_start
from lmlib.run.start import find_start


def prepared(smoke, monkeypatch, compiler, **overrides):
    """Prepare a run with something in place of torch.compile."""
    monkeypatch.setattr(torch, "compile", compiler)
    return prepare(find_start(smoke(**overrides)))


def test_by_default_a_cpu_compiles_nothing(smoke, monkeypatch):
    def fail(*_, **__):
        raise AssertionError

    assert not prepared(smoke, monkeypatch, fail).is_compiled


def test_a_compiler_that_fails_is_an_error_if_compile_is_true(smoke, monkeypatch):
    def fail(function, **_):
        def broken(*_):
            raise RuntimeError("no C++ compiler\nmore lines")

        return broken

    with pytest.raises(ValueError, match="cannot be compiled here .*no C.. compiler.*to false"):
        prepared(smoke, monkeypatch, fail, compile=True)


@pytest.mark.parametrize("factor, agrees", [(1.0, True), (1.01, False)])
def test_a_compiled_loss_with_another_gradient_is_refused(smoke, monkeypatch, factor, agrees):
    def other(function, **_):
        return lambda *batch: function(*batch) * factor

    if agrees:
        run = prepared(smoke, monkeypatch, other, compile=True)
        assert run.is_compiled and "loss" in vars(run.model)
        return
    with pytest.raises(ValueError, match="its gradient differs by"):
        prepared(smoke, monkeypatch, other, compile=True)
    run = prepared(smoke, monkeypatch, other)
    config = replace(run.config, compile=True)
    with pytest.raises(ValueError, match="differs"):
        compile_loss(run.model, config, *run.store.batch(1), torch.float32)
    assert "loss" not in vars(run.model)  # the eager loss is back


def test_a_replay_that_is_not_a_number_is_refused(smoke, monkeypatch):
    def replayed(function, **_):
        factors = itertools.chain([1.0], itertools.repeat(math.nan))
        return lambda *batch: function(*batch) * next(factors)

    with pytest.raises(ValueError, match="its gradient differs by nan"):
        prepared(smoke, monkeypatch, replayed, compile=True)


def test_one_process_divides_nothing(smoke, monkeypatch):
    """With sharding: full it compiles, and on CUDA saves in the background, as without."""
    run = prepared(smoke, monkeypatch, lambda function, **_: function, sharding="full")
    config = SimpleNamespace(**{**run.config.to_dict(), "compile": True})  # refused in a recipe
    batch = run.store.batch(1)
    assert compile_loss(run.model, config, *batch, torch.float32) == ""
    run.start = replace(run.start, device=torch.device("cuda"))
    monkeypatch.setattr("lmlib.run.prepare.environment", lambda *_: {})  # asks for the GPU's name
    record_start(run)
    run.metrics.close()
    assert run.saver.pool is not None
    monkeypatch.setattr("lmlib.distributed.world_size", lambda: 2)
    why = compile_loss(run.model, config, *batch, torch.float32)
    assert why == "it is divided among the processes"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch's compiler warns, and fails on errors
def test_a_compiled_run_follows_the_eager_one_and_resumes(smoke):
    eager = smoke(run_name="eager", total_steps=6, dropout=0.0, log_every=1, checkpoint_every=3)
    compiled = replace(eager, run_name="compiled", compile=True, deterministic=True)
    losses = {}
    for config in (eager, compiled):
        records = list(lmlib.train(config))
        losses[config.run_name] = [r.loss for r in records if r.kind == "step"]
    assert losses["compiled"] == pytest.approx(losses["eager"], abs=1e-4)
    environment = json.loads((compiled.run_dir / "environment.json").read_text())
    assert environment["compiled"] is True
    with pytest.warns(UserWarning, match="compiled was True, is False"):
        list(lmlib.train(replace(compiled, compile=False, total_steps=9)))
