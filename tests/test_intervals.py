"""Student's t agrees with published tables; a clustered mean agrees with its formula."""

import json
import math
import random
import runpy
import statistics

import pytest

from lmlib.files import PROJECT_ROOT
from lmlib.intervals import Estimate, clustered_mean, student_t

TABLE = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 9: 2.26216, 29: 2.04523, 1000: 1.96234}


@pytest.mark.parametrize("freedom", TABLE)
def test_student_t_agrees_with_published_tables(freedom):
    value = student_t(0.975, freedom)
    assert value == pytest.approx(TABLE[freedom], abs=6e-5 if freedom == 1 else 6e-6)
    assert student_t(0.025, freedom) == pytest.approx(-value, rel=1e-12)


@pytest.mark.parametrize("probability", [0.5, 0.6, 0.9, 0.975, 0.9995])
def test_student_t_has_its_closed_forms_and_no_jump_at_the_expansion(probability):
    p = 2 * probability - 1
    assert student_t(probability, 1) == pytest.approx(
        math.tan(math.pi * p / 2), rel=1e-9, abs=1e-12
    )
    assert student_t(probability, 2) == pytest.approx(
        p * math.sqrt(2 / (1 - p**2)), rel=1e-9, abs=1e-12
    )
    step, next_step = (
        student_t(probability, n) - student_t(probability, n + 1) for n in (999, 1000)
    )
    assert next_step == pytest.approx(step, rel=0.01, abs=1e-9)
    normal = statistics.NormalDist().inv_cdf(probability)
    assert student_t(probability, 10**9) == pytest.approx(normal, abs=1e-7)


@pytest.mark.parametrize(("probability", "freedom"), [(0.975, 0), (0.975, 1.5), (1, 3), (0, 3)])
def test_student_t_refuses_what_it_cannot_give(probability, freedom):
    with pytest.raises(ValueError, match="whole number of degrees of freedom"):
        student_t(probability, freedom)


def test_clustered_mean_of_an_example_by_hand():
    # Totals 2, 9, 12 of sizes 1, 3, 4: the mean is 23 / 8; the residuals -7/8, 3/8 and 4/8 have the
    # squares 49/64, 9/64 and 16/64, together 74/64; the variance is 3/2 * 74/64 / 8**2.
    estimate = clustered_mean(iter([(2, 1), (0, 0), (9, 3), (12, 4)]))
    assert estimate.mean == 23 / 8 and estimate.clusters == 3
    assert estimate.stderr == pytest.approx(math.sqrt(1.5 * 74 / 64 / 64))
    assert estimate.half_width() == pytest.approx(4.30265 * estimate.stderr, rel=1e-5)
    assert estimate.half_width(0.9) == pytest.approx(2.91999 * estimate.stderr, rel=1e-5)


def test_clusters_of_one_size_give_the_error_of_independent_values():
    values = [random.Random(0).gauss(4, 0.3) for _ in range(40)]
    estimate = clustered_mean((7 * value, 7) for value in values)
    assert estimate.mean == pytest.approx(statistics.mean(values))
    assert estimate.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(40))
    assert not estimate.is_few


def test_windows_of_one_document_are_no_evidence_of_their_own():
    """Cutting each document into ten equal windows changes nothing."""
    documents = [(30.0, 10), (41.0, 10), (38.0, 10)]
    windows = [(total / 10, size / 10) for total, size in documents for _ in range(10)]
    assert clustered_mean(windows).stderr < 0.6 * clustered_mean(documents).stderr


def test_one_cluster_has_no_error_and_none_no_mean():
    one = clustered_mean([(6.0, 2)])
    assert one == Estimate(3.0, None, 1) and one.half_width() is None and one.is_few
    with pytest.raises(ValueError, match="at least one cluster"):
        clustered_mean([(0.0, 0)])


def test_the_simulation_shows_which_interval_covers_the_truth(tmp_path):
    """300 documents of 20 windows that resemble each other, each window in two rows of the file."""
    normal, rows = random.Random(0).gauss, []
    for document in range(300):
        loss = normal(4, 0.3)
        for window in range(20):
            rows += [(window, document, 100 * (loss + normal(0, 0.3)), 100) for _ in range(2)]
    columns = dict(
        zip(("window", "cluster", "nats", "tokens"), zip(*rows, strict=True), strict=True)
    )
    (tmp_path / "validation_step_1.json").write_text(json.dumps(columns))
    benchmark = runpy.run_path(str(PROJECT_ROOT / "benchmarks" / "coverage.py"))
    clusters = benchmark["read_clusters"](tmp_path / "validation_step_1.json")
    assert len(clusters) == 300 and all(len(windows) == 20 for windows in clusters)
    assert all(tokens == 200 for windows in clusters for _, tokens in windows)
    for drawn in (3, 8, 30):
        result = benchmark["simulate"](clusters, drawn, 800)
        assert 0.93 < result["by document"] < 0.97 and result["by window"] < 0.7
