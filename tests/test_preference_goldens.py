"""The preference losses against stored numbers of trl's trainers (tests/golden/make_dpo_goldens.py made them).

Live, for whole models and all losses: test_trl_parity.py, which says where the two differ on purpose.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.data import TokenFile
from mixtral_jax.preference import Answers, pair_terms, sum_answers
from tests.golden import preference
from tests.golden.preference import BETA, CASES, GOLDEN_MODEL, METRICS, WITH_SFT

TOLERANCE = 1e-5  # of the scale of what is compared, in float32
PAIRS = 6


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "golden" / "preference.npz") as file:
        return dict(file)


def close(label: str, got, want) -> None:
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, label
    scale = np.abs(want).max()
    assert scale > 0, f"{label}: trl's is all zero and proves nothing"
    error = np.abs(got - want).max()
    assert error <= TOLERANCE * scale, f"{label}: off by {error:.2e}, scale {scale:.2e}"


def to_rows(values) -> jax.Array:
    """[2 n, T + 1], chosen answers first, as rows of two pairs side by side, [n / 2, 4 T]; the first token is no target."""
    values = jnp.asarray(values)[:, 1:]
    return jnp.stack([values[:PAIRS], values[PAIRS:]], 1).reshape(PAIRS // 2, -1)


def answers_of(log_probs, mask) -> Answers:
    """The sums of each answer as the stage takes them of a batch."""
    length = mask.shape[1] - 1
    segment_ids_BT = np.broadcast_to(np.repeat(np.arange(1, 5), length), (PAIRS // 2, 4 * length))
    return sum_answers(to_rows(log_probs), to_rows(mask).astype(jnp.float32), segment_ids_BT, 2)


@pytest.mark.parametrize("name", CASES)
def test_losses_of_given_log_probabilities_equal_trls(golden, name):
    """Value, metrics, and the gradient by the log-probability of every token, of 6 pairs with a tie and extremes."""
    config, mask = preference.settings(CASES[name]), golden["log_probs.mask"]
    ref = answers_of(golden["log_probs.reference"], mask)

    def value(log_probs):
        terms = pair_terms(answers_of(log_probs, mask), ref, jnp.ones((PAIRS // 2, 2), bool), float(PAIRS), config)
        return terms["preference_loss"], terms

    (loss, terms), grad = jax.jit(jax.value_and_grad(value, has_aux=True))(golden["log_probs.policy"])
    want = dict(zip(METRICS, golden[f"{name}.metrics"]))
    close("loss", loss, golden[f"{name}.loss"])
    close("grad", grad, golden[f"{name}.grad"])
    assert not np.asarray(grad)[mask == 0].any()
    for metric in METRICS:
        got = terms[metric]
        if name == "simpo" and metric.startswith("logps/"):  # trl logs the means of simpo, which are in the rewards
            got = terms[f"rewards/{metric.removeprefix('logps/')}"] / BETA
        close(metric, got, want[metric])


def test_the_stored_pairs_try_every_branch(golden):
    """A tie that counts as inaccurate, hinges on both sides, saturated pairs, answers of unlike length."""
    policy, ref = (np.asarray(golden[f"log_probs.{which}"], np.float64) for which in ("policy", "reference"))
    mask = golden["log_probs.mask"]
    chosen, rejected = np.split(((policy - ref) * mask).sum(1), 2)
    margins = BETA * (chosen - rejected)
    assert margins[0] == 0
    assert margins.max() > 5
    assert margins.min() < -5
    assert golden["hinge.loss"] == pytest.approx(np.maximum(0, 1 - margins).mean(), rel=1e-5)
    assert (margins > 1).any()
    assert golden["sigmoid.metrics"][METRICS.index("rewards/accuracies")] == pytest.approx((margins > 0).mean())
    lengths = mask.sum(1)
    assert (lengths[:PAIRS] != lengths[PAIRS:]).any()
    assert not mask[:, 0].any()


def test_the_stored_whole_model_equals_trls(golden):
    """Loss with the chosen answers' NLL, metrics, and of every gradient the norm and one product."""
    model = {key.removeprefix("model."): value for key, value in golden.items() if key.startswith("model.")}
    lengths = np.diff(model["offsets"])
    ids = [f"pairs:{i // 2 + 1}" for i in range(len(lengths))]
    file = TokenFile(model["tokens"], model["offsets"], lengths, ids, model["weights"])
    got = preference.ours(WITH_SFT[GOLDEN_MODEL], file)
    close("loss", got.loss, model["loss"])
    for metric, want in zip(METRICS, model["metrics"]):
        close(metric, got.metrics[metric], want)
    directions = preference.directions()
    assert len(got.grads) == len(directions)
    for leaf, grad in got.grads.items():
        want = model[f"grad.{leaf}"]
        found = preference.summary(grad, directions[leaf])
        close(f"norm of {leaf}", found[0], want[0])
        # A product of numbers of both signs is small by chance: its scale is that of the two norms.
        scale = want[0] * np.linalg.norm(directions[leaf])
        assert abs(found[1] - want[1]) <= TOLERANCE * scale / np.sqrt(grad.size), leaf
