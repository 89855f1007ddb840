"""Means and their intervals where measurements come in clusters: the tokens of one document."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

FEW = 5  # clusters, below which an interval is shown but decides nothing


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error, and the number of clusters that this rests on."""
    mean: float
    stderr: float | None  # None: a single cluster
    clusters: int

    @property
    def is_few(self) -> bool:
        return self.clusters < FEW

    def half_width(self, level: float = 0.95) -> float | None:
        """Return half the interval that holds the true mean in `level` of all cases."""
        if self.stderr is None:
            return None
        return student_t((1 + level) / 2, self.clusters - 1) * self.stderr


def clustered_mean(totals: Iterable[tuple[float, float]]) -> Estimate:
    """Estimate a mean from the (total, size) of each cluster: all totals over all sizes.

    The standard error is that of a ratio: clusters are drawn, what is inside them is not
    (Cochran, Sampling Techniques, section 6.4).
    """
    totals = list(totals)
    clusters, size = len(totals), math.fsum(size for _, size in totals)
    mean = math.fsum(total for total, _ in totals) / size
    if clusters < 2:
        return Estimate(mean, None, clusters)
    squares = math.fsum((total - mean * own) ** 2 for total, own in totals)
    return Estimate(mean, math.sqrt(clusters / (clusters - 1) * squares) / size, clusters)


def student_t(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t distribution with `freedom` degrees of freedom."""
    if probability < 0.5:
        return -student_t(1 - probability, freedom)
    if freedom > 2000:  # the normal distribution, and the first term of its correction
        z = NormalDist().inv_cdf(probability)
        return z + (z**3 + z) / (4 * freedom)
    low, high = 0.0, math.pi / 2  # t = sqrt(freedom) tan(angle)
    for _ in range(60):
        middle = (low + high) / 2
        if _t_probability(middle, freedom) < probability:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


def _t_probability(angle: float, freedom: int) -> float:
    """Return the probability below t (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    sine, cosine, is_odd = math.sin(angle), math.cos(angle), freedom % 2
    term = cosine if is_odd else 1.0
    total = 0.0 if freedom == 1 else term
    for k in range(2 + is_odd, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    inside = 2 / math.pi * (angle + sine * total) if is_odd else sine * total
    return (1 + inside) / 2
