"""Tokens a second of decoding beside stock transformers, on the same weights in one process: `python benchmarks/generate.py`.

Both write greedily behind the same context, one prompt or eight; prefill is left out. The share of the memory-bandwidth
bound is the time that reading the weights and the cache once would take, as fast as a large tensor is read here, over the
time taken.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from lmlib.config import RunConfig
from lmlib.files import PROJECT_ROOT
from lmlib.generation.sampling import sample_ids
from lmlib.generation.settings import Settings
from lmlib.model import huggingface
from lmlib.model.attention import Cache
from lmlib.model.transformer import LanguageModel


def seconds(function: Callable, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def bandwidth(device: torch.device) -> float:
    """Bytes a second in the best of several sums over a large tensor."""
    large = torch.ones(2**28 // 4, device=device)
    return large.nbytes / min(seconds(large.sum, device) for _ in range(8))


def ours(model: LanguageModel, ids: torch.Tensor, tokens: int) -> float:
    """Seconds a token of decoding, the first one (behind the prefill) left out."""
    steps = sample_ids(model, ids.tolist(), Settings(temperature=0))
    next(steps)
    took = seconds(lambda: [next(steps) for _ in range(tokens)], ids.device)
    steps.close()
    return took / tokens


def theirs(model: transformers.PreTrainedModel, ids: torch.Tensor, tokens: int) -> float:
    """Seconds a token of `generate`, from the difference of a long and a short call, so that prefill drops out."""

    def call(count: int) -> float:
        settings = transformers.GenerationConfig(max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        return seconds(lambda: model.generate(ids, generation_config=settings, attention_mask=torch.ones_like(ids)), ids.device)

    return (call(tokens + 1) - call(1)) / tokens


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--recipe", default=str(PROJECT_ROOT / "params" / "exp9.yaml"))
    options.add_argument("--contexts", type=int, nargs="+", default=[64, 512, 2048])
    options.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    options.add_argument("--tokens", type=int, default=8)
    options.add_argument("--rounds", type=int, default=2)
    arguments = options.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    window = max(arguments.contexts) + arguments.tokens + 8
    config = RunConfig.load(arguments.recipe, sequence_length=window, max_tokens=None)
    model = LanguageModel(config).to(device).eval()
    with torch.no_grad():  # as random as trained weights are, so that no two logits are equal
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.02)
    stock = transformers.AutoModelForCausalLM.from_config(huggingface.stock_config(config)).to(device).eval()
    stock.load_state_dict(model.state_dict())
    speed, weights = bandwidth(device), sum(p.nbytes for name, p in model.named_parameters() if "embed_tokens" not in name)
    print(f"{Path(arguments.recipe).stem}, float32, {device}: reading {speed / 1e9:.1f} GB/s, {torch.get_num_threads()} threads")
    print("| batch | context | ours, ms a token | transformers, ms a token | ratio | share of the bandwidth bound |")
    print("|---|---|---|---|---|---|")
    for batch in arguments.batches:
        for context in arguments.contexts:
            ids = torch.randint(0, config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(0)).to(device)
            pairs = [(ours(model, ids, arguments.tokens), theirs(stock, ids, arguments.tokens)) for _ in range(arguments.rounds)]
            us, them = (min(pair[side] for pair in pairs) for side in (0, 1))
            cache = Cache(config, batch, context, None, model.lm_head.weight).memory.nbytes
            share = (weights + cache) / speed / us
            row = [batch, context, f"{us * 1e3:.1f}", f"{them * 1e3:.1f}", f"{them / us:.2f}", f"{share:.0%}"]
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
