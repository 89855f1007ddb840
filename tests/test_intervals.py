"""Quantiles of Student's t against tables; clustered means against the slow computation."""

import math
import random

import pytest

from lmlib.intervals import Estimate, clustered_mean, student_t

TABLE = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 9: 2.26216, 29: 2.04523, 1000: 1.96234}


def test_quantiles_are_those_of_the_tables():
    for freedom, expected in TABLE.items():
        assert student_t(0.975, freedom) == pytest.approx(expected, rel=5e-6)
    assert student_t(0.995, 7) == pytest.approx(3.49948, rel=5e-6)
    assert student_t(0.025, 4) == -student_t(0.975, 4) and student_t(0.5, 3) == pytest.approx(0)
    assert student_t(0.975, 2000) == pytest.approx(student_t(0.975, 2001), rel=1e-6)


def test_a_clustered_mean_is_that_of_all_and_its_error_that_of_clusters():
    draw = random.Random(0)
    clusters = [[draw.gauss(level, 1) for _ in range(20 + level)] for level in range(6)]
    found = clustered_mean((sum(values), len(values)) for values in clusters)
    values = sum(clusters, [])
    assert found.mean == pytest.approx(sum(values) / len(values)) and found.clusters == 6
    residuals = [sum(value - found.mean for value in cluster) for cluster in clusters]
    variance = 6 / 5 * sum(r**2 for r in residuals) / len(values) ** 2
    assert found.stderr == pytest.approx(math.sqrt(variance))
    assert found.half_width() == pytest.approx(2.570582 * found.stderr, rel=1e-6)


def test_equal_clusters_have_the_error_of_a_mean_of_means():
    means = [3.1, 4.2, 3.7, 3.9]
    found = clustered_mean((10 * mean, 10) for mean in means)
    center = sum(means) / 4
    assert found.stderr == pytest.approx(math.sqrt(sum((m - center) ** 2 for m in means) / 3 / 4))


def test_one_cluster_has_no_interval_and_few_are_marked():
    one = clustered_mean([(12.0, 4)])
    assert one == Estimate(3.0, None, 1) and one.half_width() is None and one.is_few
    assert Estimate(1.0, 0.1, 4).is_few and not Estimate(1.0, 0.1, 5).is_few
