"""Tokens with their probabilities: numbers from the forward pass, escaped text."""

import pytest
import torch

import lmlib
from lmlib.generation.text import Continuation
from lmlib.notebook import token_html


@pytest.fixture(scope="module")
def loaded(trained):
    return lmlib.load(trained.run_dir)


def test_tokens_have_the_probabilities_of_the_forward_pass(loaded):
    model, tokenizer = loaded
    ids = tokenizer("To be, or not to be", add_special_tokens=False)["input_ids"]
    unscored, tokens = token_html.score_tokens(model, tokenizer, Continuation(ids[:2], ids[2:]))
    assert len(tokens) == len(ids) - 2 and unscored == ""
    for position, token in enumerate(tokens, 2):  # the slow way: one pass per token
        probabilities = model(torch.tensor([ids[:position]]))[0, -1].softmax(-1).detach()
        assert token.probability == pytest.approx(float(probabilities[ids[position]]), rel=1e-4)
        assert token.rank == int((probabilities > probabilities[ids[position]]).sum()) + 1
        assert token.alternatives[0][1] == pytest.approx(float(probabilities.max()), rel=1e-4)
    assert len(tokens[0].alternatives) == 10
    with pytest.raises(ValueError, match="nothing comes before it"):
        token_html.score_tokens(model, tokenizer, Continuation([], ids))


def test_beyond_the_window_only_tokens_with_half_a_window_before_them_are_scored(loaded):
    model, tokenizer = loaded
    window = model.config.sequence_length
    ids = torch.randint(1, 500, (window + 9,)).tolist()
    unscored, tokens = token_html.score_tokens(model, tokenizer, Continuation(ids[:3], ids[3:]))
    assert len(tokens) == window - window // 2
    assert unscored == tokenizer.decode(ids[3 : -len(tokens)], skip_special_tokens=True) != ""


def test_likelier_is_blue_and_less_likely_orange():
    a, b = (token_html.Token("<b>", p, 1, [("<i>", p)]) for p in (0.1, 0.9))
    page = token_html.shade_difference("", [a, b], [b, a], ("step 1", "step <2>"))
    assert page.index(token_html.BLUE) < page.index(token_html.ORANGE)
    assert "<b>" not in page and "<i>" not in page and "<2>" not in page


def test_characters_made_of_several_tokens_stay_complete(loaded):
    model, tokenizer = loaded
    ids = tokenizer("Oh, a 🐎 in שלום!", add_special_tokens=False)["input_ids"]
    _, tokens = token_html.score_tokens(model, tokenizer, Continuation(ids[:1], ids[1:]))
    assert "".join(token.piece for token in tokens) == "Oh, a 🐎 in שלום!"[1:]
