"""The checks of a model find and name every planted fault; correct models pass."""

import random

import pytest
import torch
import transformers
from planted import Decoder, V
from torch import nn

from lmlib import audit

# fault -> (check, part of its pattern, the first module that shows it)
FAULTS = {
    "no mask": ("causality", "whole window", "layers.0"),
    "boolean mask added": ("causality", "whole window", "layers.0"),
    "mask off by one": ("causality", "next", "layers.0"),
    "mask off by one, second layer": ("causality", "the next token (a mask off by one", "layers.1"),
    "no mask, second layer": ("causality", "whole window", "layers.1"),
    "no mask in one head": ("causality", "whole window", "layers.0"),
    "no mask at a length": ("causality", "whole window", "layers.0"),
    "no mask at times": ("causality", "at random", "layers.0"),
    "reshape for transpose": ("causality", "", "layers.0"),
    "averages over blocks of 4": ("causality", "blocks of 4", "layers.0"),
    "averages over blocks of 16": ("causality", "blocks of 16", "layers.0"),
    "averages over blocks of 16, second layer": ("causality", "blocks of 16", "layers.1"),
    "bidirectional convolution": ("causality", "next 2 tokens", "layers.0"),
    "bidirectional convolution, second layer": ("causality", "next token", "layers.1"),
    "Fourier mixing": ("causality", "whole window", "layers.0"),
    "normalized over time": ("causality", "whole window", "layers.0"),
    "pooled over time": ("causality", "", "layers.0"),
    "shift that wraps around": (
        "causality",
        "whole window",
        "layers.0",
    ),  # the next layer's attention spreads it
    "shift that wraps around, second layer": ("causality", "wraps around", "layers.1"),
    "router by the mean of the sequence": ("causality", "whole window", "layers.0"),
    "router with a capacity": ("causality", "", "layers.0"),
    "batch norm": ("batch independence", "rows mix", ""),
    "mean over the batch": ("batch independence", "rows mix", ""),
    "positions restart in the cache": ("cache", "decode differs from prefill", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_named(fault):
    check, pattern, place = FAULTS[fault]
    report = getattr(audit, f"check_{check.replace(' ', '_')}")(Decoder(fault))
    assert report.passed is False and report.check == check and report.leaks
    assert pattern in report.pattern
    if place:
        assert report.numbers["first_seen_in"].startswith(place), report
    if check == "causality":
        assert all(leak.t < leak.s and leak.change > 1e-5 for leak in report.leaks)


def test_the_decoder_without_a_fault_passes_every_check():
    model = Decoder()
    for check in (audit.check_causality, audit.check_batch_independence, audit.check_cache):
        assert check(model).passed is True, check(model)


def test_leaks_in_time_and_between_rows_are_distinguished():
    assert audit.check_causality(Decoder("mean over the batch")).passed is True
    assert audit.check_batch_independence(Decoder("no mask")).passed is True
    report = audit.check_causality(Decoder("batch norm"))
    assert report.passed is False and "only in training mode" in report.summary


def test_blocks_are_recognized_in_long_windows():
    class Blocks(Decoder):
        def forward(self, ids):
            return self.head(self.layers[0].blocks(self.embed(ids), 64))

    report = audit.check_causality(Blocks(), sequence_length=150)
    assert report.pattern == "blocks of 64"
    assert {leak.t // 64 for leak in report.leaks} == {0, 1} and all(
        leak.t // 64 == leak.s // 64 for leak in report.leaks
    )


def test_exactly_the_leaking_pairs_are_reported():
    report = audit.check_causality(
        Decoder("averages over blocks of 4, second layer"), sequence_length=12
    )
    assert {(leak.t, leak.s) for leak in report.leaks} == {
        (t, s) for t in range(12) for s in range(t + 1, t // 4 * 4 + 4)
    }


def test_a_leak_at_one_length_is_found_and_the_length_reported():
    report = audit.check_causality(Decoder("no mask at a length"))
    assert {leak.length for leak in report.leaks} == {
        37
    } and "seen in windows of 37" in report.summary
    assert audit.check_causality(Decoder("no mask at a length"), sequence_length=36).passed is True


def test_a_leak_behind_a_zero_matrix_is_found():
    model = Decoder("no mask")
    for layer in model.layers:
        nn.init.zeros_(layer.out.weight)
        nn.init.zeros_(layer.out.bias)
    assert audit.check_causality(model).passed is False
    assert not model.layers[0].out.weight.any()  # the model itself is unchanged


def test_the_audit_changes_neither_the_model_nor_the_rng():
    model = Decoder("batch norm").train()
    before, state = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    audit.check_causality(model), audit.check_batch_independence(model), audit.check_cache(model)
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(
        parameter.requires_grad and parameter.grad is None for parameter in model.parameters()
    )


def test_leaks_that_earlier_versions_missed_are_found():
    class Hidden(Decoder):
        """Leaks: beside logits of -1e9, only with gradients enabled, or only beyond 256 tokens."""

        def __init__(self, how):
            super().__init__("no mask" if how == "ruled out" else "")
            self.how = how

        def forward(self, ids):
            x = self.embed(ids)
            if (self.how == "gradients" and self.training and torch.is_grad_enabled()) or (
                self.how == "long" and ids.shape[1] > 256
            ):
                x = x + x.mean(1, keepdim=True)
            logits = self.head(self.layers[1](self.layers[0](x)[0])[0])
            return (
                logits.index_fill(2, torch.tensor([0, 1]), -1e9)
                if self.how == "ruled out"
                else logits
            )

    assert audit.check_causality(Hidden("ruled out"), quick=True).passed is False
    assert audit.check_causality(Hidden("gradients"), quick=True).passed is False
    assert audit.check_causality(Hidden("long"), sequence_length=300, quick=True).passed is False


def test_one_pair_in_a_long_window_is_found():
    class Pair(Decoder):
        def forward(self, ids):
            x = self.embed(ids)
            seen = x.clone()
            if ids.shape[1] > 101:
                seen[:, 100] = seen[:, 100] + x[:, 101]
            return self.head(seen)

    report = audit.check_causality(Pair(), sequence_length=200)
    assert {(leak.t, leak.s) for leak in report.leaks} == {(100, 101)}


class Correct(Decoder):
    """A causal model with a property that could be mistaken for a leak."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, ids):
        x = self.embed(ids)
        if self.how == "running statistics" and self.training:
            x, self.mean = x + self.mean, 0.5 * self.mean + x.detach().mean((0, 1))
        if self.how == "noise in evaluation":
            x = nn.functional.dropout(x, 0.1)
        if self.how == "Python's RNG" and random.random() < 0.5:
            return self.head(self.layers[0](x)[0])
        logits = self.head(self.layers[1](self.layers[0](x)[0])[0])
        return (
            logits.index_fill(2, torch.tensor([0]), -torch.inf)
            if self.how == "ruled out"
            else logits
        )


@pytest.mark.parametrize(
    "how", ["running statistics", "noise in evaluation", "Python's RNG", "ruled out"]
)
def test_unusual_causal_models_pass(how):
    assert audit.check_causality(Correct(how)).passed is True


class InTheCache(Decoder):
    """A decoder whose cached logits, or all logits, are not finite."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, ids, past_key_values=None, use_cache=False):
        output = super().forward(ids, past_key_values, use_cache)
        logits = output[0] if use_cache else output
        if self.how == "one is ruled out":
            logits = logits.index_fill(2, torch.tensor([0]), -torch.inf)
        if self.how == "NaN after the prompt" and past_key_values:
            logits = logits * torch.nan
        return (logits, *output[1:]) if use_cache else logits


def test_nan_while_decoding_is_a_fault_of_the_cache():
    report = audit.check_cache(InTheCache("NaN after the prompt"))
    assert report.passed is False and report.pattern == "decode differs from prefill"
    assert report.leaks[0].t == 1 and "from position 1 on" in report.summary
    assert "NaN" in report.summary


def test_a_token_that_is_always_ruled_out_is_no_fault_of_the_cache():
    assert audit.check_cache(InTheCache("one is ruled out")).passed is True


class LeaksAtFirst(Decoder):
    """A decoder that has no causal mask in its first 40 calls."""

    calls = 0

    def forward(self, ids):
        self.calls += 1
        for layer in self.layers:
            layer.fault = "no mask" if self.calls <= 40 else ""
        return super().forward(ids)


def test_a_leak_that_does_not_come_again_is_reported():
    report = audit.check_causality(LeaksAtFirst())
    assert report.passed is False and report.pattern == "not repeatable" and not report.leaks
    assert "besides the ids and the seed" in report.summary


# ---------------------------------------------------------------------------------------------------
# Labels


def shifted(by: int):
    def loss(model, ids, targets):
        logits = model(ids)
        return nn.functional.cross_entropy(
            logits[:, : logits.shape[1] - by].flatten(0, 1), targets[:, by:].flatten()
        )

    return loss


def batch(shift: int):
    ids = torch.randint(V, (3, 20), generator=torch.Generator().manual_seed(0))
    return ids[:, :12], ids[:, shift : 12 + shift]


@pytest.mark.parametrize(
    "in_batch, in_loss, name",
    [(0, 0, "labels unshifted"), (1, 1, "labels shifted twice"), (2, 0, "labels shifted twice")],
)
def test_wrong_shifts_of_the_labels_are_named(in_batch, in_loss, name):
    report = audit.check_labels(Decoder(), *batch(in_batch), loss=shifted(in_loss))
    assert report.passed is False and report.pattern == name


def test_labels_shifted_once_pass_in_the_batch_or_in_the_loss():
    assert audit.check_labels(Decoder(), *batch(1), loss=shifted(0)).passed is True
    assert audit.check_labels(Decoder(), *batch(0), loss=shifted(1)).passed is True


def test_labeled_padding_and_unrelated_labels_are_named():
    ids, targets = batch(1)
    padded, labels = ids.clone(), targets.clone()
    padded[0, 8:] = labels[0, 7:] = 0
    report = audit.check_labels(Decoder(), padded, labels, loss=shifted(0), padding=0)
    assert report.passed is False and report.pattern == "padding"
    labels[0, 7:] = -100
    assert audit.check_labels(Decoder(), padded, labels, loss=shifted(0), padding=0).passed is True
    assert (
        audit.check_labels(Decoder(), ids, targets.flip(1), loss=shifted(0)).pattern
        == "unrelated labels"
    )
    report = audit.check_labels(
        Decoder(), ids, targets, loss=lambda m, x, y: shifted(0)(m, x, y) + 1
    )
    assert (
        report.passed is None and "something is added" in report.summary
    )  # such as the auxiliary loss of a router

    def counted(model, x, y):
        return (
            nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
            / y.numel()
        )

    labels[0, 7:] = -100
    assert audit.check_labels(Decoder(), padded, labels, loss=counted).passed is False


# ---------------------------------------------------------------------------------------------------
# Models of transformers

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
SMALL |= {"max_position_embeddings": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED, NARROW = (
    {**SMALL, "num_key_value_heads": 2},
    {**SMALL, "num_key_value_heads": 2, "head_dim": 8},
)
OLD = {
    "vocab_size": 99,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 24,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
STOCK = {
    "Llama": GROUPED,
    "Mistral": {**GROUPED, "sliding_window": 8},
    "Mixtral": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2": GROUPED,
    "Qwen3": NARROW,
    "Qwen3Moe": {**NARROW, **EXPERTS, "num_experts": 4},
    "Gemma": NARROW,
    "Gemma2": {**NARROW, "sliding_window": 8},
    "GPT2": OLD,
    "GPTJ": {**OLD, "rotary_dim": 4},
    "GPTNeoX": SMALL,
    "OPT": {
        **{n: v for n, v in SMALL.items() if n != "intermediate_size"},
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
    },
    "Bloom": {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Falcon": {n: v for n, v in SMALL.items() if n != "intermediate_size"},
    "Phi": SMALL,
    "StableLm": GROUPED,
    "Cohere": GROUPED,
    "Olmo2": GROUPED,
    "Olmoe": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV3": {
        **SMALL,
        **LATENT,
        **EXPERTS,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "Glm4Moe": {
        **NARROW,
        **EXPERTS,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "Mamba": {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


def stock(name: str, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**settings)
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", STOCK)
def test_causal_models_of_transformers_pass(name):
    model = stock(name, **STOCK[name])
    for check in (audit.check_causality, audit.check_batch_independence, audit.check_cache):
        report = check(model, sequence_length=24)
        assert report.passed is True, report
    assert audit.check_labels(model).passed is True


@pytest.mark.parametrize("name", ["Bert", "RoFormer"])
def test_encoders_leak_unless_is_decoder_is_set(name):
    assert audit.check_causality(stock(name, **SMALL), sequence_length=24).pattern == "whole window"
    assert (
        audit.check_causality(stock(name, **SMALL, is_decoder=True), sequence_length=24).passed
        is True
    )


# ---------------------------------------------------------------------------------------------------
# Models with other interfaces


class Wrapped(nn.Module):
    """A causal decoder whose forward is `call`."""

    def __init__(self, call):
        super().__init__()
        self.inner, self.call = Decoder(), call

    def forward(self, ids):
        return self.call(self.inner, ids)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, ids: (model(ids), torch.zeros(())),
        lambda model, ids: {"logits": model(ids)},
        lambda model, ids: model(ids).flatten(0, 1),
        lambda model, ids: model(ids).transpose(1, 2),
        lambda model, ids: model(ids).transpose(0, 1),
        lambda model, ids: model(ids).bfloat16().float(),
    ],
    ids=["tuple", "dict", "flattened", "classes second", "time first", "rounded"],
)
def test_outputs_in_other_layouts_are_accepted(call):
    assert audit.check_causality(Wrapped(call), sequence_length=20).passed is True


def test_a_fixed_length_is_found_and_refused_lengths_are_reported():
    class Fixed(Decoder):
        def __init__(self):
            super().__init__()
            del self.config
            self.places = nn.Parameter(torch.randn(1, 48, 16))

        def forward(self, ids):
            return self.head(self.layers[0](self.embed(ids) + self.places)[0])

    report = audit.check_causality(Fixed())
    assert report.passed is True and report.numbers["lengths"] == [48]
    with pytest.raises(ValueError, match="does not run on a window of 20 tokens"):
        audit.check_causality(Fixed(), sequence_length=20)

    class Long(Decoder):
        def forward(self, ids):
            if ids.shape[1] < 10:
                raise RuntimeError("too short")
            return super().forward(ids)

    report = audit.check_causality(Long())
    assert report.passed is True and "does not run on windows of 2 to 9" in report.summary


def test_the_vocabulary_size_is_found_without_a_config():
    class Silent(Decoder):
        def __init__(self, rows):
            super().__init__()
            del self.config
            self.embed = nn.Embedding(rows, 16)

    for rows in (40, 90):  # fewer and more than the width of the logits
        assert audit.check_causality(Silent(rows), sequence_length=12).passed is True


def test_a_required_mask_is_made_or_requested():
    class Masked(Decoder):
        def forward(self, ids, attention_mask):
            assert attention_mask.shape == ids.shape
            return super().forward(ids)

    assert audit.check_causality(Masked(), sequence_length=12).passed is True

    class Asking(Decoder):
        def forward(self, ids, mask):
            x = self.embed(ids)
            return self.head(x + (mask.float() @ x))

    with pytest.raises(
        ValueError,
        match=r"forward needs mask besides ids.*arguments=lambda ids: \{'mask': \.\.\.\}",
    ):
        audit.check_causality(Asking())
    causal = audit.check_causality(
        Asking(), arguments=lambda ids: {"mask": torch.ones(*ids.shape, ids.shape[1]).tril()}
    )
    open_ = audit.check_causality(
        Asking(), arguments=lambda ids: {"mask": torch.ones(*ids.shape, ids.shape[1])}
    )
    assert causal.passed is True and open_.pattern == "whole window"


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda ids: ids, "needs a torch module"),
        (
            Wrapped(lambda model, ids: model(ids).mean(1)),
            r"gave \(1, 61\); logits of every position",
        ),
        (Wrapped(lambda model, ids: model(ids) * torch.nan), "not all finite"),
        (Wrapped(lambda model, ids: "text"), "gave a str where logits"),
        (Decoder().to("meta"), "meta device"),
    ],
    ids=["no module", "one position", "not finite", "text", "meta"],
)
def test_a_model_that_cannot_be_audited_raises_a_clear_error(model, message):
    with pytest.raises(ValueError, match=message):
        audit.check_causality(model)


def test_invalid_arguments_raise_a_clear_error():
    with pytest.raises(ValueError, match="two tokens or more"):
        audit.check_causality(Decoder(), sequence_length=1)
    with pytest.raises(ValueError, match="vocab_size is 1"):
        audit.check_causality(Decoder(), vocab_size=1)
