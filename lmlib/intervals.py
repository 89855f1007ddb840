"""Means over text with intervals that take the document, not the window, as the statistical unit.

The windows of one document resemble each other. An error that treats them as independent is too
small, often by half or more; one that is clustered by document is not.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

from lmlib.errors import UserError

FEW = 5  # with fewer clusters an interval is shown, but nothing is concluded from it


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error (None: one cluster has none) and the number of clusters."""
    mean: float
    stderr: float | None
    clusters: int

    def half_width(self, level: float = 0.95) -> float | None:
        """Return half the width of the t interval, with clusters - 1 degrees of freedom."""
        if self.stderr is None:
            return None
        return student_t((1 + level) / 2, self.clusters - 1) * self.stderr

    @property
    def is_few(self) -> bool:
        return self.clusters < FEW


def clustered_mean(totals: Iterable[tuple[float, float]]) -> Estimate:
    """Estimate sum(totals) / sum(sizes) from the (total, size) of each cluster.

    Clusters of size 0 do not count. The standard error is the ratio estimator's: residuals are
    summed within clusters, and their squares over clusters, times G / (G - 1) for G clusters
    (Cochran, Sampling Techniques, 3rd edition, section 6.3). Raises a ValueError without clusters.
    """
    clusters = [(total, size) for total, size in totals if size]
    if not clusters:
        raise UserError("A mean needs at least one cluster (document) that is not empty.")
    G, size = len(clusters), math.fsum(size for _, size in clusters)
    mean = math.fsum(total for total, _ in clusters) / size
    if G == 1:
        return Estimate(mean, None, G)
    squares = math.fsum((total - mean * size) ** 2 for total, size in clusters)
    return Estimate(mean, math.sqrt(G / (G - 1) * squares) / size, G)


def student_t(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t distribution with `freedom` degrees (whole, 1 or more)."""
    if not 0 < probability < 1 or freedom < 1 or freedom != int(freedom):
        raise UserError(f"student_t needs a probability between 0 and 1 and a whole number of "
                        f"degrees of freedom from 1 on, not {probability} and {freedom}.")
    if probability < 0.5:
        return -student_t(1 - probability, freedom)
    if freedom > 1000:  # the expansion around the normal quantile; its next term is below 1e-8
        z, n = NormalDist().inv_cdf(probability), freedom
        return (z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
                + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3))
    low, high = 0.0, math.pi / 2  # t = sqrt(freedom) tan(angle)
    for _ in range(60):  # halve the bracket down to a float's precision
        angle = (low + high) / 2
        if _within(angle, freedom) < 2 * probability - 1:
            low = angle
        else:
            high = angle
    return math.sqrt(freedom) * math.tan(high)


def _within(angle: float, freedom: int) -> float:
    """Return the probability that |t| < sqrt(freedom) tan(angle), a finite sum."""
    # Abramowitz and Stegun, 26.7.3 (odd degrees of freedom) and 26.7.4 (even).
    odd, cosine = freedom % 2, math.cos(angle)
    term, total = cosine if odd else 1.0, 0.0
    for k in range(1 + odd, freedom, 2):  # powers 1, 3, ..., freedom - 2 or 0, 2, ..., freedom - 2
        total += term
        term *= k / (k + 1) * cosine**2
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
