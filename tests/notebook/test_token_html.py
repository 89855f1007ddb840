"""What the model was thinking: numbers from the forward pass, text escaped."""

import pytest
import torch

import lmlib
from lmlib.notebook import token_html


@pytest.fixture(scope="module")
def loaded(trained):
    return lmlib.load(trained.run_dir)


def test_tokens_carry_the_models_own_probabilities(loaded):
    model, tokenizer = loaded
    ids = tokenizer("To be, or not to be", add_special_tokens=False)["input_ids"]
    tokens = token_html.tokens_of(model, tokenizer, ids, 2)
    assert len(tokens) == len(ids) - 2
    for place, token in enumerate(tokens, 2):  # the slow way: a pass for each token
        chances = model(torch.tensor([ids[:place]]))[0, -1].softmax(-1).detach()
        assert token.probability == pytest.approx(float(chances[ids[place]]), rel=1e-4)
        assert token.rank == int((chances > chances[ids[place]]).sum()) + 1
        assert token.alternatives[0][1] == pytest.approx(float(chances.max()), rel=1e-4)
    assert len(tokens[0].alternatives) == 10
    with pytest.raises(ValueError, match="nothing comes before it"):
        token_html.tokens_of(model, tokenizer, ids, 0)


def test_beyond_the_window_only_tokens_with_half_of_it_before_them_are_judged(loaded):
    model, tokenizer = loaded
    window = model.config.sequence_length
    ids = torch.randint(1, 500, (window + 9,)).tolist()
    assert len(token_html.tokens_of(model, tokenizer, ids, 3)) == window - window // 2


def test_likelier_is_blue_and_less_likely_orange():
    a, b = (token_html.Token("<b>", p, 1, [("<i>", p)]) for p in (0.1, 0.9))
    page = token_html.shade_difference("", [a, b], [b, a], ("step 1", "step <2>"))
    assert page.index(token_html.BLUE) < page.index(token_html.ORANGE)
    assert "<b>" not in page and "<i>" not in page and "<2>" not in page


def test_characters_of_several_tokens_stay_whole(loaded):
    model, tokenizer = loaded
    ids = tokenizer("Oh, a 🐎 in שלום!", add_special_tokens=False)["input_ids"]
    tokens = token_html.tokens_of(model, tokenizer, ids, 1)
    assert "".join(token.piece for token in tokens) == "Oh, a 🐎 in שלום!"[1:]
