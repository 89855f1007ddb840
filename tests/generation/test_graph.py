"""Decoding with a cache of fixed length, which CUDA graphs need, against the cache that grows."""

import pytest
import torch

from lmlib.config import RunConfig
from lmlib.generation import sampling
from lmlib.generation.graph import fixed_decode
from lmlib.generation.settings import Settings
from lmlib.model.transformer import LanguageModel

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "sequence_length": 40,
}


def random_model(device: str = "cpu", **changes) -> LanguageModel:
    model = LanguageModel(RunConfig(**SIZES | changes)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2, generator=generator)
    return model.to(device)


@pytest.mark.parametrize("attention", ["mla", "mha"])
@pytest.mark.parametrize("rows", [[[5, 6, 7]], [[5, 6, 7, 8, 9], [1], [2, 3]]])
def test_fixed_decode_gives_the_logits_of_the_growing_cache(attention, rows):
    model = random_model(attention=attention)
    _, growing = sampling.prefill(model, rows)
    _, cache = sampling.prefill(model, rows)
    with torch.inference_mode():
        cache.memory[:, :, cache.used :] = torch.nan  # what an unused slot holds must not matter
        decode = fixed_decode(model, cache)
        for step in range(30):
            token = torch.arange(len(rows)) + step
            expected = sampling.decode(model, token, growing)
            torch.testing.assert_close(decode(token), expected, atol=1e-5, rtol=1e-5)


def test_the_comparison_sees_a_wrong_position():
    model, rows = random_model(), [[5, 6, 7]]
    logits, cache = sampling.prefill(model, rows)
    expected = sampling.decode(model, torch.tensor([9]), sampling.prefill(model, rows)[1])
    cache.used += 1
    with torch.inference_mode():
        assert (fixed_decode(model, cache)(torch.tensor([9])) - expected).abs().max() > 1e-3


def test_a_cpu_decodes_with_the_growing_cache(monkeypatch):
    model = random_model()
    _, cache = sampling.prefill(model, [[1, 2]])
    sampling.decoder(model, cache, 1000)(torch.tensor([3]))
    assert cache.used == 3


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("attention", ["mla", "mha"])
def test_a_graph_generates_the_tokens_of_eager_decoding(attention, monkeypatch):
    model = random_model("cuda", attention=attention, sequence_length=256)
    rows, settings = [[5, 6, 7], [1]], Settings(max_new_tokens=200, temperature=0)

    def generate() -> list:
        steps = sampling.sample_ids(model, rows, settings)
        return [next(steps).tolist() for _ in range(200)]

    graphed = generate()
    monkeypatch.setattr(sampling, "GRAPH_FROM", 10**9)
    assert graphed == generate()
