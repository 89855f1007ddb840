"""Shared fixtures: runs of the smoke recipe, and a small corpus of real English."""

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Set before torch is imported: threads slow down models this small, and tests that run in parallel.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from lmlib.config import RunConfig
from lmlib.data.corpus import corpus_files
from lmlib.files import PROJECT_ROOT

names = (f"run{number}" for number in itertools.count())


@pytest.fixture(scope="session")
def outputs(tmp_path_factory) -> Path:
    """Return one output folder for all tests, so that Shakespeare is tokenized once."""
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture
def smoke(outputs):
    """Return a function `smoke(**overrides)`: the smoke recipe's RunConfig with a new run_name."""

    def make(**overrides) -> RunConfig:
        settings = {"output_dir": outputs, "run_name": next(names), **overrides}
        return RunConfig.load(PROJECT_ROOT / "params" / "smoke.yaml", **settings)

    return make


@pytest.fixture
def sighup():
    """Let SIGHUP end processes, as in a terminal: tests that `nohup` started ignore it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def trained(outputs) -> Iterator[RunConfig]:
    """Return the config of a finished smoke run, to whose folder tests must not add."""
    from lmlib import training

    recipe = PROJECT_ROOT / "params" / "smoke.yaml"
    config = RunConfig.load(recipe, output_dir=outputs, run_name="trained")
    list(training.train(config))
    before = set(config.run_dir.iterdir())
    yield config
    assert set(config.run_dir.iterdir()) == before, "a test changed the run that others read"


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Return the first 60,000 characters of Hamlet as a .txt corpus."""
    [play] = [file for file in corpus_files("shakespeare") if file.name == "hamlet.md"]
    file = tmp_path_factory.mktemp("corpus") / "hamlet.txt"
    file.write_text(play.read_text("utf-8")[:60_000], "utf-8")
    return file


def pytest_collection_modifyitems(items):
    """Begin with what takes minutes: in the end one of several workers would be alone with it."""
    long = ("test_survival.py", "test_launches.py", "test_process_faults.py")
    items.sort(key=lambda item: item.path.name not in long)


# In CI a skipped test is a failure, unless its reason is listed here.
EXPECTED_SKIPS = (
    "no CUDA device",
    "both steps have the same file",
    "no network namespaces",
    "no ecosystem packages",
    "no llama.cpp",
)


def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not os.environ.get("CI"):
        return
    reasons = {str(report.longrepr[2]) for report in reporter.stats.get("skipped", [])}
    unexpected = [r for r in reasons if not any(known in r for known in EXPECTED_SKIPS)]
    if unexpected:
        reporter.write_line(
            f"\nSkipped for reasons that tests/conftest.py does not list: {unexpected}"
        )
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
