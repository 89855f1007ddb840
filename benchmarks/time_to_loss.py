"""CPU time until a small model reaches a validation loss, beside nanoGPT's own CPU recipe.

    python benchmarks/time_to_loss.py [--corpus FILE] [--target 1.907] [--seeds 3] [--characters]

The first 90 % of a text train, the rest is scored whole, in windows of 64 tokens and in nats per
byte (a byte is a character in ASCII). lmlib trains with `training.apply_update`, as every run does;
beside it a stock GPT of nanoGPT's shape and schedule ("train_shakespeare_char" for a CPU) trains on
characters. Counted is the process's CPU time in updates. Imports, evaluations and the training of
the tokenizer are left out and printed apart. Both run in one process, on one thread, in turn.
`--characters` takes bytes as lmlib's tokens too. Without --corpus the text is Shakespeare's plays.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmlib import evaluation, optim, training
from lmlib.config import RunConfig
from lmlib.data.corpus import documents
from lmlib.model.size import parameter_count
from lmlib.run.prepare import Run, prepare
from lmlib.run.start import find_start

WINDOW = 64
COMMON = {
    "test_fraction": 0.0,
    "validation_windows": 10**6,
    "sequence_length": WINDOW,
    "optimizer": "muon",
    "device": "cpu",
    "dtype": "float32",
    "dropout": 0.0,
    "weight_decay": 0.1,
    "decay_ratio": 0.6,
    "num_attention_heads": 4,
}
TOKENS = {  # tuned on the first 90 % of tinyshakespeare
    **COMMON,
    "vocab_size": 4096,
    "hidden_size": 96,
    "num_hidden_layers": 1,
    "intermediate_size": 256,
    "kv_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 8,
    "v_head_dim": 24,
    "total_steps": 110,
    "batch_size": 8,
    "learning_rate": 0.02,
    "muon_learning_rate": 0.02,
    "muon_momentum": 0.85,
}
CHARACTERS = {
    **TOKENS,
    "vocab_size": 260,
    "num_hidden_layers": 3,
    "total_steps": 460,
    "batch_size": 12,
    "muon_momentum": 0.9,
}


class Block(nn.Module):
    """nanoGPT's block: layer norms without bias, fused query, key and value, GELU."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv, self.out = (nn.Linear(width, n * width, bias=False) for n in (3, 1))
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class StockGPT(nn.Module):
    """GPT-2 with nanoGPT's sizes for a CPU: 4 layers, 4 heads, 128 wide, a tied head."""

    def __init__(self, vocab_size: int, width: int = 128, layers: int = 4, heads: int = 4):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(WINDOW, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                deep = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * layers) if deep else 1))

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def nanogpt(train: bytes, held_out: bytes, target: float, seed: int) -> dict:
    """Train nanoGPT's recipe: 2,000 steps of 12 windows, AdamW, cosine from 1e-3 to 1e-4."""
    torch.manual_seed(seed)
    letters = {byte: number for number, byte in enumerate(sorted({*train, *held_out}))}
    ids, scored = (torch.tensor([letters[b] for b in part]) for part in (train, held_out))
    model, steps, offsets = StockGPT(len(letters)), 2000, torch.arange(WINDOW + 1)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)

    def update(step: int):
        rate = 1e-4 + 0.9e-3 * 0.5 * (1 + math.cos(math.pi * (step - 100) / (steps - 100)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * step / 100 if step <= 100 else rate
        windows = ids[torch.randint(len(ids) - WINDOW, (12, 1)) + offsets]
        optimizer.zero_grad(set_to_none=True)
        model.loss(windows[:, :-1], windows[:, 1:]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    @torch.no_grad()
    def score() -> float:
        starts = torch.arange(0, len(scored) - WINDOW, WINDOW)
        windows = scored[starts[:, None] + offsets]
        losses = [model.loss(w[:, :-1], w[:, 1:]) * len(w) for w in windows.split(64)]
        return float(sum(losses)) / len(windows)

    found = race(update, score, steps, 50, target)
    return {**found, "parameters": sum(p.numel() for p in model.parameters())}


def lmlib_run(folder: Path, recipe: dict, seed: int) -> tuple[Run, float]:
    """Prepare a run on the two texts; returns it, and the CPU seconds of preparing its tokens."""
    began = time.process_time()
    config = RunConfig(
        corpus=str(folder / "train.txt"),
        validation_corpus=str(folder / "held_out.txt"),
        output_dir=str(folder),
        run_name=f"seed-{seed}",
        seed=seed,
        **recipe,
    )
    return prepare(find_start(config)), time.process_time() - began


def lmlib(folder: Path, recipe: dict, target: float, seed: int) -> dict:
    run, preparing = lmlib_run(folder, recipe, seed)
    config = run.config

    def update(step: int):
        factor = optim.schedule(step, config.total_steps, config.warmup_ratio, config.decay_ratio)
        training.apply_update(run, step, factor)
        run.updates.read()

    def score() -> float:
        scores = evaluation.evaluate(run.model, run.text, run.token_bytes, 64, run.start.dtype)
        return scores.summary()["val_bits_per_byte"] * math.log(2)

    every = max(1, config.total_steps // 20)
    found = race(update, score, config.total_steps, every, target)
    return {**found, "parameters": parameter_count(run.model), "preparing": preparing}


def race(update, score, steps: int, every: int, target: float) -> dict:
    """Train until a score reaches the target; returns CPU seconds, of updates and of scoring."""
    seconds, scoring = 0.0, 0.0
    for step in range(1, steps + 1):
        began = time.process_time()
        update(step)
        seconds += time.process_time() - began
        if step % every == 0:
            began = time.process_time()
            loss = score()
            scoring += time.process_time() - began
            if loss <= target:
                break
    return {"seconds": seconds, "scoring": scoring, "steps": step, "loss": loss}


def read(corpus: Path | None) -> bytes:
    if corpus:
        return corpus.read_bytes()
    plays = documents("shakespeare", RunConfig())
    return "\n\n".join(text for text, _ in plays).encode()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--target", type=float, default=1.907, help="nats per byte")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--characters", action="store_true")
    parser.add_argument("--alone", action="store_true", help="leave nanoGPT out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = read(options.corpus)
    cut = int(0.9 * len(text))
    found = {"lmlib": [], "nanoGPT": []}
    with tempfile.TemporaryDirectory() as name:
        folder, recipe = Path(name), CHARACTERS if options.characters else TOKENS
        (folder / "train.txt").write_bytes(text[:cut])
        (folder / "held_out.txt").write_bytes(text[cut:])
        for seed in range(options.seeds):
            found["lmlib"].append(lmlib(folder, recipe, options.target, seed))
            print(json.dumps({"lmlib": found["lmlib"][-1]}), flush=True)
            if not options.alone:
                found["nanoGPT"].append(nanogpt(text[:cut], text[cut:], options.target, seed))
                print(json.dumps({"nanoGPT": found["nanoGPT"][-1]}), flush=True)
    report(found, options.target)


def report(found: dict[str, list[dict]], target: float):
    """Print the medians and their ratio. A run that missed the target needs longer than it took."""
    medians = {}
    for model, results in found.items():
        for result in results:
            if result["loss"] > target:
                print(f"{model} missed {target} ({result['loss']:.4f}): its seconds are a bound.")
        if results:
            medians[model] = statistics.median(result["seconds"] for result in results)
            print(f"{model}: {medians[model]:.2f} CPU seconds to {target} nats per byte")
    if len(medians) == 2:
        print(f"ratio: 1 / {medians['nanoGPT'] / medians['lmlib']:.1f}")


if __name__ == "__main__":
    main()
