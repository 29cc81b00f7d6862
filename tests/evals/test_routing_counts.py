"""What follows from counts of choices, against loops over tokens."""

import itertools

import numpy as np
import pytest

from mixtral_jax.evals import routing_counts as counting

L, B, T, E = 2, 3, 13, 6


def random_choices(k, e=E, seed=0, tilt=1.0):
    """index_LBTK of uneven experts, and counted_BT with a gap at either end."""
    rng = np.random.default_rng(seed)
    score = rng.gumbel(size=(L, B, T, e)) + tilt * np.arange(e) / e
    counted_BT = np.ones((B, T), bool)
    counted_BT[0, 0] = counted_BT[1, 7:] = counted_BT[2, :] = False
    counted_BT[2, 4] = True
    return np.argsort(-score, -1)[..., :k].astype(np.uint8), counted_BT


@pytest.mark.parametrize("k", [1, 2, 3])
def test_baselines_are_those_of_all_pairs_of_tokens(k):
    index_LBTK, counted_BT = random_choices(k)
    first_L, any_L = counting.share_baselines(counting.count(index_LBTK, counted_BT, E))
    for layer in range(L):
        chosen = index_LBTK[layer][counted_BT].tolist()
        pairs = list(itertools.permutations(chosen, 2))
        assert first_L[layer] == pytest.approx(np.mean([a[0] == b[0] for a, b in pairs]))
        assert any_L[layer] == pytest.approx(np.mean([bool(set(a) & set(b)) for a, b in pairs]))


def test_too_many_sets_are_not_counted():
    """32 experts choose 8 in 10 million ways; everything else is there."""
    index_LBTK, counted_BT = random_choices(8, 32)
    counts = counting.count(index_LBTK, counted_BT, 32)
    first_L, any_L = counting.share_baselines(counts)
    assert any_L is None
    assert (first_L >= 0).all()
    assert counts["sets_LC"].shape == (L, 0)
    assert counts["together_LEE"].sum() == L * counted_BT.sum() * 8 * 8


def test_uniform_baselines():
    assert counting.uniform_baselines(8, 2) == (1 / 8, pytest.approx(0.4642857))
    assert counting.uniform_baselines(8, 1) == (1 / 8, pytest.approx(1 / 8))
    assert counting.uniform_baselines(3, 2)[1] == 1, "two pairs of three always meet"


def test_sets_are_told_apart():
    assert counting.set_count(16, 4) == 1820
    assert counting.sets(4, 2) == [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    every = np.array(counting.sets(6, 3))[None, None, :, ::-1]
    counts = counting.count(every, np.ones((1, 20), bool), 6)
    np.testing.assert_array_equal(counts["sets_LC"], np.ones((1, 20)))


def test_counts_of_rows_add_up():
    index_LBTK, counted_BT = random_choices(2)
    whole = counting.count(index_LBTK, counted_BT, E)
    parts = None
    for row in range(B):
        parts = counting.add(parts, counting.count(index_LBTK[:, row : row + 1], counted_BT[row : row + 1], E))
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(parts[name], value, err_msg=name)
    assert whole["tokens"] == 12 + 7 + 1
    assert (whole["pairs"], whole["windows"], whole["rows"]) == (11 + 6, 2, 3)


def test_errors_are_those_of_ratios_over_rows():
    """And of a token that is always repeated there is none."""
    rng = np.random.default_rng(0)
    index_LBTK = rng.integers(0, E, (1, 40, 20, 1))
    index_LBTK[:, :20] = index_LBTK[:, :20, :1]  # rows of one expert each: windows differ more than tokens
    counted_BT = np.arange(20)[None, :] < rng.integers(2, 21, 40)[:, None]
    found = counting.errors(counting.count(index_LBTK, counted_BT, E))
    n = counted_BT.sum(1) - 1
    same = index_LBTK[0, :, 1:, 0] == index_LBTK[0, :, :-1, 0]
    hits = (same & counted_BT[:, 1:]).sum(1)
    rate = hits.sum() / n.sum()
    want = np.sqrt(40 / 39 * ((hits - rate * n) ** 2).sum()) / n.sum()
    assert found["first_L"][0] == pytest.approx(want)
    assert want > 2 * np.sqrt(rate * (1 - rate) / n.sum())
    drawn = [resampled(hits, n, rng) for _ in range(2000)]
    assert found["first_L"][0] == pytest.approx(np.std(drawn), rel=0.1)
    one = np.zeros((1, 2, 5, 1), int)
    assert counting.errors(counting.count(one, np.ones((2, 5), bool), E))["first_L"][0] == 0


def resampled(hits, n, rng):
    picked = rng.integers(0, len(n), len(n))
    return hits[picked].sum() / n[picked].sum()


def test_pairs_of_independent_experts_are_as_expected():
    """Weights of experts drawn without regard to each other are found again, an expert that is never chosen too."""
    weight_E = np.array([1.0, 2.0, 3.0, 5.0, 8.0, 0.0])
    together_EE = np.round(1e6 * np.outer(weight_E, weight_E)).astype(np.int64)
    np.fill_diagonal(together_EE, 123)
    expected_EE = counting.expected_together(together_EE)
    off = ~np.eye(E, dtype=bool)
    np.testing.assert_allclose(expected_EE[off], together_EE[off], rtol=1e-4)
    assert (np.diag(expected_EE) == 0).all()
    together_EE[0, 1] = together_EE[1, 0] = together_EE[0, 1] * 3
    expected_EE = counting.expected_together(together_EE)
    np.testing.assert_allclose(expected_EE.sum(0), (together_EE * off).sum(0), rtol=1e-3, err_msg="the shares are kept")
    assert together_EE[0, 1] / expected_EE[0, 1] > 1.5


def test_typical_tokens_by_log_odds():
    """Those of an expert in the order of the formula; added bit by bit; a rare token and a typical one of another are not."""
    tokens = np.repeat([7, 8, 9, 500], [100, 40, 30, 3])
    experts = np.concatenate(
        [np.repeat([0, 1], [90, 10]), np.repeat([0, 1], [39, 1]), np.full(30, 1), np.zeros(3, int)]
    )
    counts = counting.TokenCounts(3)
    for part in np.array_split(np.random.default_rng(0).permutation(len(tokens)), 5):
        counts.add(tokens[part], experts[part].astype(np.uint8))
    zero, one, two = counts.typical(5, minimum=10)
    share = (90 + 39 + 3) / 173
    assert [(t["token"], t["count"], t["here"]) for t in zero] == [(8, 40, 39), (7, 100, 90)]
    for t in zero:
        odds = (t["here"] + share) / (t["count"] - t["here"] + 1 - share)
        assert t["log_odds"] == pytest.approx(np.log2(odds / (share / (1 - share))))
    assert [t["token"] for t in one] == [9]
    assert two == []
    assert [t["token"] for t in counts.typical(1, 1)[0]] == [8]
