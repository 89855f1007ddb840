"""What holds for every input, looked for by hypothesis among many."""

import contextlib
import string
from typing import get_type_hints

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lmlib.config import RunConfig
from lmlib.data.corpus import cut
from lmlib.data.tokens import permute
from lmlib.errors import UserError
from lmlib.generation.sampling import sample_token
from lmlib.parameters import check_plain, parse_overrides, read_parameters

# The same inputs every time, and no limit of time: the machine may be busy.
settings.register_profile("lmlib", derandomize=True, deadline=None, database=None)
settings.load_profile("lmlib")

SEEDS = st.integers(0, 2**63 - 1)


@given(st.integers(1, 3000), SEEDS, st.integers(0, 2**32 - 1))
def test_permute_visits_every_window_once(size, seed, epoch):
    found = permute(np.arange(size), size, seed, epoch)
    assert sorted(found.tolist()) == list(range(size))


@given(st.data(), st.integers(1, 2**40), SEEDS)
def test_permute_of_a_part_is_a_part_of_the_permutation(data, size, seed):
    places = st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True)
    index = np.array(data.draw(places))
    found = permute(index, size, seed, 0)
    assert ((found >= 0) & (found < size)).all() and len(set(found.tolist())) == len(index)
    assert [int(permute(index[n : n + 1], size, seed, 0)[0]) for n in range(len(index))] == (
        found.tolist()
    )


LINES = st.lists(st.text(st.sampled_from("ab  é\u2028\t"), max_size=80), max_size=60)


@given(LINES, st.integers(1, 40))
@example(["  a"], 1)  # a line is cut in its white space
def test_cut_documents_joined_are_the_lines_joined(lines, size):
    documents = list(cut(lines, size))
    whole = "".join(line + "\n" for line in lines)
    blank = next((n for n, line in enumerate(lines) if line.strip()), len(lines))
    start = sum(len(line) + 1 for line in lines[:blank])
    assert all(document.strip() for document in documents)
    # White space may be left out before a document, and nothing else.
    rest = whole[start:]
    for document in documents:
        places = range(len(rest) - len(rest.lstrip()) + 1)
        [place, *_] = [place for place in places if rest.startswith(document, place)]
        rest = rest[place + len(document) :]
    assert not rest.strip()
    assert all(len(document) <= 4 * size + 1 for document in documents)


YAML = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
HOSTILE = st.text(string.printable + "é\x00\u2028!&*|>%@`", max_size=60)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(HOSTILE | YAML.map(lambda value: yaml.dump(value, allow_unicode=True)))
@example("a: 1\na: 2")
@example("? !!python/object/apply:os.system ['true']\n: 1")
def test_a_parameter_file_gives_plain_values_or_an_error_for_people(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(UserError):
        parameters = read_parameters(file)
        assert check_plain(parameters, "it") == parameters
        for name, value in parameters.items():
            assert name.isidentifier() and isinstance(value, str | int | float | None)
            assert not isinstance(value, str) or value.isprintable()


@given(st.sampled_from(sorted(get_type_hints(RunConfig))), HOSTILE)
def test_any_override_gives_a_run_or_an_error_for_people(name, text):
    with contextlib.suppress(UserError):
        config = RunConfig(**parse_overrides([(name, text)], get_type_hints(RunConfig)))
        assert RunConfig(**config.to_dict()) == config


LOGITS = st.lists(st.integers(-40, 40).map(lambda n: n / 4), min_size=1, max_size=30)


@given(LOGITS, st.floats(0, 1, exclude_max=True), st.floats(0.1, 5), st.integers(1, 40),
       st.floats(0.01, 1), st.floats(0, 1))  # fmt: skip
def test_a_sampled_token_is_one_that_the_filters_keep(logits, u, temperature, top_k, top_p, min_p):
    row, top_k = torch.tensor(logits), min(top_k, len(logits))
    token = int(sample_token(row[None], u, temperature, top_k, top_p, min_p))
    scaled = (row.double() / temperature).softmax(0)
    # The slow definition: the k likeliest (ties stay), then the smallest set that holds p.
    least = sorted(logits, reverse=True)[top_k - 1]
    kept = torch.where(row >= least, scaled, 0.0)
    kept /= kept.sum()
    more_likely = sum(p for p in kept.tolist() if p > kept[token] * (1 + 1e-9))
    assert row[token] >= least
    assert more_likely < top_p or more_likely == pytest.approx(top_p)
    assert kept[token] >= min_p * kept.max() * (1 - 1e-9)


@given(LOGITS, st.floats(0, 1, exclude_max=True))
def test_temperature_0_takes_the_likeliest(logits, u):
    row = torch.tensor(logits)
    assert row[int(sample_token(row[None], u, 0.0, None, None))] == max(logits)
