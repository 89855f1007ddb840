"""Checkpoints: their files, that stock transformers loads them, and that corruption is detected."""

import ast
import contextlib
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from survival import CORRUPTIONS, FILES

import lmlib
from lmlib import checkpoint
from lmlib.files import PROJECT_ROOT, json_sha256
from lmlib.model import huggingface


@pytest.fixture
def run(trained, tmp_path):
    """Return a copy of a finished run that the test may change."""
    return shutil.copytree(trained.run_dir, tmp_path / "run")


def files_of(folder):
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def test_run_writes_the_documented_files(trained):
    model_files = {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "lineage.bin",
        "checkpoint.json",
    }
    folders = {
        step: trained.run_dir / "checkpoints" / f"checkpoint_step_{step}"
        for step in (5, 10, 15, 20)
    }
    for step, folder in folders.items():
        state = (
            {"training_state/optimizer.safetensors", "training_state/state.json"}
            if step > 10
            else set()
        )
        card = {"README.md", "training_curves.png"} if step == 20 else {"README.md"}
        assert set(files_of(folder)) == model_files | state | card
        manifest = checkpoint.verify(folder)
        assert manifest["step"] == step and set(manifest["files"]) == model_files - {
            "checkpoint.json"
        }
        assert manifest["val_loss"] > 0 and manifest["timestamp"].endswith("Z")
    assert checkpoint.checkpoint_steps(trained.run_dir) == [5, 10, 15, 20]
    for name in ("config.json", "environment.json", "metrics.jsonl", "results.json"):
        assert (trained.run_dir / name).is_file()


def test_stock_transformers_loads_a_checkpoint(trained):
    folder = trained.run_dir / "checkpoints" / "checkpoint_step_20"
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, ours = lmlib.load(trained.run_dir)
    assert type(stock).__name__ == "DeepseekV3ForCausalLM"
    text = "To be, or not to be: 🐎"
    assert (
        tokenizer(text)["input_ids"] == ours(text)["input_ids"]
        and tokenizer.decode(ours(text)["input_ids"]) == text
    )
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert torch.allclose(model(ids), stock(ids).logits, rtol=0, atol=1e-6)
    assert not model.training and next(model.parameters()).dtype == torch.float32


# The architectures of Experiment 8, and the stock class that each is saved as
ARCHITECTURES = {
    ("mla", "mlp"): "DeepseekV3ForCausalLM",
    ("mha", "mlp"): "LlamaForCausalLM",
    ("mla", "moe"): "DeepseekV3ForCausalLM",
    ("mha", "moe"): "Glm4MoeForCausalLM",
}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids="-".join)
def test_every_architecture_loads_in_stock_transformers_and_back(smoke, tmp_path, architecture):
    """The stock class loads our checkpoint, and we load the folder that it saves."""
    attention, feed_forward = architecture
    config = smoke(
        attention=attention, feed_forward=feed_forward, total_steps=8, checkpoint_every=8
    )
    list(lmlib.train(config))
    folder = config.run_dir / "checkpoints" / "checkpoint_step_8"
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model, tokenizer = lmlib.load(config.run_dir)
    assert type(stock).__name__ == ARCHITECTURES[architecture]
    ids = torch.arange(60).view(2, 30)
    assert torch.allclose(model(ids), stock(ids).logits, rtol=0, atol=1e-5)
    stock.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = lmlib.load(tmp_path)
    assert {n: t.tolist() for n, t in again.state_dict().items()} == {
        n: t.tolist() for n, t in model.state_dict().items()
    }
    if feed_forward == "moe":
        biases = [
            tensor
            for name, tensor in model.state_dict().items()
            if name.endswith("e_score_correction_bias")
        ]
        assert len(biases) == 2 and all(bias.abs().max() > 0 for bias in biases)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("routed_scaling_factor", 2.5, "routed_scaling_factor"),
        ("n_shared_experts", 2, "n_shared_experts"),
        ("norm_topk_prob", False, "norm_topk_prob"),
        ("first_k_dense_replace", 1, "1 dense layers of 2"),
        ("n_group", 2, "n_group"),
        ("num_experts_per_tok", 1, "num_experts_per_tok is 1"),
    ],
)
def test_unsupported_mixture_of_experts_setting_is_named(tmp_path, smoke, setting, value, message):
    config = smoke(feed_forward="moe", attention="mha")
    stock_config = huggingface.stock_config(config)
    transformers.Glm4MoeForCausalLM(stock_config).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, setting: value}))
    with pytest.raises(huggingface.CheckpointError, match=message):
        lmlib.load(tmp_path)


def test_folders_saved_by_stock_classes_load(tmp_path, trained):
    """Sharded, in half precision, and with the defaults of the stock class."""
    config = lmlib.RunConfig(attention="mha", vocab_size=300, tie_word_embeddings=False)
    stock = transformers.LlamaForCausalLM(huggingface.stock_config(config)).to(torch.bfloat16)
    stock.save_pretrained(tmp_path, max_shard_size="2MB")
    _, tokenizer = lmlib.load(trained.run_dir)
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()
    model, _ = lmlib.load(tmp_path)
    ids = torch.arange(20)[None]
    stock = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.allclose(model(ids), stock(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("hidden_act", "gelu"),
        ("rms_norm_eps", 0.1),
        ("num_key_value_heads", 2),
        ("mlp_bias", True),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
        ("head_dim", 128),
        ("model_type", "gpt2"),
        ("quantization_config", {"quant_method": "fp8"}),
        ("sliding_window", 128),
    ],
)
def test_unsupported_setting_is_named(tmp_path, setting, value):
    config = huggingface.stock_config(lmlib.RunConfig(attention="mha", vocab_size=300))
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, setting: value}))
    with pytest.raises(huggingface.CheckpointError) as caught:
        lmlib.load(tmp_path)
    assert (value if setting == "model_type" else setting) in str(caught.value)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("file", FILES)
def test_corrupted_checkpoint_is_named_and_the_one_before_it_is_used(run, file, corruption):
    newest, before = (run / "checkpoints" / f"checkpoint_step_{step}" for step in (20, 15))
    content, other = (newest / file).read_bytes(), (before / file).read_bytes()
    corrupted = CORRUPTIONS[corruption](content, other)
    if corrupted == content:
        pytest.skip("both steps have the same file")
    (newest / file).unlink() if corrupted is None else (newest / file).write_bytes(corrupted)
    with pytest.warns(UserWarning, match="Falling back to step 15"):
        assert checkpoint.newest_good(run, with_state=True) == before
    if not file.startswith("training_state"):
        with pytest.raises(huggingface.CheckpointError, match="checkpoint_step_20"):
            lmlib.load(run, step=20)
        with pytest.warns(UserWarning, match="Falling back to step 15"):
            lmlib.load(run)


def test_valid_checkpoint_named_as_another_step_is_an_error(run):
    folders = [run / "checkpoints" / f"checkpoint_step_{step}" for step in (15, 20)]
    shutil.rmtree(folders[1])
    shutil.copytree(folders[0], folders[1])
    with pytest.warns(UserWarning, match="misnamed: it contains step 15"):
        assert checkpoint.newest_good(run) == folders[0]


def test_when_no_checkpoint_is_usable_each_is_named(run):
    for folder in (run / "checkpoints").iterdir():
        (folder / "config.json").write_text("{}")
    with pytest.raises(
        huggingface.CheckpointError,
        match="(?s)No checkpoint is usable.*step_20.*step_15.*step_10.*step_5",
    ):
        lmlib.load(run)


def test_files_outside_the_manifest_are_ignored(run):
    (run / "checkpoints" / "checkpoint_step_20" / "README.md").write_text("a model card")
    assert checkpoint.newest_good(run, with_state=True).name == "checkpoint_step_20"


@pytest.mark.parametrize(
    "name", ["LICENSE", "notes.txt", "README.md", "curve.png", ".gitattributes", "plots"]
)
def test_people_may_add_files_that_loading_never_reads(run, name):
    file = run / "checkpoints" / "checkpoint_step_20" / name
    file.mkdir() if name == "plots" else file.write_text("mine")
    assert checkpoint.newest_good(run, with_state=True).name == "checkpoint_step_20"


UNLISTED = """model.safetensors.index.json pytorch_model.bin pytorch_model.bin.index.json model.gguf
    model-00001-of-00002.safetensors adapter_model.safetensors adapter_config.json tf_model.h5
    special_tokens_map.json added_tokens.json chat_template.jinja vocab.json vocab.txt merges.txt
    tokenizer.model preprocessor_config.json modeling_evil.py"""


@pytest.mark.parametrize("name", UNLISTED.split())
def test_file_that_loading_might_read_must_be_in_the_manifest(run, name):
    folder = run / "checkpoints" / "checkpoint_step_20"
    (folder / name).write_text("{}")
    with pytest.raises(huggingface.CheckpointError, match=f"does not list .*: {name}. Move them"):
        checkpoint.verify(folder)
    with pytest.warns(UserWarning, match="Falling back to step 15"):
        assert checkpoint.newest_good(run, with_state=True).name == "checkpoint_step_15"


def test_index_that_redirects_to_other_weights_is_never_followed(run):
    """Not in a checkpoint, and in a plain model folder no more than by transformers."""
    folder = run / "checkpoints" / "checkpoint_step_20"
    plain = shutil.copytree(folder, run / "model")
    (plain / "checkpoint.json").unlink()
    honest = load_file(folder / "model.safetensors")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in honest.items()}
    index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(zeros, "zeros.safetensors")})
    for place in (folder, plain):
        save_file(zeros, place / "zeros.safetensors", {"format": "pt"})
        (place / "model.safetensors.index.json").write_text(index)
    with pytest.raises(huggingface.CheckpointError, match="zeros.safetensors"):
        lmlib.load(run, step=20)
    with pytest.warns(UserWarning, match="Falling back to step 15"):
        assert checkpoint.newest_good(run).name == "checkpoint_step_15"
    stock = transformers.AutoModelForCausalLM.from_pretrained(plain)
    for model in (stock, lmlib.load(plain)[0]):
        assert model.model.embed_tokens.weight.equal(honest["model.embed_tokens.weight"])


def test_unknown_step_is_an_error_that_lists_the_known_steps(run, tmp_path):
    with pytest.raises(
        huggingface.CheckpointError, match="no checkpoint of step 7; it has: 5, 10, 15, 20"
    ):
        lmlib.load(run, step=7)
    with pytest.raises(huggingface.CheckpointError, match="There is no folder"):
        lmlib.load(tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    with pytest.raises(
        huggingface.CheckpointError, match="neither a run with checkpoints nor a model folder"
    ):
        lmlib.load(tmp_path / "other")


def test_weights_of_other_shapes_are_an_error_before_memory_is_allocated(run):
    folder = run / "checkpoints" / "checkpoint_step_20"
    settings = json.loads((folder / "config.json").read_text())
    plain = shutil.copytree(folder, run / "model")
    (plain / "checkpoint.json").unlink()
    sizes = [
        {"hidden_size": 10**7},
        {"hidden_size": 10**15},
        {"vocab_size": 10**12},
        {"num_attention_heads": 10**6},
    ]
    sizes += [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10**9, "first_k_dense_replace": 10**9},
    ]
    for extra in sizes:
        (plain / "config.json").write_text(json.dumps({**settings, **extra}))
        with pytest.raises(huggingface.CheckpointError):
            lmlib.load(plain)
    (plain / "config.json").write_text(json.dumps(settings))
    tensors = load_file(plain / "model.safetensors")
    save_file(
        {**tensors, "model.extra": torch.zeros(1)}, plain / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(huggingface.CheckpointError, match="model.extra is unknown"):
        lmlib.load(plain)


PROVENANCE = {"data": "d" * 64, "lineage": "complete", "streams": ["s" * 64]}
LINEAGE = np.array([3, 2**40, 2**64 - 1], np.uint64)


def save_again(
    run, background=False, step=25, scheduled=True, val_loss=1.0, scored=None, keep=None, **extra
):
    """Save the newest checkpoint again as that of another step."""
    source = checkpoint.newest_good(run, with_state=True)
    model, tokenizer = lmlib.load(source)
    saver = checkpoint.Saver(background)
    optimizer = checkpoint.read_optimizer(source)
    scores = {"scores": {"val_loss": val_loss}, "scored": step if scored is None else scored}
    config = lmlib.RunConfig.load(run / "config.json", keep_checkpoints=keep)
    saver.save(
        run,
        huggingface.model_tensors(model),
        optimizer,
        config=config,
        tokenizer=tokenizer,
        scheduled=scheduled,
        state={"step": step, **scores},
        **{"provenance": PROVENANCE, "lineage": LINEAGE, **extra},
    )
    return saver, model


def test_background_save_copies_the_weights_when_called(run):
    saver, model = save_again(run, background=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    saver.wait()
    first, second = (
        load_file(run / f"checkpoints/checkpoint_step_{s}/model.safetensors") for s in (20, 25)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_full_device_is_copied_to_host_memory(run, monkeypatch):
    """The copies that fitted are dropped before the others are made."""
    real, copies = torch.Tensor.clone, []

    def clone(tensor):
        if len(copies) == 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        copies.append(real(tensor))
        return copies[-1]

    monkeypatch.setattr(torch.Tensor, "clone", clone)
    saver, model = save_again(run, background=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    saver.wait()
    assert len(copies) == 3
    first, second = (
        load_file(run / f"checkpoints/checkpoint_step_{s}/model.safetensors") for s in (20, 25)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("background", [False, True])
def test_failed_save_is_an_error_and_leaves_earlier_checkpoints(run, background, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    with pytest.raises(
        huggingface.CheckpointError, match="step 25 could not be written.*No space left"
    ):
        save_again(run, background)[0].wait()
    monkeypatch.undo()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        f"checkpoint_step_{s}" for s in (10, 15, 20, 5)
    ]
    assert checkpoint.newest_good(run, with_state=True).name == "checkpoint_step_20"


def test_newest_two_keep_their_training_state_and_drafts_are_deleted(run):
    (run / "checkpoints" / ".draft_step_22" / "training_state").mkdir(parents=True)
    save_again(run)
    states = sorted(path.parent.name for path in run.glob("checkpoints/*/training_state"))
    assert states == ["checkpoint_step_20", "checkpoint_step_25"]
    assert not list((run / "checkpoints").glob(".*"))


def test_what_cannot_be_deleted_is_a_warning_and_a_later_save_deletes_it(run, monkeypatch):
    real = shutil.rmtree

    def protected(path, *args, **kwargs):
        if path.name == ".deleted_step_15":
            raise PermissionError(1, "Operation not permitted", str(path))
        real(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", protected)
    with pytest.warns(UserWarning, match="step_15/training_state cannot be deleted"):
        save_again(run)
    assert checkpoint.newest_good(run, with_state=True).name == "checkpoint_step_25"
    with pytest.warns(UserWarning, match="deleted_step_15 cannot be deleted"):
        save_again(run, step=30)
    monkeypatch.undo()
    save_again(run, step=35)
    assert checkpoint.checkpoint_steps(run) == [5, 10, 15, 20, 25, 30, 35]
    assert not list((run / "checkpoints").glob(".*"))


def test_results_of_fewer_steps_are_deleted_once_the_new_checkpoint_is_there(run, monkeypatch):
    real = checkpoint.sync_folder

    def sync(folder):
        if folder == run / "checkpoints":  # flushed after the rename
            assert (run / "checkpoints" / "checkpoint_step_25").exists()
            assert (run / "results.json").exists()
        real(folder)

    monkeypatch.setattr(checkpoint, "sync_folder", sync)
    save_again(run)
    assert not (run / "results.json").exists()


def test_results_stay_until_the_first_checkpoint_of_an_extended_run(smoke):
    config = smoke(total_steps=5, checkpoint_every=5, eval_every=5)
    list(lmlib.train(config))
    found = {}
    for record in lmlib.train(dataclasses.replace(config, total_steps=10)):
        found[record.kind, record.step] = (config.run_dir / "results.json").exists()
    assert found["step", 10] and not found["checkpoint", 10]


def test_failed_save_leaves_the_results(run):
    with pytest.raises(huggingface.CheckpointError):
        save_again(run, lineage=np.broadcast_to(LINEAGE[0], 2**50))
    assert (run / "results.json").exists()


def test_checkpoint_of_an_interruption_is_deleted_by_a_later_save(run):
    save_again(run, step=22, scheduled=False)
    assert checkpoint.checkpoint_steps(run) == [5, 10, 15, 20, 22]
    save_again(run, step=25)
    assert checkpoint.checkpoint_steps(run) == [5, 10, 15, 20, 25]
    assert checkpoint.newest_good(run, with_state=True).name == "checkpoint_step_25"


def test_too_little_disk_space_is_an_error_before_anything_is_written(run, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(
        huggingface.CheckpointError, match="The checkpoints need .* GB and .* has 0.00 GB free"
    ):
        checkpoint.check_space(run / "not" / "yet", 100)
    with pytest.raises(huggingface.CheckpointError, match="0.00 GB free"):
        save_again(run)
    assert checkpoint.checkpoint_steps(run) == [5, 10, 15, 20]


def test_weights_that_are_not_finite_are_not_saved(run, monkeypatch):
    real = huggingface.model_tensors
    monkeypatch.setattr(
        huggingface, "model_tensors", lambda model: {k: t / 0 for k, t in real(model).items()}
    )
    with pytest.raises(huggingface.CheckpointError, match="step 25 are not all finite"):
        save_again(run)
    assert checkpoint.checkpoint_steps(run) == [5, 10, 15, 20]


def test_checkpoint_of_another_run_is_skipped(run, smoke):
    """It verifies, but was copied into this run's folder by mistake."""
    other = smoke(total_steps=25, checkpoint_every=25, seed=1)
    list(lmlib.train(other))
    shutil.copytree(
        other.run_dir / "checkpoints" / "checkpoint_step_25",
        run / "checkpoints" / "checkpoint_step_25",
    )
    for with_state in (False, True):
        with pytest.warns(
            UserWarning, match="step_25 belongs to another run .* Falling back to step 20"
        ):
            assert checkpoint.newest_good(run, with_state).name == "checkpoint_step_20"
    with pytest.raises(huggingface.CheckpointError, match="belongs to another run"):
        lmlib.load(run, step=25)


def test_provenance_and_lineage_come_back(run):
    save_again(run)
    folder = run / "checkpoints" / "checkpoint_step_25"
    manifest = checkpoint.verify(folder)
    assert manifest["format"] == 2 and "lineage.bin" in manifest["files"]
    assert {name: manifest[name] for name in PROVENANCE} == PROVENANCE
    assert (folder / "lineage.bin").read_bytes() == LINEAGE.astype("<u8").tobytes()
    read = checkpoint.read_lineage(folder)
    assert read.dtype == np.uint64 and read.tolist() == LINEAGE.tolist()


def rewrite_manifest(file, drop=(), **changes):
    """Change entries of a manifest, and its digest with them."""
    content = json.loads(file.read_text())
    dropped = {name: value for name, value in content.items() if name not in {*drop, "digest"}}
    content = {**dropped, **changes}
    file.write_text(json.dumps({**content, "digest": json_sha256(content)}))


def make_format_1(folder):
    """Rewrite a checkpoint as the first version of lmlib wrote it, under a key of its own."""
    (folder / "lineage.bin").unlink()
    file = folder / "checkpoint.json"
    files = json.loads(file.read_text())["files"]
    del files["lineage.bin"]
    rewrite_manifest(file, drop=PROVENANCE, format=1, run="0" * 64, files=files)
    if (folder / "training_state").exists():
        rewrite_manifest(folder / "training_state" / "state.json", format=1, run="0" * 64)


def test_checkpoints_of_format_1_are_read(run):
    for folder in (run / "checkpoints").iterdir():
        make_format_1(folder)
    newest = checkpoint.newest_good(run, with_state=True, run="1" * 64)
    assert newest.name == "checkpoint_step_20"
    assert checkpoint.read_lineage(newest) is None
    assert lmlib.load(run)[0].config.hidden_size == lmlib.load(newest)[0].config.hidden_size
    assert checkpoint.read_optimizer(newest) and checkpoint.read_state(newest)["step"] == 20


def test_unknown_format_is_an_error(run):
    folder = run / "checkpoints" / "checkpoint_step_20"
    rewrite_manifest(folder / "checkpoint.json", format=3)
    with pytest.raises(
        huggingface.CheckpointError, match="has format 3; this version of lmlib reads formats 1 and"
    ):
        lmlib.load(run, 20)


def set_losses(run, losses):
    """Set what the manifests say of validation, by step: (loss, step at which it was measured)."""
    for step, (loss, scored) in losses.items():
        file = run / "checkpoints" / f"checkpoint_step_{step}" / "checkpoint.json"
        rewrite_manifest(file, val_loss=loss, val_loss_step=scored)
        state = file.parent / "training_state" / "state.json"
        if state.exists():
            rewrite_manifest(state, scored=scored)


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ({5: (3.0, 5), 10: (2.0, 10), 15: (2.5, 15), 20: (2.2, 20)}, 10),
        ({5: (2.0, 5), 10: (2.0, 10), 15: (2.0, 15), 20: (2.2, 20)}, 15),
        # The loss of step 10 stands in two manifests, and is that of one of them
        ({5: (3.0, 0), 10: (2.0, 10), 15: (2.0, 10), 20: (2.2, 20)}, 10),
        ({5: (float("nan"), 5), 10: (None, 10), 15: (float("inf"), 15), 20: (9.0, 20)}, 20),
    ],
)
def test_best_checkpoint_has_the_lowest_validation_loss(run, losses, best):
    set_losses(run, losses)
    assert checkpoint.find_checkpoint(run, "best").name == f"checkpoint_step_{best}"


def test_best_checkpoint_that_is_corrupted_is_passed_over(run):
    set_losses(run, {5: (3.0, 5), 10: (2.0, 10), 15: (2.5, 15), 20: (2.6, 20)})
    (run / "checkpoints" / "checkpoint_step_10" / "config.json").write_text("{}")
    with pytest.warns(UserWarning, match="step_10 is corrupted: .* Falling back to step 15"):
        model, _ = lmlib.load(run, "best")
    expected, _ = lmlib.load(run, 15)
    assert model.lm_head.weight.equal(expected.lm_head.weight)
    with pytest.raises(huggingface.CheckpointError, match="single model, so step=best"):
        lmlib.load(run / "checkpoints" / "checkpoint_step_15", "best")
    set_losses(run, dict.fromkeys((5, 15, 20), (None, 0)))
    (run / "checkpoints" / "checkpoint_step_10" / "checkpoint.json").unlink()
    with pytest.raises(huggingface.CheckpointError, match="has no checkpoint with a validation"):
        lmlib.load(run, "best")


@pytest.mark.parametrize(
    ("keep", "kept"),
    [(None, [5, 10, 15, 20, 25]), (1, [10, 25]), (2, [10, 20, 25]), (9, [5, 10, 15, 20, 25])],
)
def test_newest_checkpoints_and_the_best_are_kept(run, keep, kept):
    set_losses(run, {5: (3.0, 5), 10: (0.5, 10), 15: (2.5, 15), 20: (2.6, 20)})
    save_again(run, keep=keep)
    assert checkpoint.checkpoint_steps(run) == kept
    assert not list((run / "checkpoints").glob(".*"))
    assert checkpoint.find_checkpoint(run, "best").name == "checkpoint_step_10"


def test_checkpoint_of_an_interruption_is_not_one_of_those_to_keep(run):
    set_losses(run, {5: (3.0, 5), 10: (0.5, 10), 15: (2.5, 15), 20: (2.6, 20)})
    save_again(run, step=22, scheduled=False, val_loss=0.1, keep=2)
    assert checkpoint.checkpoint_steps(run) == [10, 15, 20, 22]
    save_again(run, step=25, keep=2)
    assert checkpoint.checkpoint_steps(run) == [10, 20, 25]


def test_checkpoint_whose_manifest_is_unreadable_is_kept(run):
    """Its owner may have a copy of what is missing."""
    (run / "checkpoints" / "checkpoint_step_5" / "checkpoint.json").unlink()
    save_again(run, keep=1)
    assert 5 in checkpoint.checkpoint_steps(run)


def test_card_says_that_the_lineage_is_unknown_and_quotes_the_test_score_when_there_is_one(run):
    save_again(run)
    assert "Lineage" not in (run / "checkpoints" / "checkpoint_step_25" / "README.md").read_text()
    save_again(run, step=30, provenance={**PROVENANCE, "lineage": "unknown"})
    folder = run / "checkpoints" / "checkpoint_step_30"
    card = (folder / "README.md").read_text()
    assert "**Lineage unknown.**" in card and "leak" not in card.lower()
    assert "Validation loss 1.0000 nats a token, of step 30" in card and "Test" not in card
    config = lmlib.RunConfig.load(run / "config.json")
    scores = {"val_loss": 1.0, "val_loss_stderr": 0.1, "val_documents": 30}
    scores |= {"test_loss": 2.0, "test_loss_stderr": 0.5, "test_documents": 3}
    checkpoint.write_card(folder, config, scores)
    card = (folder / "README.md").read_text()
    # By tables of the t distribution: 2.045 with 29 degrees of freedom, 4.303 with 2
    assert "1.0000 nats a token (95 % interval 0.7955 to 1.2045, 30 documents)" in card
    assert "2.0000 nats a token (95 % interval -0.1513 to 4.1513, few documents: 3)" in card
    assert checkpoint.newest_good(run, with_state=True) == folder


def test_code_in_a_model_folder_is_never_run(run, monkeypatch):
    """Nor does transformers ask on the terminal whether to run it."""
    folder = shutil.copytree(run / "checkpoints" / "checkpoint_step_20", run / "model")
    (folder / "checkpoint.json").unlink()
    (folder / "evil.py").write_text(f"open({str(run / 'owned')!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.setattr(
        "builtins.input", lambda *a: pytest.fail("transformers asked whether to run code")
    )
    for file, auto_map in (
        ("config.json", {"AutoConfig": "evil.Evil"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", None]}),
    ):
        before = (folder / file).read_text()
        for extra in ({}, {"model_type": "evil", "tokenizer_class": "Evil"}):
            (folder / file).write_text(
                json.dumps({**json.loads(before), "auto_map": auto_map, **extra})
            )
            with contextlib.suppress(ValueError):
                lmlib.load(folder)
        (folder / file).write_text(before)
    assert not (run / "owned").exists()


# What can run code from a file
UNSAFE_MODULES = {
    "pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "torch.distributed.checkpoint",
}
UNSAFE_CALLS = {
    "torch.load",
    "np.load",
    "eval",
    "exec",
    "compile",
    "__import__",
    "yaml.unsafe_load",
}


def test_library_never_unpickles_or_runs_code_from_files():
    """Checks every import and call in the library's syntax trees."""
    for file in (PROJECT_ROOT / "lmlib").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert not UNSAFE_MODULES & {alias.name for alias in node.names}, file
            if isinstance(node, ast.ImportFrom):
                assert node.module not in UNSAFE_MODULES, file
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert name not in UNSAFE_CALLS, file
                if name == "yaml.load":
                    assert ast.unparse(node.args[1]) == "_StrictLoader", file
                # "(": a method of what such a call returned
                if name.startswith("transformers.Auto") and "(" not in name:
                    assert given.get("trust_remote_code") == "False", (file, name)
