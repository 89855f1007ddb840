"""Paired, clustered differences against the slow obvious computation, and what is refused."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from evaluations import documents, write_evaluation, write_run

from lmlib.analysis import comparison, render

A = [3.0, 4.0, 5.0, 3.5, 4.2, 4.4]
B = [3.2, 4.1, 5.3, 3.6, 4.5, 4.7]  # a hard document is hard for both


def slow_interval(first: dict, second: dict) -> tuple[float, float]:
    """Mean difference per token and half its 95 % interval, from the definition."""
    sums = [
        (sum(r[0] for r in first[key]) - sum(r[0] for r in second[key]), sum(r[1] for r in rows))
        for key, rows in first.items()
    ]
    size, count = sum(tokens for _, tokens in sums), len(sums)
    mean = sum(nats for nats, _ in sums) / size
    squares = sum((nats - mean * tokens) ** 2 for nats, tokens in sums)
    quantile = {5: 2.5706, 9: 2.2622}[count - 1]  # from a published table
    return mean, quantile * math.sqrt(count / (count - 1) * squares) / size


def test_the_interval_is_that_of_paired_documents(tmp_path):
    a, b = (write_run(tmp_path, name, documents(losses)) for name, losses in (("a", A), ("b", B)))
    found = comparison.compare(a, b)
    mean, half = slow_interval(documents(A), documents(B))
    assert (found.unit, found.clustered_by, found.clusters) == ("nats per token", "documents", 6)
    assert found.estimate.mean == pytest.approx(mean)
    assert found.estimate.half_width() == pytest.approx(half, rel=1e-4)
    assert found.verdict == "better" and found.names == ("a", "b")
    # Unpaired, documents of 3 to 5 nats hide a difference of 0.2.
    assert half < 0.2 < np.std(A) / math.sqrt(6)
    assert list(found.table["a"]) == pytest.approx(A)
    assert list(found.table["difference"]) == pytest.approx(list(np.subtract(A, B)))
    assert str(found).startswith(f"a − b: {mean:+.4f} ± {half:.4f} (95 %) nats per token, 6 docum")


def test_swapped_runs_change_the_sign_alone(tmp_path):
    a, b = (write_run(tmp_path, name, documents(losses)) for name, losses in (("a", A), ("b", B)))
    found, swapped = comparison.compare(a, b), comparison.compare(b, a)
    assert swapped.estimate.mean == pytest.approx(-found.estimate.mean)
    assert swapped.estimate.stderr == pytest.approx(found.estimate.stderr)
    assert (found.verdict, swapped.verdict) == ("better", "worse")


def test_windows_of_one_document_are_not_independent(tmp_path):
    """Twice the windows of the same six documents make nothing more certain."""
    once, twice = (
        [
            write_run(
                tmp_path / str(times),
                name,
                {key: rows * times for key, rows in documents(losses).items()},
            )
            for name, losses in (("a", A), ("b", B))
        ]
        for times in (1, 2)
    )
    one, two = comparison.compare(*once).estimate, comparison.compare(*twice).estimate
    assert (one.clusters, one.stderr) == (two.clusters, pytest.approx(two.stderr))


def test_another_tokenizer_is_compared_by_documents_in_bits_per_byte(tmp_path):
    """b's tokens are half as long; documents that only one run was scored on are left out."""
    a = write_run(tmp_path, "a", documents([*A, 9.0]))
    rows = {
        key: [(nats, 2 * tokens, size) for nats, tokens, size in entries]
        for key, entries in documents(B).items()
    }
    b = write_run(tmp_path, "b", rows, data="other tokens")
    found = comparison.compare(a, b)
    assert (found.unit, found.clusters) == ("bits per byte", 6)
    sums, count = documents(A), 3 * sum(row[1] for rows in documents(A).values() for row in rows)
    nats = sum(row[0] for rows in sums.values() for row in rows)
    others = sum(row[0] for entries in rows.values() for row in entries)
    assert found.estimate.mean == pytest.approx((nats - others) / count / math.log(2))
    assert list(found.table["bytes"]) == [3 * (10 * (2 + n) + 1) for n in range(6)]
    longer = write_run(tmp_path, "longer", documents(B), sequence_length=16)
    assert comparison.compare(a, longer).unit == "bits per byte"


def test_under_five_documents_there_is_no_verdict(tmp_path):
    a, b = (
        write_run(tmp_path, name, documents(losses[:4])) for name, losses in (("a", A), ("b", B))
    )
    found = comparison.compare(a, b)
    assert found.verdict == "few documents" and "4 documents, step 10: few documents" in str(found)
    drawn = comparison.figure(found)
    assert "95 % interval (few documents)" in {trace.name for trace in drawn.data}
    c, d = (
        write_run(tmp_path, name, documents(losses[:1])) for name, losses in (("c", A), ("d", B))
    )
    found = comparison.compare(c, d)
    assert found.estimate.half_width() is None and "±" not in str(found)
    assert found.verdict == "few documents" and len(comparison.figure(found).data) == 3


def test_a_leaky_run_is_compared_with_leaky_runs_alone(tmp_path):
    honest = write_run(tmp_path, "honest", documents(A))
    leaky = write_run(tmp_path, "masked", documents(B), leaks="causality, cache")
    for pair in ((honest, leaky), (leaky, honest)):
        with pytest.raises(ValueError, match=r"masked \(LEAKY\) leaks, .* causality, cache\. Comp"):
            comparison.compare(*pair)
    other = write_run(tmp_path, "other", documents(A), leaks="split")
    found = comparison.compare(leaky, other)
    assert found.names == ("masked (LEAKY)", "other (LEAKY)") and found.verdict == "worse"


def test_what_has_no_text_in_common_is_refused(tmp_path):
    a = write_run(tmp_path, "a", documents(A))
    other = {f"x{key}": rows for key, rows in documents(B).items()}
    b = write_run(tmp_path, "b", other, data="d1")
    with pytest.raises(ValueError, match="of their 6 and 6 validation documents, none is the same"):
        comparison.compare(a, b)
    with pytest.raises(ValueError, match="are the same run"):
        comparison.compare(a, a)


def test_the_last_validation_is_compared_or_that_of_a_step(tmp_path):
    a, b = (
        write_run(tmp_path, name, documents(losses), step=9)
        for name, losses in (("a", A), ("b", B))
    )
    write_evaluation(a, documents(B), step=100)
    write_evaluation(a, documents([9.0] * 6), step=200, split="test")  # reports, compares nothing
    found = comparison.compare(a, b)
    assert found.steps == (100, 9) and found.verdict == "no difference found"
    assert "step 100 and 9" in str(found)
    assert comparison.compare(a, b, step=9).verdict == "better"
    with pytest.raises(ValueError, match="b has no validation of step 100, but of the steps 9"):
        comparison.compare(a, b, step=100)


def test_runs_without_evaluation_files_are_refused(tmp_path, trained):
    a, old = write_run(tmp_path, "a", documents(A)), tmp_path / "old"
    old.mkdir()
    with pytest.raises(ValueError, match="old has no files of its evaluations: an older version"):
        comparison.compare(a, old)


@pytest.mark.parametrize(
    "change",
    [
        {"clusters": []},
        {"nats": 5},
        {"data": None, "nats": ["x"] * 12},
        {"nats": [math.nan] * 12},
        {"cluster": [-1] * 12},
        {"cluster": [99] * 12},
        {"tokens": [1]},
    ],
)
def test_a_damaged_evaluation_is_an_error(change, tmp_path):
    a = write_run(tmp_path, "a", documents(A))
    b = write_run(tmp_path, "b", documents(B))
    file = b / "evaluations" / "validation_step_10.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match="validation_step_10.json is damaged"):
        comparison.compare(a, b)
    for content in ("[1]", "{}", "{"):
        file.write_text(content)
        with pytest.raises(ValueError, match="is damaged|cannot be read"):
            comparison.compare(a, b)


@pytest.mark.parametrize(("count", "low", "high"), [(8, 0.88, 0.99), (30, 0.90, 0.98)])
def test_the_interval_covers_the_true_difference_as_often_as_it_says(count, low, high):
    """Two equal models on 500 sets of documents of unequal size, each with its own difficulty."""
    generator, covered = np.random.default_rng(0), 0
    for _ in range(500):
        size = np.exp(generator.normal(6, 0.7, count))
        of_document = generator.normal(0, 0.05, count)  # one model knows some documents better
        noise = generator.normal(0, 1, count) / np.sqrt(size)
        table = pd.DataFrame({"difference": of_document + noise, "size": size})
        estimate = comparison.difference_of(table)
        covered += abs(estimate.mean) <= estimate.half_width()
    assert low < covered / 500 < high


def test_the_figure_shows_each_document_the_mean_and_its_interval(tmp_path):
    a, b = (
        write_run(tmp_path, name, documents(losses)) for name, losses in (("<a>", A), ("b$1$", B))
    )
    found = comparison.compare(a, b)
    drawn = comparison.figure(found)
    lines = {trace.name: list(trace.y) for trace in drawn.data}
    assert lines["documents"] == pytest.approx(sorted(np.subtract(A, B)))
    assert lines["mean"] == [found.estimate.mean] * 2
    edges = [trace.y[0] for trace in drawn.data if trace.name == "95 % interval"]
    mean, half = found.estimate.mean, found.estimate.half_width()
    assert edges == pytest.approx([mean - half, mean + half])
    assert "&lt;a&gt; − b$1$" in drawn.layout.annotations[0].text
    assert render.png(drawn).startswith(b"\x89PNG")
