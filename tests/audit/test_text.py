"""The checks of splits, tokenizers and evaluations find every planted fault; correct ones pass."""

import tracemalloc

import numpy as np
import pytest
import torch
from planted import Decoder, V
from torch import nn

from lmlib import audit
from lmlib.audit.split import shared_spans, shared_tokens, words
from lmlib.config import RunConfig
from lmlib.data.corpus import content_hash, documents
from lmlib.data.tokenizer import train_tokenizer
from lmlib.data.tokens import cut_windows as tokens_windows


@pytest.fixture(scope="module")
def plays():
    """Return (training, held-out) pieces of real plays, split by their hash."""
    texts = [
        piece
        for play, _ in list(documents("shakespeare", RunConfig()))[:4]
        for piece in pieces(play)
    ]
    split_at = 0.2 * 2**64
    training = [text for text in texts if content_hash(text) >= split_at]
    return training, [text for text in texts if content_hash(text) < split_at]


def pieces(play, size=1500):
    return [play[start : start + size] for start in range(0, len(play), size)]


def test_a_clean_split_passes(plays):
    report = audit.check_split(*plays)
    assert report.passed is True and report.numbers["share of words"] < 0.02


def test_a_document_in_both_splits_is_found(plays):
    training, held_out = plays
    report = audit.check_split([*training, held_out[3]], held_out)
    assert (
        report.passed is False
        and report.pattern == "duplicates"
        and report.numbers["copies"] == [3]
    )


def test_a_document_that_differs_in_case_and_spacing_is_found(plays):
    training, held_out = plays
    report = audit.check_split([*training, held_out[2].upper().replace(" ", "\n  ")], held_out)
    assert (
        report.passed is False
        and report.pattern == "duplicates"
        and report.numbers["normalized copies"] == [2]
    )


def test_a_near_duplicate_is_found(plays):
    training, held_out = plays
    words = held_out[1].split(" ")
    words[:: len(words) // 5] = ["changed"] * len(words[:: len(words) // 5])
    report = audit.check_split([*training, " ".join(words)], held_out)
    assert (
        report.passed is False
        and report.pattern == "near duplicates"
        and report.numbers["near duplicates"] == [1]
    )


def test_shared_runs_equal_those_of_a_slow_search():
    generator = np.random.default_rng(0)
    training, held_out = generator.integers(0, 3, 4000), generator.integers(0, 3, 300)
    held_out[40:70] = training[500:530]
    held_out[100] = -1
    runs = {tuple(training[i : i + 8]) for i in range(len(training) - 7)}
    slow = np.zeros(300, dtype=bool)
    for i in range(300 - 7):
        if tuple(held_out[i : i + 8]) in runs:
            slow[i : i + 8] = True
    assert (
        np.array_equal(shared_tokens(training, held_out, 8), slow)
        and slow[40:70].all()
        and not slow.all()
    )


def test_overlapping_windows_split_at_random_are_found():
    tokens = np.random.default_rng(0).integers(0, 500, 3000)
    starts = np.random.default_rng(1).permutation(len(tokens) - 65)
    clean = tokens_windows(np.random.default_rng(2).integers(0, 500, 3000), range(0, 2900, 64), 64)
    leaky = tokens_windows(tokens, starts[:20], 64)
    report = audit.check_windows(tokens, leaky)
    assert (
        report.passed is False
        and report.pattern == "overlapping windows"
        and report.numbers["share of tokens"] == 1
    )
    assert audit.check_windows(tokens, clean).passed is True


def test_a_small_share_of_copied_text_is_found():
    """15 % of the held-out windows are training text, word for word."""
    generator = np.random.default_rng(0)
    training, held_out = generator.integers(0, 500, 8000), generator.integers(0, 500, 4000)
    held_out[:600] = training[1000:1600]
    report = audit.check_windows(training, tokens_windows(held_out, range(0, 3900, 100), 99))
    assert report.passed is False and report.pattern == "shared text"
    assert report.numbers["share of tokens"] == pytest.approx(0.15, abs=0.01)
    held_out[150:600] = 501  # what is left, 4 %, could be set phrases
    report = audit.check_windows(training, tokens_windows(held_out, range(0, 3900, 100), 99))
    assert report.passed is True and 0.03 < report.numbers["share of tokens"] < 0.05


def test_windows_shorter_than_a_run_are_judged_by_the_text_around_them():
    generator = np.random.default_rng(0)
    training, held_out = generator.integers(0, 500, 8000), generator.integers(0, 500, 4000)
    held_out[1000:1400] = training[3000:3400]
    starts = np.arange(0, 3999, 8)[:-1]
    windows = tokens_windows(held_out, starts, 8)
    assert audit.check_windows(training, windows).passed is None
    report = audit.check_tokens(training, held_out.astype(np.uint16), starts, 9)
    assert report.passed is False and report.pattern == "shared text"
    assert report.numbers == {
        "share of tokens": 400 / (8 * len(starts)),
        "windows mostly shared": 50,
    }
    assert audit.check_tokens(training, held_out[:1000], starts[:120], 9).passed is True
    assert audit.check_tokens(training, held_out[:12], starts[:1], 9).passed is None


@pytest.mark.parametrize(("length", "n"), [(2, 13), (9, 13), (13, 13), (40, 13), (7, 1)])
def test_shared_windows_of_a_stream_are_those_of_the_whole_stream(length, n):
    generator = np.random.default_rng(0)
    training, held_out = generator.integers(0, 300, 4000), generator.integers(0, 300, 500)
    held_out[:20], held_out[200:290] = training[30:50], training[100:190]
    held_out[490:] = training[:10]  # shorter than a run
    starts = np.array([0, 5, 195, 230, 283, 500 - length])
    shared = shared_tokens(training, held_out, n)
    slow = np.stack([shared[start : start + length] for start in starts])
    assert np.array_equal(shared_spans(training, held_out, starts, length, n).numpy(), slow)


CHINESE = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜金生丽水玉出昆冈"
THAI = "กาลครั้งหนึ่งนานมาแล้วมีเด็กผู้หญิงคนหนึ่งอาศัยอยู่กับแม่ของเธอในหมู่บ้านเล็กๆใกล้ป่าใหญ่แห่งหนึ่ง"


@pytest.mark.parametrize("text", [CHINESE, THAI], ids=["Chinese", "Thai"])
def test_a_near_duplicate_without_spaces_between_words_is_found(text):
    """A third of the document is its own; it has no spaces, and commas at other places."""
    training = [f"{text[:30]}，{text[30:]}。"]
    held_out = [f"{text[:40]}，{text[40:]}{text[::-1][: len(text) // 3]}。"]
    report = audit.check_split(training, held_out)
    assert report.passed is False and report.pattern == "near duplicates"
    assert audit.check_split(training, [text[::-1]]).passed is True


def test_words_are_characters_only_in_scripts_without_spaces():
    assert words("Don't panic_now: 42 naïve Straßen, хлеб") == (
        ["Don", "t", "panic_now", "42", "naïve", "Straßen", "хлеб"]
    )
    assert words("GPT模型2024年, カナ") == ["GPT", "模", "型", "2024", "年", "カ", "ナ"]


def test_a_held_out_document_that_an_ancestor_trained_on_is_found():
    generator = np.random.default_rng(0)
    trained = np.unique(generator.integers(0, 2**64, 1000, np.uint64))
    held_out = generator.integers(0, 2**64, 200, np.uint64)
    report = audit.check_lineage(trained, held_out, True)
    assert report.passed is True
    assert "none of the 200 held-out documents is among the 1,000" in report.summary
    report = audit.check_lineage(trained, held_out, False)
    assert report.passed is None and report.summary.startswith("lineage unknown")
    held_out[[3, 5]] = trained[[0, -1]]  # 1 %: two empty forms
    for complete in (True, False):
        report = audit.check_lineage(trained, held_out, complete)
        assert report.passed is (True if complete else None)
        assert "2 of the 200 held-out documents are among the 1,000" in report.summary
    held_out[7] = trained[500]
    for complete in (True, False):
        report = audit.check_lineage(trained, held_out, complete)
        assert report.passed is False and report.numbers["found"] == 3
        assert report.pattern == "held-out documents were trained on"
    assert audit.check_lineage(trained[:0], held_out, False).passed is None
    assert audit.check_lineage(trained, held_out[:0], True).passed is None


def test_a_tokenizer_that_saw_held_out_text_is_found(plays):
    training, held_out = plays
    clean = train_tokenizer(training, 2000)
    assert audit.check_tokenizer(clean, training, held_out).passed is True
    everything = [*training, *held_out, *(["The Zanzibarian quokka"] * 50)]
    held_out = [*held_out, "The Zanzibarian quokka sleeps."]
    report = audit.check_tokenizer(train_tokenizer(everything, 2000), training, held_out)
    assert report.passed is False and report.pattern == "tokenizer saw held-out text"
    assert any(
        "quok" in text or "Zan" in text for text in report.numbers["unknown to training text"]
    )


def test_a_tokenizer_is_checked_in_one_pass_and_in_bounded_memory(plays):
    training, held_out = plays
    tokenizer = train_tokenizer([*training, *(["The Zanzibarian quokka"] * 50)], 2000)
    held_out = [*held_out, "The Zanzibarian quokka sleeps."]
    whole = audit.check_tokenizer(tokenizer, training, held_out)
    streamed = audit.check_tokenizer(tokenizer, iter(training), iter(held_out))
    assert streamed == whole and whole.passed is False

    def peak(repeats):
        """Peak of Python's memory, in bytes, of so many readings of the training text."""
        texts = (text + " " for _ in range(repeats) for text in training)  # new strings each time
        tracemalloc.start()
        audit.check_tokenizer(tokenizer, texts, iter(held_out))
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert next(texts, None) is None, "the quokka is looked for to the end"
        return result

    size = sum(map(len, training))
    several = 1 + 2**21 // size  # two groups of texts and more
    assert peak(2 * several) < 1.1 * peak(several)


# ---------------------------------------------------------------------------------------------------
# Evaluations


def mean_loss(model, windows):
    model.eval()
    logits = model(windows[:, :-1])
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


def in_training_mode(model, windows):
    logits = model(windows[:, :-1])
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


EVALUATIONS = {
    "in training mode": in_training_mode,
    "first batches only": lambda model, windows: mean_loss(model, windows[:5]),
}


def windows(rows=12):
    return torch.randint(V, (rows, 17), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fault", EVALUATIONS)
def test_a_wrong_evaluation_is_found_and_named(fault):
    report = audit.check_evaluation(EVALUATIONS[fault], Decoder(), windows())
    assert report.passed is False and report.pattern == fault


def test_an_evaluation_with_batch_statistics_is_named():
    model = Decoder("batch norm")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    report = audit.check_evaluation(in_training_mode, model, windows())
    assert report.passed is False and "batch statistics" in report.summary


def test_a_correct_evaluation_passes_and_the_model_keeps_its_mode():
    model = Decoder().train()
    assert audit.check_evaluation(mean_loss, model, windows()).passed is True
    assert all(module.training for module in model.modules())
    with pytest.raises(ValueError, match="four windows or more"):
        audit.check_evaluation(mean_loss, model, windows(3))


def sample(documents, stderr=0.114):
    """Scores of an evaluation as run records have them."""
    return {"val_loss": 3.953, "val_loss_stderr": stderr, "val_documents": documents}


def test_a_score_is_reported_with_the_interval_of_its_documents():
    report = audit.check_sample(sample(10), 128, 32768)
    assert report.passed is True
    assert "128 windows of 10 documents, 32,768 tokens: 3.9530 nats" in report.summary
    assert "± 0.2579 (95 %)" in report.summary  # 2.26216 standard errors
    assert "paired differences" in report.summary and "noise" not in report.summary
    report = audit.check_sample(sample(10), 128, 32768, "tenths of one file")
    assert "128 windows of 10 tenths of one file" in report.summary


def test_the_error_of_few_documents_is_shown_but_not_judged():
    report = audit.check_sample(sample(3), 128, 32768)
    assert report.passed is None and report.summary.startswith("few documents: 3;")
    assert "3.9530 nats" in report.summary and "± 0.4905 (95 %)" in report.summary
    report = audit.check_sample(sample(1, None), 128, 32768)
    assert report.passed is None and "one document has no standard error" in report.summary
    assert audit.check_sample(sample(5), 128, 32768).passed is True


def test_a_score_of_an_older_version_is_not_judged():
    scores = {"val_loss": 3.953, "val_loss_stderr": 0.031}
    report = audit.check_sample(scores, 128, 32768)
    assert report.passed is None and "windows as independent" in report.summary
    assert audit.check_sample(scores | {"val_loss_stderr": None}, 1, 9).pattern == "too small"


# ---------------------------------------------------------------------------------------------------
# Profiles


def test_a_missing_mask_is_recognized_by_its_profile():
    L, p, last = 256, 0.22, 4.5
    losses, correct = torch.full((L,), 1e-4), torch.ones(L)
    losses[-1], correct[-1] = last, p
    report = audit.check_profile(losses, correct)
    assert report.passed is False and report.pattern == "missing mask"
    assert (
        "(256 - 1 + 0.22) / 256 = 99.70%" in report.summary
        and "4.50 / 256 = 0.0176" in report.summary
    )


def test_memorized_text_and_visible_answers_are_recognized():
    L = 1024
    falling = 3 + 3 * torch.arange(1, L + 1).double() ** -0.5
    assert audit.check_profile(falling, 1 / falling).passed is True
    memorized = torch.full((L,), 0.002).double()
    memorized[:8] = torch.tensor([5.0, 4, 3, 2, 1.5, 1, 0.8, 0.6])
    report = audit.check_profile(memorized, torch.exp(-memorized))
    assert (
        report.pattern == "memorized" and "the first 8 positions cost 17.9 nats" in report.summary
    )
    assert audit.check_profile(torch.full((L,), 0.01), torch.ones(L)).pattern == "answers are seen"
    with pytest.raises(ValueError, match="four positions or more"):
        audit.check_profile([1.0, 2.0], [0.1, 0.2])


def test_unusual_profiles_are_reported():
    low = torch.zeros(8).double()
    low[0] = 0.4
    report = audit.check_profile(low, torch.full((8,), 0.5))
    assert report.pattern == "memorized" and "the first position costs 0.4 nats" in report.summary
    low[3] = torch.nan
    report = audit.check_profile(low, torch.full((8,), 0.5))
    assert report.passed is None and "not finite" in report.summary
