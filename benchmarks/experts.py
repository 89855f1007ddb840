"""What experts cost: a mixture against one MLP with the same active parameters, forward and backward.

    python benchmarks/experts.py [--rounds N]

Ratios of the best of several rounds, taken in turn in one process, at Experiment 8's width and at two small ones, for the
feed-forward layer alone and for whole models of three layers.
"""

import argparse
import time
from collections.abc import Callable

import torch

from lmlib.config import RunConfig
from lmlib.model.moe import MLP, MixtureOfExperts
from lmlib.model.transformer import LanguageModel

WIDTHS = {512: (2048, 680, 8), 192: (512, 168, 4), 128: (512, 168, 4)}  # hidden_size: MLP, expert, heads
EXPERTS = (4, 8, 16)


def best(steps: dict[int, Callable[[], None]], rounds: int) -> dict[int, float]:
    """Seconds of each in its best round."""
    seconds: dict[int, float] = {}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name] = min(seconds.get(name, 1e9), time.perf_counter() - began)
    return seconds


def layers(width: int, tokens: int) -> dict[int, Callable[[], None]]:
    inner, expert, _ = WIDTHS[width]
    x = torch.randn(8, tokens // 8, width, requires_grad=True)
    modules = {0: MLP(width, inner)}
    for count in EXPERTS:
        config = RunConfig(hidden_size=width, feed_forward="moe", num_experts=count, moe_intermediate_size=expert)
        modules[count] = MixtureOfExperts(config)
    for module in modules.values():
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return {count: lambda module=module: module(x).sum().backward() for count, module in modules.items()}


def models(width: int, tokens: int) -> dict[int, Callable[[], None]]:
    inner, expert, heads = WIDTHS[width]
    ids = torch.randint(0, 4096, (8, tokens // 8 + 1))
    shape = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": 3, "intermediate_size": inner}
    shape |= {"attention": "mha", "moe_intermediate_size": expert}
    kinds = {0: RunConfig(**shape)} | {n: RunConfig(**shape, feed_forward="moe", num_experts=n) for n in EXPERTS}
    made = {count: LanguageModel(config) for count, config in kinds.items()}
    return {count: lambda model=model: model.loss(ids[:, :-1], ids[:, 1:]).backward() for count, model in made.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"{'width':>5} {'what':<12} " + " ".join(f"{count:>3} experts / MLP" for count in EXPERTS))
    for width in WIDTHS:
        for what, build in (("feed-forward", layers), ("whole model", models)):
            seconds = best(build(width, options.tokens), options.rounds)
            print(f"{width:>5} {what:<12} " + " ".join(f"{seconds[count] / seconds[0]:>17.2f}" for count in EXPERTS), flush=True)


if __name__ == "__main__":
    main()
