"""Kernels that a step launches, and scalars that it reads back."""

import runpy
from dataclasses import replace

import pytest

from lmlib import training
from lmlib.config import RunConfig
from lmlib.files import PROJECT_ROOT
from lmlib.run.prepare import prepare
from lmlib.run.start import find_start


@pytest.fixture(scope="module")
def launches():
    return runpy.run_path(str(PROJECT_ROOT / "benchmarks" / "launches.py"))


def test_exp9_launches_at_most_1500_kernels_and_reads_no_scalar(launches):
    config = RunConfig.load(PROJECT_ROOT / "params" / "exp9.yaml", device="cpu", dtype="float32")
    parts = launches["count"](replace(config, hidden_size=64, vocab_size=512))
    kernels = {name: part.kernels.total() for name, part in parts.items()}
    assert kernels["forward"] > 300 and kernels["backward"] > 400  # it counts
    assert sum(kernels.values()) <= 1500
    assert kernels["optimizer"] <= 300
    assert sum(part.reads for part in parts.values()) == 0


def test_a_read_scalar_is_counted(launches):
    with launches["Counts"]() as counts:
        float(training.torch.ones(3).sum())
    assert counts.reads == 1 and counts.kernels["aten::sum"] == 1


@pytest.mark.parametrize("feed_forward", ["mlp", "moe"])
def test_updates_of_a_real_run_read_no_scalar(launches, smoke, feed_forward):
    run = prepare(find_start(smoke(total_steps=10, feed_forward=feed_forward)))
    training.apply_update(run, 1, 1.0)
    with launches["Counts"]() as counts:
        training.apply_update(run, 2, 1.0)
        training.apply_update(run, 3, 1.0)
    assert counts.reads == 0 and counts.kernels.total() > 100
    assert [update.step for update in run.updates.read()] == [1, 2, 3]
