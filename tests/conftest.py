"""Shared pieces: the smoke recipe under a name of its own, and a small corpus of real English."""

import itertools
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: models this small lose by threads, and so do tests side by side

import pytest

from lmlib.config import RunConfig
from lmlib.data.corpus import corpus_files
from lmlib.files import PROJECT_ROOT

names = (f"run{number}" for number in itertools.count())


@pytest.fixture(scope="session")
def outputs(tmp_path_factory) -> Path:
    """One output folder for all tests, so that the Shakespeare tokens are made once."""
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture
def smoke(outputs):
    """smoke(**overrides) -> RunConfig of params/smoke.yaml with a fresh run_name."""

    def make(**overrides) -> RunConfig:
        return RunConfig.load(
            PROJECT_ROOT / "params" / "smoke.yaml", **{"output_dir": outputs, "run_name": next(names), **overrides}
        )

    return make


@pytest.fixture(scope="session")
def trained(outputs) -> RunConfig:
    """A finished smoke run; tests must not change it."""
    from lmlib import training

    config = RunConfig.load(PROJECT_ROOT / "params" / "smoke.yaml", output_dir=outputs, run_name="trained")
    list(training.train(config))
    return config


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Three scenes of Hamlet's play, 60,000 characters, as a .txt corpus."""
    play = next(file for file in corpus_files("shakespeare") if file.name == "hamlet.md").read_text("utf-8")
    file = tmp_path_factory.mktemp("corpus") / "hamlet.txt"
    file.write_text(play[:60_000], "utf-8")
    return file
