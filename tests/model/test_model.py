"""The model compared with stock transformers and with slow, obvious versions."""

import pytest
import torch
import torch.nn.functional as F
import transformers

from lmlib.config import RunConfig
from lmlib.files import PROJECT_ROOT
from lmlib.model import huggingface
from lmlib.model.attention import causal_attention
from lmlib.model.loss import HeadLoss
from lmlib.model.moe import (
    expert_load,
    grouped_linear,
    reset_router_load,
    routers,
    update_router_bias,
)
from lmlib.model.size import flops_per_token, parameter_count
from lmlib.model.transformer import LanguageModel

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 80,
}
MLA = {"kv_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 16}
MOE = {
    "feed_forward": "moe",
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
SHAPES = {
    "usual": {**MLA, "q_lora_rank": 24},
    "uncompressed query": MLA,
    "half-split rotation": {**MLA, "q_lora_rank": 24, "rope_interleave": False},
    "no unrotated dimensions": {**MLA, "q_lora_rank": 24, "qk_nope_head_dim": 0},
    "biases": {**MLA, "q_lora_rank": 24, "attention_bias": True},
    "values wider than keys": {**MLA, "v_head_dim": 40},
    "untied": {**MLA, "tie_word_embeddings": False},
    "hidden size not a multiple of the heads": {
        **MLA,
        "num_attention_heads": 7,
        "rope_theta": 500.0,
    },
    "plain attention": {"attention": "mha"},
    "plain attention, biases, untied": {
        "attention": "mha",
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "experts": {**MLA, **MOE},
    "experts, one product per group": {**MLA, **MOE, "num_experts": 3, "moe_intermediate_size": 21},
    "experts, plain attention": {"attention": "mha", **MOE},
    "experts, plain attention, biases": {
        "attention": "mha",
        **MOE,
        "attention_bias": True,
        "num_experts_per_tok": 3,
    },
}


def pair(overrides) -> tuple[LanguageModel, torch.nn.Module]:
    """Return our model and the stock one in float64, with equal weights, none of them zero."""
    config = RunConfig(**{**SHAPE, **overrides})
    ours = LanguageModel(config)
    generator = torch.Generator().manual_seed(1)
    for tensor in (*ours.parameters(), *ours.buffers()):
        torch.nn.init.normal_(tensor, std=0.3, generator=generator)
    settings = huggingface.stock_config(config)
    settings._experts_implementation = (
        "eager"  # a loop over experts: torch's grouped product lacks float64
    )
    stock = getattr(transformers, settings.architectures[0])._from_config(
        settings, attn_implementation="sdpa"
    )
    stock.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(stock.state_dict(), strict=True)
    return ours.double(), stock.double()


@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_gradients_match_the_stock_class(name):
    ours, stock = pair(SHAPES[name])
    ids = torch.randint(0, 300, (2, 41), generator=torch.Generator().manual_seed(2))
    x, y = ids[:, :-1], ids[:, 1:]
    assert torch.allclose(ours(x), stock(x).logits, rtol=0, atol=1e-9)
    ours.loss(x, y).backward()
    F.cross_entropy(stock(x).logits.flatten(0, 1), y.flatten()).backward()
    theirs = dict(stock.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, theirs[parameter_name].grad, rtol=0, atol=1e-9), (
            parameter_name
        )
    assert {n for n, _ in ours.named_parameters()} == theirs.keys()


@pytest.mark.parametrize(
    ("recipe", "count"),
    [("exp9", 148_279_808), ("exp9_compact", 69_625_088), ("exp8/attention_mlp_512d", 36_281_024)],
)
def test_recipes_have_the_published_parameter_counts(recipe, count):
    with torch.device("meta"):
        model = LanguageModel(RunConfig.load(PROJECT_ROOT / "params" / f"{recipe}.yaml"))
    assert parameter_count(model) == count


@pytest.mark.parametrize(
    "name", ["usual", "plain attention", "experts", "experts, plain attention"]
)
def test_no_logit_depends_on_a_later_token(name):
    model, _ = pair(SHAPES[name])
    ids = torch.randint(0, 300, (1, 24), generator=torch.Generator().manual_seed(3))
    before = model(ids)
    for position in range(1, 24):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] + 1) % 300
        after = model(changed)
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.allclose(after[:, position:], before[:, position:])


@pytest.mark.parametrize("widths", [(8, 8), (12, 5), (5, 12)])
def test_causal_attention_matches_the_explicit_softmax(widths):
    generator = torch.Generator().manual_seed(4)
    q, k = (torch.randn(2, 3, 9, widths[0], generator=generator).double() for _ in range(2))
    v = torch.randn(2, 3, 9, widths[1], generator=generator).double()
    scores = (q @ k.transpose(-1, -2) / widths[0] ** 0.5).masked_fill(
        torch.ones(9, 9).triu(1).bool(), -torch.inf
    )
    assert torch.allclose(causal_attention(q, k, v), scores.softmax(-1) @ v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [7, 64, 1000])
def test_the_chunked_head_loss_matches_cross_entropy(rows, monkeypatch):
    monkeypatch.setattr(HeadLoss, "rows", rows)
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(100, 16, generator=generator).double().requires_grad_()
    weight = torch.randn(50, 16, generator=generator).double().requires_grad_()
    targets = torch.randint(0, 50, (100,), generator=generator)
    ours = HeadLoss.apply(hidden, weight, targets) * 3
    expected = F.cross_entropy(hidden @ weight.T, targets) * 3
    assert torch.allclose(ours, expected, rtol=0, atol=1e-12)
    for our, their in zip(
        torch.autograd.grad(ours, (hidden, weight)),
        torch.autograd.grad(expected, (hidden, weight)),
        strict=True,
    ):
        assert torch.allclose(our, their, rtol=0, atol=1e-12)


def test_initial_weights_depend_on_the_seed_alone_and_leave_the_global_rng_unchanged():
    config = RunConfig(**SHAPE)
    state = torch.random.get_rng_state()
    first, again = LanguageModel(config), LanguageModel(config)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = LanguageModel(RunConfig(**SHAPE, seed=1))
    embedding = [model.model.embed_tokens.weight for model in (first, again, other)]
    assert torch.equal(embedding[0], embedding[1]) and not torch.equal(embedding[0], embedding[2])
    assert first.lm_head.weight is first.model.embed_tokens.weight


def test_dropout_is_active_in_training_mode_only():
    model = LanguageModel(RunConfig(**SHAPE, dropout=0.5))
    ids = torch.zeros(1, 4, dtype=torch.long)
    assert torch.equal(model.eval()(ids), model(ids))
    assert not torch.equal(model.train()(ids), model(ids))


def test_flops_count_matrix_products_and_attention():
    model = LanguageModel(RunConfig(**SHAPE, **MLA, sequence_length=63))
    matrices = sum(
        p.numel() for n, p in model.named_parameters() if p.dim() == 2
    )  # tied: the embedding once, as the head
    attention = (
        3 * 2 * 3 * 3 * (20 + 16) * 32
    )  # forward + 2 backward, 2 operations, layers, heads, widths, mean context
    assert flops_per_token(model) == 6 * matrices + attention


@pytest.mark.parametrize("width", [24, 21])  # F.grouped_mm supports the strides of the first
def test_grouped_linear_matches_a_product_per_group(width):
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(12, width, generator=generator).requires_grad_()
    weight = torch.randn(4, 2 * width, width, generator=generator).requires_grad_()
    ends = torch.tensor([5, 5, 6, 12])  # one group is empty
    expected = torch.cat([x[:5] @ weight[0].T, x[5:6] @ weight[2].T, x[6:] @ weight[3].T])
    ours = grouped_linear(x, weight, ends)
    assert torch.allclose(ours, expected, rtol=0, atol=1e-5)
    cotangent = torch.randn(12, 2 * width, generator=generator)
    for our, their in zip(
        torch.autograd.grad(ours, (x, weight), cotangent),
        torch.autograd.grad(expected, (x, weight), cotangent),
        strict=True,
    ):
        assert torch.allclose(our, their, rtol=0, atol=1e-4)


def test_router_biases_balance_the_load_of_training():
    model = LanguageModel(RunConfig(**SHAPE, **MLA, **MOE))
    ids = torch.randint(0, 300, (4, 32), generator=torch.Generator().manual_seed(7))
    reset_router_load(model)
    model.train()(ids)
    model.eval()(ids)  # evaluation does not count
    loads = [router.load.clone() for router in routers(model)]
    assert [int(load.sum()) for load in loads] == [4 * 32 * 2] * 3
    assert all(abs(sum(layer) - 1) < 1e-3 and len(layer) == 5 for layer in expert_load(model))
    update_router_bias(model)
    for router, load in zip(routers(model), loads, strict=True):
        moved = (4 * 32 * 2 / 5 - load.double()).sign().float() * 0.001
        assert torch.equal(router.e_score_correction_bias, moved) and moved.unique().numel() > 1
    router, tokens = (
        routers(model)[0],
        torch.randn(256, 48, generator=torch.Generator().manual_seed(8)),
    )
    for _ in range(1500):  # without training, the bias alone balances the load
        reset_router_load(router)
        router.train()(tokens)
        update_router_bias(router)
    assert router.load.double().std() < loads[0].double().std() / 3


def test_a_null_vocab_size_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match="vocab_size is null"):
        LanguageModel(RunConfig(vocab_size=None, tokenizer="somewhere"))
