"""Time decoding beside stock transformers, on the same weights in one process.

    python benchmarks/generate.py [--recipe params/exp9.yaml]

Both generate greedily from the same prompts, one or eight at a time; prefill is not included.
Decoding is bound by memory bandwidth. The last column is the least time that a token could take, to
read weights and cache once as fast as a large tensor is read here, over the time that it took.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from lmlib.config import RunConfig
from lmlib.files import PROJECT_ROOT
from lmlib.generation.sampling import sample_ids
from lmlib.generation.settings import Settings
from lmlib.model import huggingface
from lmlib.model.transformer import LanguageModel


def time_call(function: Callable, device: torch.device) -> float:
    """Return the seconds that a call takes, the GPU's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def bandwidth(device: torch.device) -> float:
    """Return bytes/s in the best of several sums over a large tensor."""
    large = torch.ones(2**28 // 4, device=device)
    return large.nbytes / min(time_call(large.sum, device) for _ in range(8))


def ours(model: LanguageModel, ids: torch.Tensor, tokens: int) -> float:
    """Return seconds per token; the first token, which includes the prefill, is not counted."""
    steps = sample_ids(model, ids.tolist(), Settings(temperature=0))
    next(steps)
    seconds = time_call(lambda: [next(steps) for _ in range(tokens)], ids.device)
    steps.close()
    return seconds / tokens


def theirs(model: transformers.PreTrainedModel, ids: torch.Tensor, tokens: int) -> float:
    """Return seconds per token of `generate`.

    It is the difference between a long and a short call, which cancels the prefill.
    """

    def time_generate(count: int) -> float:
        settings = transformers.GenerationConfig(
            max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )
        mask = torch.ones_like(ids)
        return time_call(
            lambda: model.generate(ids, generation_config=settings, attention_mask=mask),
            ids.device,
        )

    return (time_generate(tokens + 1) - time_generate(1)) / tokens


def build_models(config: RunConfig, device: torch.device) -> tuple[LanguageModel, Any]:
    """Return lmlib's model and the stock one, with the same random weights."""
    model = LanguageModel(config).to(device).eval()
    with torch.no_grad():  # no layer stays at zero, so that no two logits are equal
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.02)
    stock = transformers.AutoModelForCausalLM.from_config(huggingface.stock_config(config))
    stock.load_state_dict(model.state_dict())
    return model, stock.to(device).eval()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default=str(PROJECT_ROOT / "params" / "exp9.yaml"))
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    window = max(options.contexts) + options.tokens + 8
    config = RunConfig.load(options.recipe, sequence_length=window, max_tokens=None)
    model, stock = build_models(config, device)
    speed = bandwidth(device)
    # Decoding reads a few rows of the embedding, not all of it.
    weights = sum(p.nbytes for name, p in model.named_parameters() if "embed_tokens" not in name)
    print(
        f"{Path(options.recipe).stem}, float32, {device}: memory bandwidth {speed / 1e9:.1f} GB/s, "
        f"{torch.get_num_threads()} threads"
    )
    columns = ["batch", "context", "lmlib, ms/token", "transformers, ms/token", "ratio"]
    columns.append("fraction of the bandwidth bound")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for batch in options.batches:
        for context in options.contexts:
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(0, config.vocab_size, (batch, context), generator=generator)
            ids = ids.to(device)
            rounds = [
                (ours(model, ids, options.tokens), theirs(stock, ids, options.tokens))
                for _ in range(options.rounds)
            ]
            us, them = map(min, zip(*rounds, strict=True))
            cache = model.new_cache(batch, context).memory.nbytes
            bound = (weights + cache) / speed
            cells = [batch, context, f"{us * 1e3:.1f}", f"{them * 1e3:.1f}", f"{them / us:.2f}"]
            cells.append(f"{bound / us:.0%}")
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
