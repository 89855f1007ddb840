"""lmlib generate --mode chat: turns in the form of a chat template, each to its end."""

import shutil

import pytest
import torch
import transformers

import lmlib
from lmlib.cli import generate
from lmlib.cli.parser import main
from lmlib.generation.settings import Settings

TEMPLATE = (
    "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}"
    "{{ eos_token if turn.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SETTINGS = {"temperature": 1, "max_new_tokens": 8}
WORDS = ["--temperature", "1", "--max-new-tokens", "8", "--mode", "chat"]


@pytest.fixture
def folder(trained, tmp_path):
    """A Hugging Face folder with a chat template."""
    folder = tmp_path / "chat"
    shutil.copytree(trained.run_dir / "checkpoints" / "checkpoint_step_20", folder)
    (folder / "checkpoint.json").unlink()
    save(folder, chat_template=TEMPLATE)
    return folder


def save(folder, **changes):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **changes)
    tokenizer.save_pretrained(folder)


def chat(folder, monkeypatch, capsys, *lines) -> str:
    """Return what a session that ends with the end of input shows."""
    typed = iter(lines)

    def answer(question):
        line = next(typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", answer)
    assert main(["generate", str(folder), *WORDS]) == 0
    return capsys.readouterr().out


def test_each_answer_follows_all_turns(folder, monkeypatch, capsys):
    shown = chat(folder, monkeypatch, capsys, "To be?", "", "Or not?", "quit", "never read")
    model, tokenizer = lmlib.load(folder)
    turns, found = "", []
    for line in ("To be?", "Or not?"):
        turns += f"user: {line}\n"
        found += lmlib.generate(model, tokenizer, [f"{turns}assistant:"], **SETTINGS)
        turns += f"assistant: {found[-1]}<|endoftext|>"
        assert f"🤖 {found[-1]}\n(8 tokens" in shown
    assert shown.count("🤖") == 2 and found[0] != found[1]


def test_an_answer_ends_at_the_end_of_turn_token(folder, monkeypatch, capsys):
    """A token of the template, which is not the one that ends a text."""
    model, tokenizer = lmlib.load(folder)
    prompt = tokenizer.encode("user: To be?\nassistant:")
    [whole] = lmlib.generate(model, tokenizer, torch.tensor([prompt]), **SETTINGS).tolist()
    end = next(id for id in whole[2:] if id not in [*whole[:2], *prompt])
    token = tokenizer.convert_ids_to_tokens(end)
    template = TEMPLATE.replace("{{ eos_token if", f"{{{{ '{token}' if")
    save(folder, chat_template=template, extra_special_tokens=[token])
    shown = chat(folder, monkeypatch, capsys, "To be?")
    assert f"({whole.index(end) + 1} tokens" in shown and "end-of-text token" in shown


def test_the_oldest_turns_are_left_out_when_the_window_is_full(folder, capsys):
    model, tokenizer = lmlib.load(folder)
    assert model.config.sequence_length == 64
    settings = Settings(temperature=1, max_new_tokens=30)
    session, turns = generate.Session(str(folder), model, tokenizer, settings), []
    for number in range(12):
        turns = generate._answer(session, [*turns, {"role": "user", "content": f"To be {number}"}])
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
    assert 2 <= len(turns) < 12 and turns[-2]["content"] == "To be 11"
    shown = capsys.readouterr().out
    assert shown.count("🤖") == 12 and "longer than the context window" not in shown


def test_ctrl_c_keeps_what_was_said(folder, capsys, monkeypatch):
    model, tokenizer = lmlib.load(folder)
    session = generate.Session(str(folder), model, tokenizer, Settings(**SETTINGS))
    whole = generate.generation.generate_ids

    def interrupted(*given):
        for number, texts in enumerate(whole(*given)):
            if number == 3:
                raise KeyboardInterrupt
            yield texts

    monkeypatch.setattr(generate.generation, "generate_ids", interrupted)
    turns = generate._answer(session, [{"role": "user", "content": "To be?"}])
    shown = capsys.readouterr().out
    assert shown == f"🤖 {turns[-1]['content']}\n(stopped)\n\n" and turns[-1]["content"]


@pytest.mark.parametrize(
    "template",
    ["{% for turn in messages %}<|u|>{{ turn.content }}<|a|>{% endfor %}", "<|a|>An example."],
)
def test_a_template_without_an_end_of_turn_leaves_the_end_of_text(
    folder, monkeypatch, capsys, template
):
    """A special token before the answer does not end it."""
    save(folder, chat_template=template.replace("<|a|>{% end", "{% end"))
    save(folder, extra_special_tokens=["<|u|>", "<|a|>"])
    model, tokenizer = lmlib.load(folder)
    session, seen = generate.Session(str(folder), model, tokenizer, Settings(**SETTINGS)), []
    monkeypatch.setattr(
        "builtins.input", lambda question: seen.append(tokenizer.eos_token) or "quit"
    )
    generate._chat(session)
    assert seen == ["<|endoftext|>"]


def test_a_template_that_refuses_is_said(folder, monkeypatch, capsys):
    save(folder, chat_template="{{ raise_exception('no system turn') }}")
    assert main(["generate", str(folder), *WORDS]) == 1
    assert "The chat template of" in (said := capsys.readouterr().err)
    assert "fails: no system turn" in said and "Traceback" not in said


def test_what_cannot_be_said(folder, trained, monkeypatch, capsys):
    assert main(["generate", str(trained.run_dir), *WORDS]) == 1
    said = capsys.readouterr().err
    assert "has no chat template" in said and "docs/finetuning.md" in said
    assert main(["generate", str(folder), *WORDS, "--prompts", "To be"]) == 1
    assert "belong to --mode batch" in capsys.readouterr().err
    shown = chat(folder, monkeypatch, capsys, "To be " * 100, KeyboardInterrupt(), "To be?")
    assert "Error: The prompt has" in shown and "(type quit to leave)" in shown
    assert shown.count("🤖") == 2 and "(8 tokens" in shown  # the first answer is empty
