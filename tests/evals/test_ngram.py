"""The n-gram baselines against loops over tiny corpora, and as probabilities."""

import collections
import itertools
import math
import re

import numpy as np
import pytest

from mixtral_jax.evals import ngram

V = 7
TRAIN = [[1, 3, 4, 3, 4, 5, 2], [1, 3, 4, 4, 2], [], [1, 2], [1]]
HELD = [[1, 3, 4, 5, 5, 2], [1, 6, 3, 2], []]


def flat(documents):
    tokens = np.array([token for document in documents for token in document], np.uint16)
    return tokens, np.cumsum([0] + [len(document) for document in documents])


def brute_counts(documents):
    unigrams, bigrams, contexts = collections.Counter(), collections.Counter(), collections.Counter()
    for document in documents:
        unigrams.update(document[1:])
        bigrams.update(itertools.pairwise(document))
        contexts.update(document[:-1])
    return unigrams, bigrams, contexts


def brute_p(documents, alpha, weight):
    """Returns p(w) and p(w|v) as functions; weight(c(v), t(v)) is lam(v) for a v that was seen."""
    unigrams, bigrams, contexts = brute_counts(documents)
    total = sum(unigrams.values())

    def p_uni(w):
        return (unigrams[w] + alpha) / (total + alpha * V)

    def p_bi(v, w):
        if not contexts[v]:
            return p_uni(w)
        lam = weight(contexts[v], sum(1 for a, _ in bigrams if a == v))
        return lam * bigrams[v, w] / contexts[v] + (1 - lam) * p_uni(w)

    return p_uni, p_bi


def brute_bits(documents, p_uni, p_bi):
    pairs = [pair for document in documents for pair in itertools.pairwise(document)]
    return -sum(math.log2(p_uni(w)) for _, w in pairs), -sum(math.log2(p_bi(v, w)) for v, w in pairs)


FORMS = {  # as NgramResult.interpolation spells them
    r"lam = ([\d.]+)": lambda x: lambda c, t: x,
    r"lam = c\(v\) / \(c\(v\) \+ ([\d.e+-]+)\)": lambda x: lambda c, t: c / (c + x),
    r"lam = c\(v\) / \(c\(v\) \+ ([\d.e+-]+) t\(v\)\)": lambda x: lambda c, t: c / (c + x * t),
}


def weight_of(interpolation):
    for pattern, make in FORMS.items():
        if match := re.fullmatch(pattern, interpolation):
            return make(float(match[1]))
    raise AssertionError(interpolation)


def test_counts_by_brute_force():
    counts = ngram.count(*flat(TRAIN), V)
    unigrams, bigrams, contexts = brute_counts(TRAIN)
    assert counts.unigram_V.tolist() == [unigrams[w] for w in range(V)]
    assert counts.context_V.tolist() == [contexts[v] for v in range(V)]
    assert dict(zip(map(tuple, np.stack(np.divmod(counts.key_U, V), 1).tolist()), counts.bigram_U.tolist())) == bigrams
    assert counts.unigram_V[1] == 0  # BOS is never a target
    assert (2, 1) not in bigrams  # and no bigram leads from one document into the next


def corpora():
    rng = np.random.default_rng(0)
    steps = rng.dirichlet(np.full(V, 0.3), V)

    def document(n):
        tokens = [1]
        for _ in range(n):
            tokens.append(int(rng.choice(V, p=steps[tokens[-1]])))
        return [*tokens, 2]

    yield "by hand", TRAIN, HELD
    yield "markov", [document(40) for _ in range(30)], [document(40) for _ in range(4)]
    yield "little", [document(5) for _ in range(3)], [document(30) for _ in range(4)]


@pytest.mark.parametrize(("name", "train", "held"), list(corpora()))
def test_scores_by_brute_force(name, train, held):
    """The scores are those of the reported smoothing, and no other smoothing on a grid does better."""
    total_bytes = 17
    result = ngram.score(ngram.count(*flat(train), V), *flat(held), total_bytes)
    p_uni, p_bi = brute_p(train, result.unigram_alpha, weight_of(result.interpolation))
    uni, bi = (bits / total_bytes for bits in brute_bits(held, p_uni, p_bi))
    assert result.unigram_bits_per_byte == pytest.approx(uni, rel=1e-9)
    assert result.bigram_bits_per_byte == pytest.approx(bi, rel=1e-4)  # the value in the formula is rounded
    for alpha in np.geomspace(1e-3, 1e2, 11):
        other = brute_bits(held, *brute_p(train, alpha, lambda c, t: 0.5))[0] / total_bytes
        assert result.unigram_bits_per_byte <= other * (1 + 1e-6)
    for make, value in itertools.product(FORMS.values(), np.geomspace(2e-3, 0.99, 8)):
        other = brute_bits(held, *brute_p(train, result.unigram_alpha, make(value)))[1] / total_bytes
        assert result.bigram_bits_per_byte <= other * (1 + 1e-6)


def test_probabilities_sum_to_one():
    counts = ngram.count(*flat(TRAIN), V)
    assert ngram.unigram(counts, 0.3).sum() == pytest.approx(1, abs=1e-12)
    key_VV = np.arange(V * V)
    pair_VV = ngram._relative_frequency(counts, key_VV).reshape(V, V)
    for formula, weight_V, low, high in ngram._weights(counts):
        for value in (low, math.sqrt(low * high), high):
            lam_V = weight_V(value)
            assert lam_V[[0, 2, 6]].tolist() == [0, 0, 0], formula  # never seen with a successor
            p_VV = lam_V[:, None] * pair_VV + (1 - lam_V[:, None]) * ngram.unigram(counts, 0.3)
            np.testing.assert_allclose(p_VV.sum(1), 1, atol=1e-12, err_msg=formula)


def test_a_fair_coin_costs_one_bit():
    rng = np.random.default_rng(0)
    documents = [[0, *rng.integers(1, 3, 50_000).tolist()]]
    result = ngram.score(ngram.count(*flat(documents), 3), *flat(documents), total_bytes=50_000)
    assert result.unigram_bits_per_byte == pytest.approx(1, abs=1e-3)
    assert result.bigram_bits_per_byte == pytest.approx(1, abs=1e-3)


def test_bigrams_know_what_unigrams_cannot():
    documents = [[0, *([1, 2] * 500)]]
    result = ngram.score(ngram.count(*flat(documents), 3), *flat(documents), total_bytes=1000)
    assert result.unigram_bits_per_byte == pytest.approx(1, abs=1e-3)
    assert result.bigram_bits_per_byte < 0.01


def test_large_vocabulary_keys_do_not_overflow():
    """Keys reach V * V, beyond int32 from V = 46341 on."""
    tokens = np.array([99_999, 99_998, 99_999, 99_998, 5, 99_999], np.int32)
    counts = ngram.count(tokens, [0, 4, 6], 100_000)
    assert counts.key_U.tolist() == [5 * 100_000 + 99_999, 99_998 * 100_000 + 99_999, 99_999 * 100_000 + 99_998]
    assert counts.bigram_U.tolist() == [1, 1, 2]


def test_mistakes_are_explained():
    tokens, offsets = flat(TRAIN)
    with pytest.raises(ValueError, match="rise from 0 to the number of tokens, 15"):
        ngram.count(tokens, offsets[:-2], V)
    with pytest.raises(ValueError, match=r"1\.\.5, outside the vocabulary 0\.\.4"):
        ngram.count(tokens, offsets, 5)
    counts = ngram.count(tokens, offsets, V)
    with pytest.raises(ValueError, match="0 tokens to predict"):
        ngram.score(counts, *flat([[1], []]), 10)
    with pytest.raises(ValueError, match="0 bytes"):
        ngram.score(counts, tokens, offsets, 0)
