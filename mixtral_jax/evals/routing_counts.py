"""Counts of routers' choices, and what they say: shares, repetition, pairs of experts, and each expert's tokens.

All counts are integers and add exactly, so that batches, their order and an interruption change nothing. L layers, B rows,
T columns, K choices, E experts, C the sets of K experts.
"""

import itertools
import math
from collections.abc import Mapping

import numpy as np

MOST_SETS = 2048  # sets of K experts that are counted one by one: all of 8 choose any, 16 choose 4, 64 choose 2
Counts = dict[str, np.ndarray]


def count(index_LBTK: np.ndarray, counted_BT: np.ndarray, e: int) -> Counts:
    """Counts what one batch's routers chose.

    Args:
        index_LBTK: integers 0..E-1, the first choice first; anything where a token is not counted.
        counted_BT: bool; in a row the counted tokens follow one another in one document.
        e: number of experts.

    Returns:
        int64 arrays: tokens, windows (rows with a pair), pairs (of neighbours), choice_LKE, sets_LC (empty if there are
        more than MOST_SETS), together_LEE (tokens that chose both; the diagonal: that chose the one), first_repeats_L and
        any_repeats_L (pairs with the same first choice, with an expert in common), and sums over rows for `errors`.
    """
    k = index_LBTK.shape[-1]
    index_LBTK = index_LBTK.astype(np.int64)
    pair_BT = counted_BT[:, 1:] & counted_BT[:, :-1]
    before, after = index_LBTK[:, :, :-1], index_LBTK[:, :, 1:]
    first_LB = ((before[..., 0] == after[..., 0]) & pair_BT).sum(-1)
    any_LB = ((before[..., :, None] == after[..., None, :]).any((-2, -1)) & pair_BT).sum(-1)
    n_B, tokens_B = pair_BT.sum(-1), counted_BT.sum(-1)
    chosen_LNK = index_LBTK[:, counted_BT]
    choice_LKE = np.stack([_bincount(chosen_LNK[:, :, i], e) for i in range(k)], 1)
    row_LBE = _choices_by_row(index_LBTK, counted_BT, e)
    return {
        "tokens": tokens_B.sum(),
        "windows": (n_B > 0).sum(),
        "pairs": n_B.sum(),
        "choice_LKE": choice_LKE,
        "sets_LC": _count_sets(chosen_LNK, e),
        "together_LEE": _count_together(chosen_LNK, e),
        "first_repeats_L": first_LB.sum(-1),
        "any_repeats_L": any_LB.sum(-1),
        "first_squares_L": (first_LB**2).sum(-1),
        "first_products_L": (first_LB * n_B).sum(-1),
        "any_squares_L": (any_LB**2).sum(-1),
        "any_products_L": (any_LB * n_B).sum(-1),
        "pairs_squares": (n_B**2).sum(),
        "share_squares_LE": (row_LBE**2).sum(1),
        "share_products_LE": (row_LBE * tokens_B[None, :, None]).sum(1),
        "tokens_squares": (tokens_B**2).sum(),
        "rows": (tokens_B > 0).sum(),
    }


def add(a: Counts | None, b: Mapping) -> Counts:
    """The sum; None is zero."""
    return {name: np.asarray(value, np.int64) + (0 if a is None else a[name]) for name, value in b.items()}


def _bincount(value_LN: np.ndarray, size: int) -> np.ndarray:
    """How often each of 0..size-1 occurs in each layer: int64 [L, size]."""
    l = len(value_LN)
    flat = (value_LN + size * np.arange(l)[:, None]).ravel()
    return np.bincount(flat, minlength=l * size).reshape(l, size)


def _choices_by_row(index_LBTK: np.ndarray, counted_BT: np.ndarray, e: int) -> np.ndarray:
    l, b = index_LBTK.shape[:2]
    at_LBTK = index_LBTK + e * np.arange(b)[None, :, None, None]
    return _bincount(at_LBTK[:, counted_BT].reshape(l, -1), b * e).reshape(l, b, e)


def set_count(e: int, k: int) -> int:
    """How many sets of K experts are counted one by one; 0 if there are too many."""
    return math.comb(e, k) if math.comb(e, k) <= MOST_SETS else 0


def sets(e: int, k: int) -> list[tuple[int, ...]]:
    """The sets of K experts in the order of sets_LC: by their largest expert, then the next."""
    return sorted(itertools.combinations(range(e), k), key=lambda chosen: chosen[::-1])


def _count_sets(chosen_LNK: np.ndarray, e: int) -> np.ndarray:
    k = chosen_LNK.shape[-1]
    if not set_count(e, k):
        return np.zeros((len(chosen_LNK), 0), np.int64)
    # The place of c_1 < c_2 < ... in that order is C(c_1, 1) + C(c_2, 2) + ...
    before_EK = np.array([[math.comb(i, j + 1) for j in range(k)] for i in range(e)])
    place_LN = before_EK[np.sort(chosen_LNK, -1), np.arange(k)].sum(-1)
    return _bincount(place_LN, set_count(e, k))


def _count_together(chosen_LNK: np.ndarray, e: int) -> np.ndarray:
    l, _, k = chosen_LNK.shape
    total = np.zeros((l, e * e), np.int64)
    for i, j in itertools.product(range(k), repeat=2):
        total += _bincount(chosen_LNK[:, :, i] * e + chosen_LNK[:, :, j], e * e)
    return total.reshape(l, e, e)


def uniform_baselines(e: int, k: int) -> tuple[float, float]:
    """Chances that two independent uniform choices agree: 1 / E in the first, 1 - C(E - K, K) / C(E, K) in any."""
    return 1 / e, 1 - math.comb(e - k, k) / math.comb(e, k)


def share_baselines(counts: Counts) -> tuple[np.ndarray, np.ndarray | None]:
    """Chances that two different tokens of the text, drawn at random wherever they stand, agree; float64 [L] each.

    What repetition would be if neighbours were independent and experts as unevenly busy as they are. Of the sets with an
    expert in common None, where there are too many sets to count.
    """
    n = int(counts["tokens"])
    ordered = max(n * (n - 1), 1)
    k, e = counts["choice_LKE"].shape[1:]
    first_L = ((counts["choice_LKE"][:, 0] ** 2).sum(-1) - n) / ordered
    if not counts["sets_LC"].shape[1]:
        return first_L, None
    member_CE = np.zeros((set_count(e, k), e), np.int64)
    for row, chosen in enumerate(sets(e, k)):
        member_CE[row, list(chosen)] = 1
    meets_CC = (member_CE @ member_CE.T > 0).astype(np.int64)
    sets_LC = counts["sets_LC"]
    return first_L, ((sets_LC @ meets_CC * sets_LC).sum(-1) - n) / ordered


def errors(counts: Counts) -> dict[str, np.ndarray]:
    """Standard errors of first_L and any_L (repetition) and share_LE (of assignments), windows taken as independent samples.

    Those of a ratio of sums over windows: neighbouring tokens depend on each other, so that a binomial error would be too
    small. Zero where there is one window only, which tells nothing of others.
    """

    def ratio(total, squares, products, n, n_squares, windows):
        r = total / max(n, 1)
        residual = np.maximum(squares - 2 * r * products + r**2 * n_squares, 0)
        return np.sqrt(residual * windows / max(windows - 1, 1)) / max(n, 1) if windows > 1 else np.zeros_like(r)

    c = {name: value.astype(np.float64) for name, value in counts.items()}
    pairs = (c["pairs"], c["pairs_squares"], c["windows"])
    k = c["choice_LKE"].shape[1]
    share_LE = ratio(
        c["choice_LKE"].sum(1),
        c["share_squares_LE"],
        c["share_products_LE"],
        c["tokens"],
        c["tokens_squares"],
        c["rows"],
    )
    return {
        "first_L": ratio(c["first_repeats_L"], c["first_squares_L"], c["first_products_L"], *pairs),
        "any_L": ratio(c["any_repeats_L"], c["any_squares_L"], c["any_products_L"], *pairs),
        "share_LE": share_LE / k,
    }


def expected_together(together_EE: np.ndarray, sweeps: int = 500) -> np.ndarray:
    """Pairs that would be chosen together if only each expert's own share mattered: float64 [E, E], diagonal 0.

    A token's experts differ, so the product of two shares is too much. Quasi-independence instead: w_i * w_j off the
    diagonal, with the same sums of rows, found by proportional fitting.
    """
    rows_E = (together_EE - np.diag(np.diag(together_EE))).sum(-1).astype(np.float64)
    w_E = np.sqrt(np.maximum(rows_E, 0))
    for _ in range(sweeps):
        others_E = w_E.sum() - w_E
        # The root takes half a step: a whole one overshoots and swings.
        wanted_E = np.divide(rows_E, others_E, out=np.zeros_like(w_E), where=others_E > 0)
        w_E = np.sqrt(w_E * wanted_E)
    expected_EE = np.outer(w_E, w_E)
    np.fill_diagonal(expected_EE, 0)
    return expected_EE


class TokenCounts:
    """How often each token has each expert as its first choice, in one layer; only pairs that occur are held."""

    def __init__(self, e: int):
        self._e = e
        self._key, self._count = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def add(self, tokens_N: np.ndarray, first_N: np.ndarray) -> None:
        """Counts tokens and their first choices."""
        key, number = np.unique(tokens_N.astype(np.int64) * self._e + first_N, return_counts=True)
        self._key, inverse = np.unique(np.concatenate([self._key, key]), return_inverse=True)
        self._count = np.bincount(inverse, np.concatenate([self._count, number])).astype(np.int64)

    def typical(self, most: int, minimum: int) -> list[list[dict]]:
        """The tokens that tell most of each expert: for each at most so many, by log-odds.

        log2 of the odds that the token goes to the expert, over the odds of any token; the token's count has one more
        token added, divided as all tokens are, so that rare tokens do not win by chance. Only tokens seen `minimum` times
        are taken, and only those that go there oftener than others do.

        Returns:
            for each expert dicts with token (id), count (of the token), here (of these with the expert), log_odds.
        """
        token_M, expert_M = self._key // self._e, self._key % self._e
        id_U, inverse_M = np.unique(token_M, return_inverse=True)
        count_M = np.bincount(inverse_M, self._count, minlength=len(id_U)).astype(np.int64)[inverse_M]
        total_E = np.bincount(expert_M, self._count, minlength=self._e)
        share_E = total_E / max(total_E.sum(), 1)
        found: list[list[dict]] = []
        for expert, share in enumerate(share_E):
            (at,) = np.nonzero((expert_M == expert) & (count_M >= minimum))
            if not 0 < share < 1:
                found.append([])
                continue
            here, n = self._count[at], count_M[at]
            odds = (here + share) / (n - here + 1 - share)
            log_odds = np.log2(odds) - np.log2(share / (1 - share))
            order = sorted(range(len(at)), key=lambda i: (-log_odds[i], token_M[at[i]]))
            found.append(
                [
                    {
                        "token": int(token_M[at[i]]),
                        "count": int(n[i]),
                        "here": int(here[i]),
                        "log_odds": float(log_odds[i]),
                    }
                    for i in order[:most]
                    if log_odds[i] > 0
                ]
            )
        return found
