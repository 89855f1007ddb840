"""lmlib benchmark without lm-eval: the items that are cut, the scores that are summarized."""

import json
import math

import pytest

from lmlib.data.prepare import prepare
from lmlib.errors import UserError
from lmlib.tools.benchmark import CHOICES, CONTEXT, ENDING, ITEMS, cut_items, summarize


@pytest.fixture(scope="module")
def store(trained):
    return prepare(trained)


def test_items_are_cut_from_test_documents(store):
    items, documents = cut_items(store), list(store.texts("test"))
    by_unit = dict(zip(store.evaluation_text("test").units, documents, strict=True))
    assert [len(of) for of in items.values()] == [16, ITEMS, ITEMS]
    for item in items["run_text"]:
        assert item["text"] in "".join(documents)
    for cloze, choice in zip(items["run_cloze"], items["run_choice"], strict=True):
        text = by_unit[cloze["document"]]
        assert len(cloze["context"].split()) == CONTEXT and not cloze["context"][-1].isspace()
        assert cloze["context"] + cloze["word"] in text and cloze["word"][0].isspace()
        assert choice["context"] == cloze["context"] and len(choice["endings"]) == CHOICES
        true = choice["endings"][choice["answer"]]
        assert choice["context"] + true in text and true.startswith(cloze["word"])
        assert {len(ending.split()) for ending in choice["endings"]} == {ENDING}
        assert all(any(end in document for document in documents) for end in choice["endings"])
    answers = [item["answer"] for item in items["run_choice"]]
    assert all(30 < answers.count(place) < 70 for place in range(CHOICES))
    assert len({item["document"] for item in items["run_cloze"]}) == len(documents)


def test_items_do_not_depend_on_the_model(store, trained, smoke):
    other = prepare(smoke(seed=7, hidden_size=16))
    assert cut_items(other) == cut_items(store)


def test_short_documents_give_fewer_items_each_with_one_right_answer(smoke, tmp_path):
    lines = [" ".join(str(n + i % 12) for i in range(45)) for n in range(3000)]
    corpus = tmp_path / "short.jsonl"
    corpus.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines[:40]))
    config = smoke(corpus=str(corpus), validation_fraction=0.3, test_fraction=0.1)
    items = cut_items(prepare(config))
    assert 10 < len(items["run_cloze"]) < ITEMS
    for task in ("run_cloze", "run_choice"):
        kept = [json.dumps(item, sort_keys=True) for item in items[task]]
        assert len(set(kept)) == len(kept)
    assert all(len(set(item["endings"])) == CHOICES for item in items["run_choice"])


def test_documents_without_enough_words_are_refused(smoke, tmp_path):
    lines = [f"{number} words are here" for number in range(3000)]
    corpus = tmp_path / "short.jsonl"
    corpus.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    with pytest.raises(UserError, match="No test document has more than 38 words"):
        cut_items(prepare(smoke(corpus=str(corpus))))


def sample(document: str | None, **values) -> dict:
    doc = {"document": document} if document else {}
    return {"doc": doc, "target": "x", "arguments": [("context", "x")], **values}


def test_errors_are_clustered_by_document():
    """Equal answers within each of two documents are two measurements, not eight."""
    samples = [sample(name, acc=right) for name, right in [("a", 1.0), ("b", 0.0)] * 4]
    [score] = summarize("run_cloze", samples)
    assert (score["score"], score["items"], score["clusters"]) == (0.5, 8, 2)
    assert score["stderr"] == pytest.approx(0.5)
    [alone] = summarize("public", [sample(None, acc=of["acc"]) for of in samples])
    assert alone["stderr"] == pytest.approx(0.5 / math.sqrt(7)) and alone["clusters"] == 8
    [single] = summarize("run_cloze", [sample("a", acc=1.0)])
    assert single["stderr"] is None


def test_bits_per_byte_are_weighted_by_bytes():
    nats = [(-8 * math.log(2), 4), (-10 * math.log(2), 20)]
    samples = [sample(name, bits_per_byte=pair) for name, pair in zip("ab", nats, strict=True)]
    [score] = summarize("run_text", samples)
    assert score["score"] == pytest.approx(18 / 24) and score["chance"] == 8.0


def test_each_way_to_read_an_answer_has_a_score():
    right = {"strict-match": 0.0, "flexible-extract": 1.0}
    samples = [sample(None, exact_match=right[name], filter=name) for name in right for _ in "abc"]
    scores = {score["metric"]: score for score in summarize("gsm8k", samples)}
    assert list(scores) == ["exact_match,strict-match", "exact_match,flexible-extract"]
    assert [score["score"] for score in scores.values()] == [0.0, 1.0]
    assert {score["items"] for score in scores.values()} == {3}


def test_chance():
    def chance(*changes: dict) -> float:
        samples = [sample(None, acc=0.0, other_metric=1.0) | change for change in changes]
        [score] = summarize("task", samples)
        return score["chance"]

    two, four = ({"arguments": [("context", "x")] * count} for count in (2, 4))
    assert chance(two, four) == pytest.approx(0.375)
    assert chance({"target": "the"}, {"target": "the"}, {"target": "a"}) == pytest.approx(2 / 3)
