"""docs/trackers.md: every block, at a smaller size, with the real trackers and Optuna."""

import json
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest
from pages import blocks, replaced, run

from lmlib.files import PROJECT_ROOT, read_mapping
from lmlib.run.records import read_records

pytestmark = pytest.mark.ecosystem
PAGE = "trackers.md"
SMOKE = {"params/quickstart.yaml": "params/smoke.yaml"}


def needs(package: str):
    return pytest.mark.skipif(
        not find_spec(package), reason=f"no ecosystem packages: make ecosystem ({package})"
    )


@pytest.fixture
def place(tmp_path) -> Path:
    (tmp_path / "outputs").mkdir()
    return tmp_path


def recorded(place: Path, name: str) -> dict[int, float]:
    """Return the validation loss of each evaluation of a run."""
    records = read_records(place / "outputs" / name)
    return {r["step"]: r["val_loss"] for r in records if r["kind"] == "eval"}


def test_the_page_has_what_these_tests_run():
    assert len(blocks(PAGE, "python")) == 3
    pins = (PROJECT_ROOT / "requirements-ecosystem.txt").read_text()
    for block in blocks(PAGE, "bash"):
        assert block.split()[-1].replace("==", " ").split()[-1] in pins


@needs("tensorboard")
def test_tensorboard_has_every_score(place):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(replaced(blocks(PAGE, "python")[0], SMOKE), place)
    events = EventAccumulator(str(place / "outputs" / "tracked" / "tensorboard"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("eval/val_loss")}
    assert found == pytest.approx(recorded(place, "tracked"))
    assert "step/loss" in events.Tags()["scalars"]


@needs("trackio")
def test_trackio_has_every_score(place, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(place / "trackio"))
    script = blocks(PAGE, "python")[1] + (
        "\nimport json\nfrom trackio.sqlite_storage import SQLiteStorage\n"
        "print('LOGS', json.dumps(SQLiteStorage.get_logs('lmlib', 'tracked_too')))\n"
    )

    said = run(replaced(script, SMOKE), place)
    logs = json.loads(said.partition("LOGS ")[2])
    found = {log["step"]: log["eval/val_loss"] for log in logs if "eval/val_loss" in log}
    assert found == pytest.approx(recorded(place, "tracked_too"))


@needs("optuna")
def test_processes_share_a_study(place):
    """Two at once, as on two machines: each trial is made once, and bad ones are pruned."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    smaller = {**SMOKE, "n_trials=20": "n_trials=4", "n_startup_trials=4": "n_startup_trials=2"}
    script, errors = replaced(blocks(PAGE, "python")[2], smaller), []

    def work():
        try:
            run(script, place)
        except AssertionError as error:
            errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors, errors[0]
    storage = JournalStorage(JournalFileBackend(str(place / "outputs" / "study.log")))
    study = optuna.load_study(study_name="quickstart", storage=storage)
    assert [trial.number for trial in study.trials] == list(range(8))
    states = {state.name for state in optuna.trial.TrialState}
    found = [trial.state.name for trial in study.trials]
    assert "COMPLETE" in found and "PRUNED" in found and set(found) <= states
    for trial in study.trials:
        folder = place / "outputs" / f"trial_{trial.number}"
        assert trial.intermediate_values == recorded(place, folder.name)
        results = read_mapping(folder / "results.json")
        is_whole = trial.last_step == 20  # one that is pruned at its last evaluation has ended
        assert bool(results) == (trial.state.name == "COMPLETE" or is_whole)
        assert not any(name.startswith("test_") for name in results)
        if results:
            assert trial.value == results["val_loss"]
        else:  # pruned: saved where it was stopped
            assert list((folder / "checkpoints").glob("checkpoint_step_*"))
