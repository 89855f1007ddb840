"""Which learning rates are best at which width: do those of a small model hold for a large one?

    python benchmarks/rates.py [--widths 128 256 512] [--steps 150] [--layers 2]

Models of equal depth and growing width train on Shakespeare's plays, once for each rate: Muon's
(for the matrices inside layers) with AdamW's at its middle value, and AdamW's (for embedding and
head) with Muon's. Prints validation bits per byte, the best of each row marked; one seed, so
neighbors within 0.01 cannot be told apart.
"""

import argparse
import shutil
import tempfile
import warnings

import torch

from lmlib.config import RunConfig
from lmlib.files import PROJECT_ROOT
from lmlib.training import train

MUON = (0.005, 0.01, 0.02, 0.04)
ADAMW = (0.0025, 0.005, 0.01, 0.02, 0.04)
MIDDLE = {"muon_learning_rate": 0.02, "learning_rate": 0.01}


def final_score(width: int, layers: int, steps: int, folder: str, **rates: float) -> float:
    """Train a model; returns its validation bits per byte."""
    config = RunConfig(
        output_dir=folder,
        run_name="rates",
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        intermediate_size=round(2.75 * width / 64) * 64,
        kv_lora_rank=width // 2,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=32,
        vocab_size=4096,
        tie_word_embeddings=False,
        sequence_length=128,
        batch_size=8,
        total_steps=steps,
        decay_ratio=0.6,
        eval_every=steps,
        log_every=steps,
        checkpoint_every=steps,
        score_test=False,
        device="cpu",
        **MIDDLE | rates,
    )
    for record in train(config):
        if record.kind == "eval":
            score = record.values["val_bits_per_byte"]
    shutil.rmtree(config.run_dir)
    return score


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(dir=PROJECT_ROOT / "outputs") as folder:
        for name, values in (("muon_learning_rate", MUON), ("learning_rate", ADAMW)):
            print(f"\n{name:>20}" + "".join(f"{value:>10g}" for value in values))
            for width in options.widths:
                sizes = width, options.layers, options.steps, folder
                scores = [final_score(*sizes, **{name: value}) for value in values]
                cells = [f"{score:.3f}{'*' if score == min(scores) else ' '}" for score in scores]
                print(f"{width:>14} wide" + "".join(f"{cell:>10}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
