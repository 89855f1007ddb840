"""Show by simulation how often a score's 95 % interval contains the truth.

    python benchmarks/coverage.py [FILE] [--repeats N]

FILE is an evaluation of many documents as runs write it (outputs/RUN/evaluations/*.json); without
it, coverage.json beside this script: 767 windows at equal distances in 17 plays that
params/quickstart.yaml did not train on with validation_fraction 0.5, scored after step 700.

The population is the documents of FILE; the truth is their loss: all nats over all tokens. Each
repetition draws 3, 8 or 30 documents with replacement, each with all its windows, and makes two
intervals of them: the t interval clustered by document, and the one that treats the windows as
independent.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from lmlib.intervals import FEW, Estimate, clustered_mean

Cluster = list[tuple[float, float]]  # nats and tokens of each window of one document
LOSSES = Path(__file__).with_suffix(".json")


def read_clusters(path: Path) -> list[Cluster]:
    """Read the windows' (nats, tokens) of each document of an evaluation file."""
    data = json.loads(path.read_text("utf-8"))
    windows: dict[int, dict[int, tuple[float, float]]] = {}
    rows = (data[name] for name in ("cluster", "window", "nats", "tokens"))
    for cluster, window, nats, tokens in zip(*rows, strict=True):
        of_cluster = windows.setdefault(cluster, {})
        before = of_cluster.get(window, (0.0, 0))
        of_cluster[window] = (before[0] + nats, before[1] + tokens)
    return [list(of_cluster.values()) for of_cluster in windows.values()]


def total(windows: Cluster) -> tuple[float, float]:
    """Sum the nats and tokens of windows."""
    nats, tokens = zip(*windows, strict=True)
    return sum(nats), sum(tokens)


def simulate(clusters: list[Cluster], drawn: int, repeats: int, seed: int = 0) -> dict[str, float]:
    """Return the coverage and mean half-width of both intervals over `repeats` draws."""
    generator, totals = np.random.default_rng(seed), [total(windows) for windows in clusters]
    truth = clustered_mean(totals).mean
    covered, widths = np.zeros((repeats, 2), dtype=bool), np.zeros((repeats, 2))
    for repeat in range(repeats):
        chosen = generator.integers(len(clusters), size=drawn)
        by_document = clustered_mean(totals[i] for i in chosen)
        by_window = clustered_mean(window for i in chosen for window in clusters[i])
        for column, estimate in enumerate((by_document, by_window)):
            widths[repeat, column] = half_width(estimate)
            covered[repeat, column] = abs(estimate.mean - truth) <= widths[repeat, column]
    names = ("by document", "by window")
    return dict(zip(names, covered.mean(0).tolist(), strict=True)) | {
        f"± {name}": width for name, width in zip(names, widths.mean(0).tolist(), strict=True)
    }


def half_width(estimate: Estimate) -> float:
    """Half the width of the 95 % interval; one window alone has none, and covers nothing."""
    return estimate.half_width() or 0.0


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path, default=LOSSES, help="an evaluation")
    parser.add_argument("--repeats", type=int, default=5000)
    options = parser.parse_args()
    clusters = read_clusters(options.file)
    sizes = [len(windows) for windows in clusters]
    score = clustered_mean(map(total, clusters))
    print(
        f"{len(clusters)} documents of {min(sizes)} to {max(sizes)} windows; their loss: "
        f"{score.mean:.4f}; {options.repeats:,} repetitions; nominal coverage: 95 %\n\n"
        "documents | clustered by document |      ± | windows independent |      ±"
    )
    for drawn in (3, 8, 30):
        row = simulate(clusters, drawn, options.repeats)
        mark = "  (few documents: no verdict is given)" if drawn < FEW else ""
        print(
            f"{drawn:>9} | {row['by document']:>21.1%} | {row['± by document']:.4f} | "
            f"{row['by window']:>19.1%} | {row['± by window']:.4f}{mark}",
            flush=True,
        )


if __name__ == "__main__":
    main()
