"""lmlib push, to a Hub on this machine that speaks HTTP."""

import json
import shutil

import pytest
import transformers
from hub import hub
from huggingface_hub import ModelCard, constants

import lmlib
from lmlib.cli.parser import main
from lmlib.leaks import LEAKY

# huggingface_hub's own call, in what it does without Xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def server(monkeypatch, tmp_path):
    with hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", "good")
        yield server


def push(run, *words) -> int:
    return main(["push", str(run), "owner/name", *map(str, words)])


@pytest.fixture
def leaky(trained, tmp_path):
    """A checkpoint that is marked as leaky."""
    folder = tmp_path / "leaky"
    shutil.copytree(trained.run_dir / "checkpoints" / "checkpoint_step_20", folder)
    (folder / "checkpoint.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {LEAKY: "split"}))
    return folder


def test_a_checkpoint_is_sent_whole(trained, server, tmp_path, capsys):
    assert push(trained.run_dir, "--yes") == 0
    shown, sent = capsys.readouterr().out, server.repositories["owner/name"]
    folder = trained.run_dir / "checkpoints" / "checkpoint_step_20"
    ours = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert sent == {"private": True, "files": ours}
    assert {"README.md", "model.safetensors", "training_curves.png"} <= ours.keys()
    assert "training_state" not in shown and all(f"MB  {name}\n" in shown for name in ours)
    assert "to the private repository owner/name, which is made." in shown
    received = tmp_path / "received"
    received.mkdir()
    for name, content in sent["files"].items():
        (received / name).write_bytes(content)
    lmlib.load(received)  # which verifies it
    assert ModelCard.load(received / "README.md").data.eval_results


def test_another_step_and_public(trained, server, capsys):
    assert push(trained.run_dir, "--step", 10, "--public", "--yes") == 0
    sent = server.repositories["owner/name"]
    assert not sent["private"] and "to the PUBLIC repository" in capsys.readouterr().out
    assert json.loads(sent["files"]["checkpoint.json"])["step"] == 10


def test_nothing_is_sent_without_a_yes(trained, server, monkeypatch, capsys):
    assert push(trained.run_dir) == 0  # standard input is no terminal
    assert "Nothing is sent" in capsys.readouterr().out and not server.repositories
    for answer, count in [("n", 0), ("", 0), ("y", 1)]:
        monkeypatch.setattr("sys.stdin.isatty", lambda: True)
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        assert push(trained.run_dir) == 0 and len(server.repositories) == count


def test_what_exists_keeps_its_visibility(trained, server, capsys):
    server.repositories["owner/name"] = {"private": False, "files": {"LICENSE": b"mine"}}
    assert push(trained.run_dir, "--yes") == 1
    assert "owner/name exists and is public: add --public" in capsys.readouterr().err
    assert push(trained.run_dir, "--public", "--yes") == 0
    assert "exists: files of these names are replaced" in capsys.readouterr().out
    files = server.repositories["owner/name"]["files"]
    assert files["LICENSE"] == b"mine" and "model.safetensors" in files


def test_a_leaky_model_needs_leaky(leaky, server, capsys):
    assert push(leaky, "--yes") == 1
    assert "This model leaks (split)" in capsys.readouterr().err and not server.repositories
    for name in ("training_args.bin", "data.pkl", "model.ckpt"):
        (leaky / name).write_bytes(b"a pickle, as a Trainer leaves it")
    assert push(leaky, "--leaky", "--yes") == 0
    assert "This model LEAKS (split)." in capsys.readouterr().out
    files = server.repositories["owner/name"]["files"]
    assert not files.keys() & {"training_args.bin", "data.pkl", "model.ckpt"}
    assert "lineage.bin" in files
    card = ModelCard(files["README.md"].decode())  # that of the folder does not know
    assert "> **This model leaks (split).**" in card.text and "Validation loss" in card.text
    assert card.data.tags == ["lmlib", "leaky"] and card.data.eval_results is None


def test_a_leaky_model_without_a_card_gets_one(leaky, server, trained, capsys):
    (leaky / "README.md").unlink()
    assert push(leaky, "--leaky", "--yes") == 0
    files = server.repositories["owner/name"]["files"]
    assert "This model leaks (split)" in ModelCard(files["README.md"].decode()).text
    config = json.loads((leaky / "config.json").read_text())
    (leaky / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != LEAKY}))
    capsys.readouterr()
    assert push(leaky) == 0
    assert "There is no model card" in capsys.readouterr().out


def test_no_token_a_bad_token_and_no_network(trained, server, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "bad")
    assert push(trained.run_dir, "--yes") == 1
    assert "`hf auth login` takes another one" in capsys.readouterr().err
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    assert push(trained.run_dir, "--yes") == 1
    assert "Is there a network?" in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    assert push(trained.run_dir, "--yes") == 1
    said = capsys.readouterr().err
    assert "There is no token" in said and "`hf auth login` or set HF_TOKEN" in said
    assert not server.repositories


def test_an_upload_that_fails_says_so(trained, server, capsys):
    server.is_full = True
    assert push(trained.run_dir, "--yes") == 1
    said = capsys.readouterr().err
    assert "could not be sent: Error while uploading" in said
    assert "The Hub answered with status 507." in said and "network" not in said
    assert server.repositories["owner/name"]["files"] == {}
    server.is_full = False
    assert push(trained.run_dir, "--yes") == 0 and server.repositories["owner/name"]["files"]


def test_what_cannot_be_sent(trained, smoke, server, tmp_path, capsys):
    folder = trained.run_dir / "checkpoints" / "checkpoint_step_20"
    empty, gpt2, mixed, damaged = smoke().run_dir, *(tmp_path / name for name in "gmd")
    empty.mkdir(parents=True)
    small = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8)
    transformers.GPT2LMHeadModel(small).save_pretrained(gpt2)
    shutil.copytree(folder, damaged)
    (damaged / "tokenizer.json").write_text("{}")
    shutil.copytree(folder, mixed)
    (mixed / "checkpoint.json").unlink()
    tokenizer = transformers.AutoTokenizer.from_pretrained(mixed)
    tokenizer.add_tokens(["HAMLET"])
    tokenizer.save_pretrained(mixed)
    for run, said in [
        (empty, "neither a run with checkpoints nor a model folder"),
        (gpt2, "holds a gpt2 model; lmlib reads"),
        (damaged, "tokenizer.json has changed"),
        (mixed, "tokens, and its model rows for"),
        (trained.run_dir.parent / "trainde", "did you mean"),
    ]:
        assert push(run, "--yes") == 1
        assert said in capsys.readouterr().err
    assert main(["push", str(folder), "name", "--yes"]) == 1
    assert "write OWNER/NAME" in capsys.readouterr().err
    assert main(["push", str(folder), "owner/na me", "--yes"]) == 1
    assert "Repo id must" in capsys.readouterr().err
    assert not server.repositories
