"""Sampling against transformers and against its own definition."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import lmlib
from lmlib.generation.sampling import apply_repetition_penalty, decode, prefill, sample_token
from lmlib.generation.settings import Settings
from lmlib.generation.text import generate_ids


@pytest.fixture(scope="module")
def loaded(trained):
    return lmlib.load(trained.run_dir)


def test_greedy_ids_are_those_of_stock_generate(loaded, trained):
    model, tokenizer = loaded
    stock = AutoModelForCausalLM.from_pretrained(
        trained.run_dir / "checkpoints" / "checkpoint_step_20"
    )
    ids = torch.randint(1, 500, (3, 7), generator=torch.Generator().manual_seed(0))
    settings = GenerationConfig(
        max_new_tokens=30, min_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=0
    )
    theirs = stock.generate(ids, generation_config=settings, attention_mask=torch.ones_like(ids))[
        :, 7:
    ]
    ours = lmlib.generate(model, tokenizer, ids, max_new_tokens=30, temperature=0, ignore_eos=True)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (5, None, None),
        (None, 0.7, None),
        (20, 0.5, None),
        (1, 1.0, None),
        (None, 0.01, None),
        (None, None, 0.1),
        (9, 0.8, 0.2),
    ],
)
def test_filtered_probabilities_equal_those_of_transformers(top_k, top_p, min_p):
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)) * 3
    scores = logits / 0.7
    warpers = [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    for warper in warpers:
        scores = warper(None, scores)
    expected = scores.softmax(-1)[0]
    draws = 4000
    counts = torch.zeros(40)
    for number in range(draws):
        counts[sample_token(logits, (number + 0.5) / draws, 0.7, top_k, top_p, min_p)] += 1
    assert torch.allclose(counts / draws, expected, atol=2 / draws)


def test_top_k_keeps_tokens_tied_with_the_last():
    """As in transformers, which compares with the k-th score."""
    logits = torch.tensor([[1.0, 0.0, 1.0, 1.0, -1.0]])
    picked = {int(sample_token(logits, chance, 1.0, 2, None)) for chance in (0.1, 0.5, 0.9)}
    assert picked == {0, 2, 3}


def test_repetition_penalty_equals_transformers():
    logits, ids = (
        torch.randn(2, 40, generator=torch.Generator().manual_seed(1)),
        torch.tensor([[1, 2, 2], [5, 6, 7]]),
    )
    seen = torch.zeros(2, 40, dtype=torch.bool).scatter_(1, ids, True)
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits)
    assert torch.equal(apply_repetition_penalty(logits, seen, 1.3), theirs)


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_padded_prompts_are_continued_as_stock_generate_does_each_alone(loaded, trained, penalty):
    model, tokenizer = loaded
    stock = AutoModelForCausalLM.from_pretrained(
        trained.run_dir / "checkpoints" / "checkpoint_step_20"
    )
    prompts = ["To be, or not to be, that is the question", "My", "Once upon a time"]
    settings = GenerationConfig(
        **{
            "max_new_tokens": 25,
            "min_new_tokens": 25,
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": 0,
        },
        repetition_penalty=penalty,
    )
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    *_, ours = generate_ids(
        model,
        tokenizer,
        ids,
        Settings(25, 0, repetition_penalty=penalty, ignore_eos=True),
        as_text=False,
    )
    for row, text in zip(ids, ours, strict=True):
        row = torch.tensor([row])
        theirs = stock.generate(
            row, generation_config=settings, attention_mask=torch.ones_like(row)
        )[0, row.shape[1] :]
        assert text.ids == theirs.tolist()


@pytest.mark.parametrize(
    "shape",
    [
        *[
            {},
            {"q_lora_rank": 24, "rope_interleave": False},
            {"qk_nope_head_dim": 0},
            {"attention": "mha"},
        ],
        *[{"feed_forward": "moe"}, {"feed_forward": "moe", "attention": "mha"}],
    ],
)
def test_decoding_from_the_cache_equals_the_full_forward_pass(smoke, shape):
    """In float64: rows of different lengths, tokens one by one and in pieces."""
    model = lmlib.LanguageModel(smoke(**shape)).double().eval()
    close = (
        1e-5 if shape.get("feed_forward") == "moe" else 1e-12
    )  # the router computes in float32, as the stock classes' does
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.1, generator=generator)
    rows = [
        torch.randint(0, 512, (length,), generator=generator).tolist() for length in (3, 9, 1, 5)
    ]
    logits, cache = prefill(model, rows)
    for _ in range(6):
        for row, ours in zip(rows, logits, strict=True):
            assert torch.allclose(ours, model(torch.tensor([row]))[0, -1], rtol=0, atol=close)
        token = torch.randint(0, 512, (4,), generator=generator)
        for row, new in zip(rows, token.tolist(), strict=True):
            row.append(new)
        logits = decode(model, token, cache)
    ids = torch.randint(0, 512, (2, 30), generator=generator)
    cache = model.new_cache(2, 40)
    with torch.no_grad():
        pieces = [model(piece, cache) for piece in ids.split((7, 12, 1, 10), dim=1)]
        assert torch.allclose(torch.cat(pieces, dim=1), model(ids), rtol=0, atol=close)


def test_the_cache_holds_only_latents(loaded):
    model = loaded[0]
    _, cache = prefill(model, [[1, 2, 3]])
    c = model.config
    assert cache.memory.shape[-1] == c.kv_lora_rank + c.qk_rope_head_dim


def test_a_stop_string_ends_the_text_after_it(loaded):
    free = lmlib.generate(*loaded, "To be", max_new_tokens=40, seed=5, ignore_eos=True)[0]
    stop = free[10:13]
    text = lmlib.generate(
        *loaded, "To be", max_new_tokens=40, seed=5, ignore_eos=True, stop_strings=stop
    )[0]
    assert text == free[: free.index(stop) + 3]
    assert (
        "".join(
            lmlib.stream(
                *loaded, "To be", 40, seed=5, ignore_eos=True, stop_strings=[stop, "never"]
            )
        )
        == text
    )


def test_past_the_context_window_generation_slides_or_stops(loaded):
    model, tokenizer = loaded
    ids, window = torch.tensor([[5, 6, 7], [8, 9, 10]]), model.config.sequence_length
    stopped = lmlib.generate(
        model, tokenizer, ids, window, temperature=0, ignore_eos=True, past_window="stop"
    )
    slid = lmlib.generate(model, tokenizer, ids, window, temperature=0, ignore_eos=True)
    assert stopped.shape == (2, window - 3) and torch.equal(slid[:, : window - 3], stopped)
    full = torch.full((1, window), 5)
    assert lmlib.generate(model, None, full, 5, ignore_eos=True, past_window="stop").shape == (1, 0)


def test_a_seed_gives_the_same_text_alone_and_in_a_batch(loaded):
    together = lmlib.generate(*loaded, ["To be", "Once upon", ""], max_new_tokens=20, seed=3)
    alone = [
        lmlib.generate(*loaded, [prompt], max_new_tokens=20, seed=3)[0]
        for prompt in ("To be", "Once upon", "")
    ]
    assert together == alone and all(together)
    assert lmlib.generate(*loaded, "To be", max_new_tokens=20, seed=4) != alone[:1]
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    rows = lmlib.generate(*loaded, ids, max_new_tokens=10, seed=1, ignore_eos=True)
    assert rows.shape == (2, 10)
    assert torch.equal(
        rows[1:], lmlib.generate(*loaded, ids[1:], max_new_tokens=10, seed=1, ignore_eos=True)
    )


def test_pieces_are_whole_characters_and_add_up(loaded, monkeypatch):
    model, tokenizer = loaded
    pieces = list(
        lmlib.stream(
            model,
            tokenizer,
            "Hello",
            max_new_tokens=200,
            temperature=3.0,
            top_k=0,
            top_p=1.0,
            seed=1,
        )
    )
    assert "".join(pieces) == lmlib.generate(model, tokenizer, "Hello", 200, 3.0, 0, 1.0, seed=1)[0]

    script = tokenizer("a🐎b", add_special_tokens=False)["input_ids"]
    assert len(script) > 3  # the horse is several tokens
    monkeypatch.setattr(
        "lmlib.generation.text.sample_ids", lambda *a: (torch.tensor([token]) for token in script)
    )
    pieces = list(lmlib.stream(model, tokenizer, "x", max_new_tokens=len(script)))
    assert [piece for piece in pieces if piece] == ["a", "🐎", "b"]


def test_a_text_ends_at_the_end_of_text_token(loaded):
    model, tokenizer = loaded
    ids = torch.tensor([[5, 6, 7]])
    settings = {"max_new_tokens": 30, "temperature": 2.0, "top_k": 0, "seed": 1}
    free = lmlib.generate(model, tokenizer, ids, ignore_eos=True, **settings)[0].tolist()
    end = next(i for i, token in enumerate(free) if token not in free[:i] and i >= 2)

    class Other:
        eos_token_id = free[end]

    assert lmlib.generate(model, Other, ids, **settings)[0].tolist() == free[: end + 1]


def test_generation_continues_beyond_the_context_window(loaded):
    model, tokenizer = loaded
    window = model.config.sequence_length
    ids = lmlib.generate(
        model, tokenizer, torch.tensor([[5]]), window + 20, temperature=0, ignore_eos=True
    )
    assert ids.shape == (1, window + 20)
    everything = torch.cat((torch.tensor([[5]]), ids), dim=1)
    last = model(everything[:, -window - 1 : -1])[:, -1].argmax(-1)
    assert last == everything[:, -1]


def test_the_model_stays_in_its_mode(loaded):
    model, tokenizer = loaded
    model.train()
    lmlib.generate(model, tokenizer, "To", max_new_tokens=2)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": "warm"}, "temperature is 'warm'"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 10_000}, "top_k is 10000; write 1 to 512"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"seed": -5}, "seed is -5"),
        ({"seed": 10**400}, "seed is 1000"),
        ({"min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"stop_strings": [""]}, "none of them empty"),
        ({"past_window": "jump"}, "write 'slide' or 'stop'"),
    ],
)
def test_settings_out_of_range_are_named(loaded, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        lmlib.generate(*loaded, ["x"], **settings)


def test_a_prompt_must_be_text_and_fit_the_window(loaded):
    with pytest.raises(ValueError, match="the model's context window is 64: shorten the prompt"):
        lmlib.generate(*loaded, ["word " * 200])
    with pytest.raises(ValueError, match="A prompt must be text"):
        lmlib.generate(*loaded, [5])
    with pytest.raises(ValueError, match="ids must lie between 0 and 511"):
        lmlib.generate(*loaded, torch.tensor([[512]]))
