"""Checkpoints: their files, that stock transformers loads them, and that corruption is detected."""

import ast
import contextlib
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from survival import CORRUPTIONS, FILES

import lmlib
from lmlib import checkpoint
from lmlib.files import PROJECT_ROOT
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
        assert set(files_of(folder)) == model_files | state
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


def save_again(run, background=False, step=25, scheduled=True):
    source = run / "checkpoints" / "checkpoint_step_20"
    model, tokenizer = lmlib.load(run, 20)
    saver = checkpoint.Saver(background)
    optimizer = checkpoint.read_optimizer(source)
    scores = {"scores": {"val_loss": 1.0}, "scored": step}
    saver.save(
        run,
        huggingface.model_tensors(model),
        optimizer,
        config=lmlib.RunConfig.load(run / "config.json"),
        tokenizer=tokenizer,
        scheduled=scheduled,
        state={"step": step, **scores},
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
