"""lmlib export --gguf, without llama.cpp: what is written, what is refused."""

import resource
import sys

import gguf
import pytest
import torch
import transformers
from models import SMALL, write_model

import lmlib
from lmlib.cli.parser import main
from lmlib.errors import UserError
from lmlib.tools.gguf import export

VARIANTS = {
    "latent": {},
    "q_lora": {"q_lora_rank": 24, "tie_word_embeddings": False},
    "llama": {"attention": "mha"},
}


def read(file) -> tuple[dict, dict]:
    """Return a GGUF file's settings and its tensors."""
    reader = gguf.GGUFReader(file)
    settings = {name: field.contents() for name, field in reader.fields.items()}
    return settings, {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}


@pytest.fixture
def text(text_file) -> str:
    return text_file.read_text()


@pytest.mark.parametrize("parameters", [VARIANTS["latent"], VARIANTS["q_lora"]])
def test_latent_attention_is_deepseek2(tmp_path, text, parameters):
    folder, file = write_model(tmp_path / "model", text, **parameters), tmp_path / "m.gguf"
    export(folder, file)
    settings, tensors = read(file)
    model, _ = lmlib.load(folder)
    assert settings["general.architecture"] == "deepseek2"
    assert settings["deepseek2.attention.q_lora_rank"] == (model.config.q_lora_rank or 0)
    assert settings["deepseek2.attention.head_count_kv"] == 1
    assert settings["deepseek2.attention.key_length"] == 16 + 8
    assert settings["deepseek2.attention.key_length_mla"] == 12 + 8
    assert settings["tokenizer.ggml.pre"] == "gpt-2"
    assert ("output.weight" in tensors) == (not model.config.tie_word_embeddings)
    # A query's product with an expanded key is that of the absorbed query with the latent.
    expand = model.model.layers[1].self_attn.kv_b_proj
    latent, query = torch.randn(16), torch.randn(4, 12)
    keys, values = expand(latent).view(4, 32).split((12, 20), dim=-1)
    absorbed = torch.einsum("hld,hd->hl", tensors["blk.1.attn_k_b.weight"], query)
    torch.testing.assert_close(absorbed @ latent, (query * keys).sum(-1))
    torch.testing.assert_close(tensors["blk.1.attn_v_b.weight"] @ latent, values)


def test_transformers_reads_plain_attention_back(tmp_path, text):
    folder, file = write_model(tmp_path / "model", text, **VARIANTS["llama"]), tmp_path / "m.gguf"
    export(folder, file)
    model, tokenizer = lmlib.load(folder)
    read_back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    ids = torch.tensor([tokenizer.encode("To be, or not to be")])
    torch.testing.assert_close(read_back.eval()(ids).logits, model(ids), rtol=0, atol=1e-5)


def test_rows_without_a_token_are_unused(tmp_path, text):
    folder, file = write_model(tmp_path / "model", text), tmp_path / "m.gguf"
    tokenizer = lmlib.load(folder)[1]
    export(folder, file)
    settings, tensors = read(file)
    tokens, kinds = (settings[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    assert len(tokens) == len(kinds) == len(tensors["token_embd.weight"]) == SMALL["vocab_size"]
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert set(kinds[len(tokenizer) :]) == {gguf.TokenType.UNUSED}
    assert kinds[tokenizer.eos_token_id] == gguf.TokenType.CONTROL


def test_a_chat_template_is_kept(tmp_path, text):
    folder = write_model(tmp_path / "model", text)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    export(folder, tmp_path / "m.gguf")
    assert read(tmp_path / "m.gguf")[0]["tokenizer.chat_template"] == tokenizer.chat_template


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"feed_forward": "moe"}, "it has experts"),
        ({"rope_interleave": False}, "rotate halves"),
        ({"qk_nope_head_dim": 0}, "rotated dimensions alone"),
        ({"q_lora_rank": 24, "num_hidden_layers": 27}, "26 or 27 layers"),
        ({"attention_bias": True}, "its attention has biases"),
        ({"causal_mask": False}, "no causal mask"),
        ({"vocab_size": 299}, "has 300 tokens, and the model rows for 299"),
    ],
)
def test_what_was_not_proved_is_refused(tmp_path, text, parameters, reason):
    folder = write_model(tmp_path / "model", text, **parameters)
    with pytest.raises(UserError, match=f"cannot be exported: .*{reason}"):
        export(folder, tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_tokenizers_are_refused(tmp_path, text):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    def wrap(change) -> transformers.PreTrainedTokenizerFast:
        bpe = lmlib.data.tokenizer.train_tokenizer([text], 300).backend_tokenizer
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=change(bpe) or bpe, eos_token="<|endoftext|>"
        )

    def add_token(bpe):
        bpe.post_processor = processors.TemplateProcessing(
            "<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )

    def add_words(bpe):
        bpe.add_tokens(["HAMLET"])

    def words(bpe):
        return Tokenizer(models.WordLevel({"<|endoftext|>": 0, "to": 1}, "to"))

    def normalize(bpe):
        bpe.normalizer = normalizers.NFC()

    def split(bpe):
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )

    for change in (add_token, add_words, words, normalize, split):
        folder = write_model(tmp_path / change.__name__, text, wrap(change))
        said = {"add_token": "adds tokens", "add_words": "that are ordinary text"}
        with pytest.raises(UserError, match=said.get(change.__name__, "as GPT-2's")):
            export(folder, tmp_path / "m.gguf")


def test_a_leaky_model_says_so(tmp_path, text, capsys):
    folder, file = write_model(tmp_path / "model", text, leaks="split"), tmp_path / "m.gguf"
    assert main(["export", str(folder), "--gguf", str(file)]) == 0
    assert "This model LEAKS (split)" in capsys.readouterr().err
    settings, _ = read(file)
    assert settings["lmlib_leaky"] == "split" and settings["general.name"] == "m (LEAKY)"


def test_exports_that_cannot_be_made(tmp_path, text, smoke, capsys):
    config, other = smoke(), tmp_path / "gpt2"
    config.run_dir.mkdir(parents=True)
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8)
    ).save_pretrained(other)
    (tmp_path / "taken.gguf").write_text("")
    folder = write_model(tmp_path / "model", text)
    for run, name, said in [
        (folder, "taken.gguf", "taken.gguf exists"),
        (folder, "nowhere/m.gguf", "There is no folder"),
        (tmp_path / "modle", "m.gguf", "did you mean"),
        (config.run_dir, "m.gguf", "neither a run with checkpoints nor a model folder"),
        (other, "m.gguf", "holds a gpt2 model; lmlib reads deepseek_v3"),
    ]:
        assert main(["export", str(run), "--gguf", str(tmp_path / name)]) == 1
        assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.glob("*.gguf")) == ["taken.gguf"]


def test_a_full_disk_leaves_no_file(tmp_path, text, capsys):
    folder, file = write_model(tmp_path / "model", text), tmp_path / "m.gguf"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # bytes of a file
    try:
        status = main(["export", str(folder), "--gguf", str(file)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 1 and "free some space" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert main(["export", str(folder), "--gguf", str(file)]) == 0


@pytest.mark.parametrize(
    ("package", "command", "extra"),
    [("gguf", ["export", "--gguf", "m.gguf"], "export"), ("lm_eval", ["benchmark"], "eval")],
)
def test_an_absent_extra_is_named(tmp_path, text, monkeypatch, capsys, package, command, extra):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    folder = write_model(tmp_path / "model", text)
    assert main([command[0], str(folder), *command[1:]]) == 1
    said = f'needs the {extra} packages: pip install -e ".[{extra}]".'
    assert said in capsys.readouterr().err
