"""Time a mixture of experts against one MLP with the same active parameters.

    python benchmarks/experts.py [--rounds N]

Prints ratios of the best of several rounds, forward and backward, measured in turn in one process,
at Experiment 8's width and two smaller ones: the feed-forward layer alone, and models of 3 layers.
"""

import argparse
import time
from collections.abc import Callable

import torch

from lmlib.config import RunConfig
from lmlib.model.moe import MLP, MixtureOfExperts
from lmlib.model.transformer import LanguageModel

WIDTHS = {
    512: (2048, 680, 8),
    192: (512, 168, 4),
    128: (512, 168, 4),
}  # hidden_size: MLP, expert, heads
EXPERTS = (4, 8, 16)
Steps = dict[int, Callable[[], None]]  # a forward and backward pass per number of experts; 0: MLP


def best(steps: Steps, rounds: int) -> dict[int, float]:
    """Return the seconds of each step in its best round."""
    seconds: dict[int, float] = {}
    for step in steps.values():  # the first call warms up
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name] = min(seconds.get(name, 1e9), time.perf_counter() - began)
    return seconds


def layer_steps(width: int, tokens: int) -> Steps:
    inner, expert, _ = WIDTHS[width]
    x = torch.randn(8, tokens // 8, width, requires_grad=True)
    modules = {0: MLP(RunConfig(hidden_size=width), inner)}
    for count in EXPERTS:
        config = RunConfig(
            hidden_size=width,
            feed_forward="moe",
            num_experts=count,
            moe_intermediate_size=expert,
        )
        modules[count] = MixtureOfExperts(config)
    for module in modules.values():
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return {
        count: lambda module=module: module(x).sum().backward() for count, module in modules.items()
    }


def model_steps(width: int, tokens: int) -> Steps:
    inner, expert, heads = WIDTHS[width]
    ids = torch.randint(0, 4096, (8, tokens // 8 + 1))
    shape = {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": 3,
        "intermediate_size": inner,
        "attention": "mha",
        "moe_intermediate_size": expert,
    }
    models = {0: LanguageModel(RunConfig(**shape))}
    for count in EXPERTS:
        models[count] = LanguageModel(RunConfig(**shape, feed_forward="moe", num_experts=count))
    return {
        count: lambda model=model: model.loss(ids[:, :-1], ids[:, 1:]).backward()
        for count, model in models.items()
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    torch.manual_seed(0)
    print(
        f"{'width':>5} {'what':<12} " + " ".join(f"{count:>3} experts / MLP" for count in EXPERTS)
    )
    for width in WIDTHS:
        for what, build in (("feed-forward", layer_steps), ("whole model", model_steps)):
            seconds = best(build(width, options.tokens), options.rounds)
            ratios = " ".join(f"{seconds[count] / seconds[0]:>17.2f}" for count in EXPERTS)
            print(f"{width:>5} {what:<12} {ratios}", flush=True)


if __name__ == "__main__":
    main()
