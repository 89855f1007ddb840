"""Model cards: huggingface_hub reads them back, whatever the names in them."""

import json

import pytest
from huggingface_hub import ModelCard, constants

import lmlib
from lmlib.data.corpus import name_and_license
from lmlib.files import read_mapping
from lmlib.leaks import LEAKY
from lmlib.model.card import write_card

HOSTILE = [
    "a`b",
    "--- # x",
    "x: [y",
    "a'b\"c",
    "![x](javascript:owned(0))",
    "<script>owned(1)",
    "*x*|`y`",
    "!!python:os.system",
    "{{ x }}",
    "- a",
]
SCORES = {"val_loss": 1.5, "val_loss_stderr": 0.1, "val_documents": 30}
TEST = {"test_loss": 2.0, "test_loss_stderr": 0.5, "test_documents": 3, "test_bits_per_byte": 1.5}


def card_of(config, folder, scores=SCORES, **manifest) -> ModelCard:
    """Write the card of a checkpoint with this manifest, and load it."""
    manifest = {"step": 3, "val_loss_step": 2, "lineage": "complete", **manifest}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "checkpoint.json").write_text(json.dumps(manifest))
    write_card(folder, config, scores)
    return ModelCard.load(folder / "README.md")


def test_a_finished_run_has_a_card_with_its_test_scores(trained):
    folder = trained.run_dir / "checkpoints" / "checkpoint_step_20"
    results = read_mapping(trained.run_dir / "results.json")
    card = ModelCard.load(folder / "README.md")
    loss, bits = card.data.eval_results
    assert (loss.metric_type, loss.metric_value) == ("loss", results["test_loss"])
    assert loss.metric_args == {"standard_error": results["test_loss_stderr"]}
    assert (loss.dataset_name, loss.dataset_split) == ("shakespeare", "test")
    assert loss.dataset_args == {"documents": results["test_documents"]}
    assert bits.metric_value == results["test_bits_per_byte"]
    assert card.data.model_name == "trained" and card.data.library_name == "transformers"
    assert "Audit before step 1, pass: causality, " in card.text and "MIT" in card.text
    assert f"Test loss {results['test_loss']:.4f}" in card.text
    assert "![Training curves](training_curves.png)" in card.text
    png = (trained.run_dir / "training_curves.png").read_bytes()
    assert (folder / "training_curves.png").read_bytes() == png
    earlier = ModelCard.load(folder.with_name("checkpoint_step_10") / "README.md")
    assert earlier.data.eval_results is None and "Validation loss" in earlier.text
    lmlib.load(folder)  # the card and the picture are no corruption


def test_the_code_in_a_card_loads_the_model(trained):
    folder = trained.run_dir / "checkpoints" / "checkpoint_step_20"
    code = ModelCard.load(folder / "README.md").text.split("```")[1].removeprefix("python\n")
    names: dict = {}
    exec(code.replace("path/of/this/folder", str(folder)), names)
    assert names["model"].config.sequence_length == 64


@pytest.mark.parametrize("name", HOSTILE)
def test_names_in_a_card_stay_names(smoke, tmp_path, name):
    config = smoke(corpus=name, run_name="run", init_from=name)
    card = card_of(config, tmp_path / "model", SCORES | TEST)
    quoted = f"`{name.replace('`', chr(39))}`"
    assert f"Training text: {quoted} (license: `unknown`). Initialized from {quoted}." in card.text
    assert card.data.eval_results[0].dataset_name == name
    known = {"tags", "library_name", "pipeline_tag", "model_name", "eval_results"}
    assert {key for key, value in vars(card.data).items() if value is not None} == known
    lines = [line for line in card.text.splitlines() if quoted not in line]
    assert not any("owned" in line or name in line for line in lines)


def test_a_local_corpus_is_named_without_its_folders(smoke, tmp_path):
    folder = tmp_path / "private" / "texts"
    folder.mkdir(parents=True)
    config = smoke(corpus=str(folder), init_from=str(tmp_path / "private" / "parent"))
    card = card_of(config, tmp_path / "model", SCORES | TEST)
    said = "`texts` (license: `unknown`). Initialized from `parent`."
    assert said in card.text and "private" not in str(card)
    checkpoint = tmp_path / "private" / "parent" / "checkpoints" / "checkpoint_step_3"
    config = smoke(corpus=f"{folder}/../texts/.", init_from=str(checkpoint))
    assert said in card_of(config, tmp_path / "other", SCORES | TEST).text
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\n")
    assert "(license: `cc0-1.0`)" in card_of(config, tmp_path / "model").text


@pytest.mark.parametrize(
    ("readme", "license"),
    [
        ("---\nlicense: apache-2.0\n---\n# A dataset", "apache-2.0"),
        ("---\nlicense: [mit, x`y]\n---\n", "['mit', 'x`y']"),
        ("---\nlicense: [\n---\n", "unknown"),
        ("---\n- license\n---\n", "unknown"),
        ("no metadata", "unknown"),
        (None, "unknown"),
    ],
)
def test_the_license_of_a_dataset_is_that_in_its_cached_card(
    tmp_path, monkeypatch, readme, license
):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    dataset = tmp_path / "datasets--owner--name"
    (dataset / "snapshots" / "abc").mkdir(parents=True)
    (dataset / "refs").mkdir()
    (dataset / "refs" / "main").write_text("abc")
    if readme is not None:
        (dataset / "snapshots" / "abc" / "README.md").write_text(readme)
    assert name_and_license("owner/name") == ("owner/name", license)


def test_scores_that_cannot_be_trusted_are_no_metadata(smoke, tmp_path):
    """Leaderboards read it. The text has the scores, below a warning."""
    config, scores = smoke(corpus="owner/name"), SCORES | TEST
    leaky = card_of(config, tmp_path / "leaky", scores, **{LEAKY: "split"})
    assert leaky.data.tags == ["lmlib", "leaky"] and leaky.data.eval_results is None
    assert "> **This model leaks (split).**" in leaky.text and "Test loss 2.0000" in leaky.text
    unknown = card_of(config, tmp_path / "unknown", scores, lineage="unknown")
    assert "> **Lineage unknown.**" in unknown.text and unknown.data.eval_results is None
    assert unknown.data.datasets == ["owner/name"] and unknown.data.tags == ["lmlib"]
    maskless = card_of(smoke(causal_mask=False, allow_leaks=True), tmp_path / "maskless")
    assert maskless.data.library_name == "lmlib" and "transformers" not in maskless.text
