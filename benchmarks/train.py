"""Time training beside stock transformers: the same weights and batch, in one process.

    python benchmarks/train.py [--recipe params/exp9.yaml] [--tokens 2048] [--rounds 5]

Each round times forward and backward of one batch in both, in turn, without the optimizer, in
float32 and with the same number of threads. A ratio of the medians above 1: lmlib is faster.
"""

import argparse
import statistics
import time

import torch
import transformers

from lmlib.config import RunConfig
from lmlib.model import huggingface
from lmlib.model.size import flops_per_token
from lmlib.model.transformer import LanguageModel
from lmlib.run.throughput import matmul_peak


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="params/quickstart.yaml")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    config = RunConfig.load(options.recipe, dropout=0.0)
    rows = max(1, options.tokens // config.sequence_length)
    shape, generator = (rows, config.sequence_length + 1), torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, shape, generator=generator)
    x, y = ids[:, :-1], ids[:, 1:]

    ours = LanguageModel(config)
    settings = huggingface.stock_config(config)
    stock_class = getattr(transformers, settings.architectures[0])
    stock = stock_class._from_config(settings, attn_implementation="sdpa")
    stock.load_state_dict(ours.state_dict())

    def stock_loss():
        return torch.nn.functional.cross_entropy(stock(x).logits.flatten(0, 1), y.flatten())

    runs = {"lmlib": (ours, lambda: ours.loss(x, y)), "transformers": (stock, stock_loss)}
    seconds = {name: [] for name in runs}
    losses = {}
    for round_number in range(options.rounds + 1):
        for name, (model, loss) in runs.items():
            model.zero_grad(set_to_none=True)
            began = time.perf_counter()
            value = loss()
            value.backward()
            if round_number:  # round 0 warms up
                seconds[name].append(time.perf_counter() - began)
            losses[name] = value.item()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    flops = flops_per_token(ours) * x.numel() / medians["lmlib"]
    peak = matmul_peak(torch.device("cpu"), torch.float32)
    threads = torch.get_num_threads()
    print(f"{options.recipe}: {x.numel()} tokens, {threads} threads, losses {losses}")
    print(
        f"lmlib {medians['lmlib']:.3f} s, transformers {medians['transformers']:.3f} s "
        f"(medians of {options.rounds})"
    )
    print(f"ratio transformers / lmlib: {medians['transformers'] / medians['lmlib']:.2f}")
    print(f"utilization (of the measured matrix-product peak): {flops / peak:.0%}")


if __name__ == "__main__":
    main()
