"""What `lmlib data` says of a corpus, beside the obvious count."""

import json

import numpy as np
import pytest

from lmlib.cli.parser import main
from lmlib.data import describe
from lmlib.data.corpus import content_hash, documents, split_rules
from lmlib.data.prepare import prepare

CORPUS = {"corpus": "", "validation_fraction": 0.3, "test_fraction": 0.2, "vocab_size": 300}


@pytest.fixture
def corpus(tmp_path):
    """200 documents of different lengths, of which 20 are copies in other case."""
    texts = [f"Document {n} " + "says something. " * (1 + n % 7) for n in range(180)]
    texts += [text.upper() for text in texts[:20]]
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


@pytest.fixture
def store(smoke, corpus):
    return prepare(smoke(**{**CORPUS, "corpus": corpus}))


def texts_by_split(config) -> dict[str, list[str]]:
    [(corpus, rule)] = split_rules(config)
    found = {}
    for text, _ in documents(corpus, config):
        found.setdefault(rule.split_of(content_hash(text)), []).append(text)
    return found


def test_the_summary_counts_what_is_in_the_store(store):
    by_split = texts_by_split(store.config)
    summaries = describe.summarize(store)
    assert [s.name for s in summaries] == ["training", "validation", "test"]
    for summary in summaries:
        texts = by_split[summary.name]
        encoded = [len(store.tokenizer(text)["input_ids"]) + 1 for text in texts]
        assert summary.documents == len(texts)
        assert summary.duplicates == len(texts) - len({content_hash(text) for text in texts})
        assert summary.bytes == sum(len(text.encode()) for text in texts)
        assert summary.tokens == sum(encoded)
        assert (summary.lengths["least"], summary.lengths["most"]) == (min(encoded), max(encoded))
        median = np.quantile(encoded, 0.5, method="nearest")
        assert summary.lengths["median"] == median
    assert sum(summary.duplicates for summary in summaries) == 20


def test_documents_may_cross_the_chunks_that_are_read(monkeypatch):
    tokens = np.array([5, 5, 0, 5, 0, 0, 5, 5, 5, 5, 0, 5])
    for chunk in (1, 2, 3, 5, 100):
        monkeypatch.setattr(describe, "CHUNK", chunk)
        assert list(describe.document_lengths(tokens, 0)) == [3, 2, 1, 5, 1]


def test_samples_are_beginnings_of_training_documents(store):
    texts = texts_by_split(store.config)["training"]
    found = describe.samples(store, count=3, length=8)
    assert len(found) == 3 and all(any(t.startswith(s) for t in texts) for s in found)


def test_the_command_describes_a_corpus_and_reports_one_that_is_missing(corpus, outputs, capsys):
    values = {**CORPUS, "corpus": corpus, "output_dir": outputs}
    given = [word for name, value in values.items() for word in ("-p", name, str(value))]
    assert main(["data", "smoke", *given]) == 0
    shown = capsys.readouterr().out
    assert "documents duplicates" in shown and "tokens of a document" in shown
    assert "20 steps of 4 windows read the training text" in shown and "> Document" in shown
    assert main(["data", "smoke", "-p", "corpus", "no/such.txt"]) == 1
    assert "no/such.txt" in capsys.readouterr().err
