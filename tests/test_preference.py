"""Every preference loss: its value and gradient at the start, its symmetries, and that packing and meshes change nothing."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax import reference
from mixtral_jax.config import DpoConfig
from mixtral_jax.data import Corpus, Source, open_batches
from mixtral_jax.frozen import stays, weights
from mixtral_jax.losses import Totals
from mixtral_jax.models import lora, mixtral
from mixtral_jax.optim import make_optimizer
from mixtral_jax.preference import Answers, answers, dpo_loss, log_ratio, pair_losses, pair_terms
from mixtral_jax.reference import add_to
from mixtral_jax.sharding import place
from mixtral_jax.step import init_state, make_train_step, model_of
from tests.helpers import assert_trees_close, equations, on_mesh, relative_errors, shard, train
from tests.pairs import batches, dpo, random_pairs, swapped

LOSSES = ("sigmoid", "robust", "ipo", "hinge", "sigmoid_norm", "simpo", "apo_zero")
BETA = 0.3
# What the preference term is while the policy is the reference.
AT_START = {
    "sigmoid": math.log(2), "robust": math.log(2), "ipo": 1 / (4 * BETA**2), "hinge": 1.0, "sigmoid_norm": math.log(2), "apo_zero": 1.0,
}  # fmt: skip


def settings(loss: str = "sigmoid", **changes) -> DpoConfig:
    values = {"loss": loss, "beta": BETA, "label_smoothing": 0.0, "gamma": 0.5, "sft_weight": 0.0}
    return DpoConfig(**values | {"reference": "precomputed"} | changes)


def with_slow(losses, quick: str):
    """All losses as parameters: one by default, the others with the slow tests."""
    return [loss if loss == quick else pytest.param(loss, marks=pytest.mark.slow) for loss in losses]


@pytest.fixture(scope="module")
def file():
    return random_pairs(9)


def params_of(config, seed: int = 0):
    return mixtral.init(config.model, jax.random.key(seed))


def with_reference(config, params, batch: dict) -> dict:
    """The batch with log-probabilities computed as reference.py does: in a program of their own."""
    found = jax.device_get(jax.jit(lambda m, b: answers(m, b, config.loss.head_chunk)[0])(params, batch))
    numbers_BP = batch["pairs_BP"]
    log_probs = np.zeros((numbers_BP.max(), 2), np.float32)
    log_probs[numbers_BP[numbers_BP > 0] - 1] = np.stack([found.chosen_BP, found.rejected_BP], -1)[numbers_BP > 0]
    return add_to(batch, log_probs)


def fields(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if isinstance(value, np.ndarray)}


def value_and_grads(config, params, batch: dict, reference=None):
    """((loss, terms), gradients) of a whole batch as one micro-batch."""

    def loss_fn(params, batch, reference):
        loss, (terms, _) = dpo_loss(params, batch, Totals.of(batch), config, reference)
        return loss, terms

    found = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, fields(batch), reference)
    return jax.device_get(found)


@pytest.mark.parametrize("stored", [True, False], ids=["precomputed", "on_the_fly"])
def test_at_the_start_margins_are_exactly_zero(file, stored):
    config = dpo(dpo__beta=BETA)
    params, batch = params_of(config), batches(config, file).eval_batch(0)
    batch = with_reference(config, params, fields(batch)) if stored else fields(batch)
    (total, terms), _ = value_and_grads(config, params, batch, None if stored else params)
    assert terms["preference_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert all(terms[f"rewards/{name}"] == 0 for name in ("margins", "chosen", "rejected"))
    assert terms["rewards/accuracies"] == 0, "a tie is no success"
    assert total > terms["preference_loss"], "the routers' terms are in the loss"
    assert terms["balance_loss"] >= 1
    assert terms["router_z_loss"] > 0


@pytest.mark.parametrize("loss", sorted(AT_START))
def test_at_the_start_the_loss_is_what_it_must_be(loss):
    rng = np.random.default_rng(0)
    same = Answers(*(jnp.asarray(rng.uniform(1, 9, (3, 4)), jnp.float32) for _ in range(4)))
    smoothing = 0.1 if loss in ("sigmoid", "robust") else 0.0
    valid_BP = jnp.arange(12).reshape(3, 4) < 10
    terms = pair_terms(same, same, valid_BP, 10.0, settings(loss, label_smoothing=smoothing))
    assert float(terms["preference_loss"]) == pytest.approx(AT_START[loss], rel=1e-6)
    assert terms["rewards/margins"] == terms["rewards/accuracies"] == 0


@pytest.mark.parametrize("loss", with_slow(LOSSES, "ipo"))
def test_precomputed_equals_on_the_fly(file, loss):
    config = dpo(dpo__loss=loss, dpo__beta=BETA, dpo__sft_weight=0.3)
    policy, reference = params_of(config, 1), params_of(config, 0)
    batch = batches(config, file).eval_batch(0)
    fly = value_and_grads(config, policy, batch, reference)
    stored = value_and_grads(config, policy, with_reference(config, reference, fields(batch)))
    for name, value in fly[0][1].items():
        assert stored[0][1][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert max(relative_errors(fly[1], stored[1]).values()) < 1e-5


def test_exchanging_chosen_and_rejected_flips_the_signs(file):
    config = dpo(dpo__beta=BETA)
    policy, reference = params_of(config, 1), params_of(config, 0)
    (_, there), _ = value_and_grads(config, policy, batches(config, file).eval_batch(0), reference)
    (_, back), _ = value_and_grads(config, policy, batches(config, swapped(file)).eval_batch(0), reference)
    assert abs(there["rewards/margins"]) > 1e-3
    assert back["rewards/margins"] == pytest.approx(-there["rewards/margins"], rel=1e-4)
    assert back["rewards/chosen"] == pytest.approx(there["rewards/rejected"], rel=1e-4)
    assert back["logps/rejected"] == pytest.approx(there["logps/chosen"], rel=1e-5)
    assert back["rewards/accuracies"] == pytest.approx(1 - there["rewards/accuracies"], abs=1e-6), "there are no ties"


@pytest.mark.parametrize("loss", with_slow(LOSSES, "sigmoid_norm"))
def test_packing_changes_nothing(file, loss):
    config = dpo(dpo__loss=loss, dpo__beta=BETA, dpo__sft_weight=0.5, loss__balance_weight=0.0)
    policy, reference = params_of(config, 1), params_of(config, 0)
    packed, alone = (batches(config, file, one_per_row=one).eval_batch(0) for one in (False, True))
    assert len(packed["tokens_BT"]) < len(alone["tokens_BT"]) == 9
    (_, a), grads_a = value_and_grads(config, policy, packed, reference)
    (_, b), grads_b = value_and_grads(config, policy, alone, reference)
    for name in a:
        assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6), name
    assert max(relative_errors(grads_a, grads_b).values()) < 1e-5


def test_an_answer_does_not_see_the_other(file):
    """Another rejected answer leaves the chosen one's log-probability as it was."""
    config = dpo()
    params, batch = params_of(config), fields(batches(config, file).eval_batch(0))
    rejected_BT = (batch["segment_ids_BT"] % 2 == 0) & (batch["loss_weights_BT"] > 0)
    other = batch | {
        "tokens_BT": np.where(rejected_BT, (batch["tokens_BT"] + 7) % 61 + 3, batch["tokens_BT"]).astype(np.int32)
    }
    score = jax.jit(lambda m, b: answers(m, b, 16)[0])
    before, after = (jax.device_get(score(params, one)) for one in (batch, other))
    np.testing.assert_allclose(before.chosen_BP, after.chosen_BP, rtol=1e-6, atol=1e-6)
    assert np.abs(before.rejected_BP - after.rejected_BP).max() > 1e-3


def test_log_probabilities_are_those_of_the_answers_tokens(file):
    """Against the full logits of every answer alone, without packing: its tokens and EOS, and not the prompt's."""
    config = dpo()
    params, batch = params_of(config), batches(config, file).eval_batch(0)
    found = jax.device_get(jax.jit(lambda m, b: answers(m, b, 16)[0])(params, fields(batch)))
    got = {}
    for b, p in zip(*np.nonzero(batch["pairs_BP"])):
        pair = batch["pairs_BP"][b, p] - 1
        got[2 * pair], got[2 * pair + 1] = found.chosen_BP[b, p], found.rejected_BP[b, p]
    forward = jax.jit(lambda m, *batch: m(*batch)[0])
    for i in range(len(file.ids)):
        span = slice(file.offsets[i], file.offsets[i + 1])
        ids, weights = file.tokens[span], file.weights[span]
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(ids)] = ids
        segments = (np.arange(64)[None, :] < len(ids)).astype(np.int32)
        logits_TV = forward(params, padded, np.arange(64, dtype=np.int32)[None, :], segments)[0]
        log_probs_TV = np.asarray(jax.nn.log_softmax(logits_TV))
        want = sum(log_probs_TV[t, ids[t + 1]] for t in range(len(ids) - 1) if weights[t + 1])
        assert got[i] == pytest.approx(want, rel=1e-5), i
        assert (weights[-1], ids[-1]) == (1, 2), "EOS is an answer's last token"


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_follow_their_formulas(loss):
    """Against float64 written out anew, with label smoothing where there is any."""
    rng = np.random.default_rng(3)
    pc, pr, rc, rr = (rng.normal(-20, 4, 5) for _ in range(4))
    nc, nr = rng.integers(1, 9, 5), rng.integers(1, 9, 5)
    e = 0.2 if loss in ("sigmoid", "robust") else 0.0
    config = settings(loss, label_smoothing=e)
    policy, reference = (
        Answers(*(jnp.asarray(a, jnp.float32)[None] for a in (c, r, nc, nr))) for c, r in ((pc, pr), (rc, rr))
    )
    got = np.asarray(pair_losses(policy, reference, config)[0][0])

    def sig(x):
        return 1 / (1 + np.exp(-x))

    c, r, b = pc - rc, pr - rr, BETA
    want = {
        "sigmoid": -(1 - e) * np.log(sig(b * (c - r))) - e * np.log(sig(b * (r - c))),
        "robust": (-(1 - e) * np.log(sig(b * (c - r))) + e * np.log(sig(b * (r - c)))) / (1 - 2 * e),
        "ipo": (c / nc - r / nr - 0.5 / b) ** 2,
        "hinge": np.maximum(0, 1 - b * (c - r)),
        "sigmoid_norm": -np.log(sig(b * (c / nc - r / nr))),
        "simpo": -np.log(sig(b * (pc / nc - pr / nr) - 0.5)),
        "apo_zero": 1 - sig(b * c) + sig(b * r),
    }[loss]
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    "axes",
    [
        {"fsdp": 2, "expert": 2},
        pytest.param({"context": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param({"expert": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_mesh_gives_the_same(file, axes):
    config = dpo(dpo__beta=BETA, dpo__sft_weight=0.3, data__packing=False)
    policy, reference = params_of(config, 1), params_of(config, 0)
    batch = batches(config, file, one_per_row=True, rows=16).eval_batch(0)  # some rows are empty
    config_1, mesh_1 = on_mesh(dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=16)))
    config_n, mesh_n = on_mesh(config_1, **axes)

    def run(config, mesh):
        def loss_fn(params, batch, reference):
            loss, (terms, _) = dpo_loss(params, batch, Totals.of(batch), config, reference)
            return loss, terms

        with jax.set_mesh(mesh):
            found = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
                shard(policy, mesh), place(batch, mesh), shard(reference, mesh)
            )
        return jax.device_get(found)

    ((one, one_terms), one_grads), ((many, many_terms), many_grads) = run(config_1, mesh_1), run(config_n, mesh_n)
    assert many == pytest.approx(one, rel=1e-5)
    for name in one_terms:
        assert many_terms[name] == pytest.approx(one_terms[name], rel=1e-5, abs=1e-6), name
    assert max(relative_errors(many_grads, one_grads).values()) < 1e-5


def test_the_references_key_has_all_that_decides_it():
    """Where nothing is dropped neither mesh nor batch decide; where buffers are bounded they do."""
    corpus, found = Corpus((), "rows"), {"head_DV": "1"}

    def key(split="train", corpus=corpus, found=found, **changes):
        return reference._key(dpo(**changes), corpus, found, split)

    bounded = dict(model__buffer_factor=1.5, model__dispatch="ragged")
    free = (dict(dpo__beta=0.7), dict(lora__rank=2), dict(mesh__expert=2), dict(train__batch_size=32))
    assert {key(**changes) for changes in free} == {key()}
    other = [key("heldout"), key(corpus=Corpus((), "others")), key(found={"head_DV": "2"})]
    other += [key(model__dtype="bfloat16"), key(train__seq_len=32), key(data__packing=False), key(**bounded)]
    other += [key(**bounded, mesh__expert=2), key(**bounded, train__batch_size=32)]
    assert len({key(), *other}) == 1 + len(other)


def test_pairs_of_several_sources_keep_their_numbers():
    """Mixed and shuffled, each pair finds what was stored for it: here the sums of its own answers' tokens."""
    sources = [Source(name, w, random_pairs(n, n), random_pairs(2)) for name, w, n in (("a", 1.0, 7), ("b", 3.0, 5))]
    config, corpus = dpo(), Corpus(tuple(sources), "rows")
    rows = dict(batch_size=4, seq_len=config.train.seq_len, seed=0, pairs=True)
    ends = corpus.train.offsets
    sums = [(tokens * weights).sum() for tokens, weights in (
        (corpus.train.tokens[a:b], corpus.train.weights[a:b]) for a, b in itertools.pairwise(ends)
    )]  # fmt: skip
    mixed = reference.WithReference(open_batches(config.data, corpus, None, **rows), np.reshape(sums, (-1, 2)))
    seen = set()
    for k in range(6):
        batch = mixed.batch(k)
        scores_BT = (batch["targets_BT"] * batch["loss_weights_BT"])[:, :, None]
        for side, name in ((1, "reference_chosen_BP"), (2, "reference_rejected_BP")):
            segments_P = 2 * np.arange(batch["pairs_BP"].shape[1]) + side
            here_BP = (scores_BT * (batch["segment_ids_BT"][:, :, None] == segments_P[None, None])).sum(1)
            np.testing.assert_array_equal(batch[name], here_BP)
        seen |= set(batch["pairs_BP"].ravel().tolist())
    assert seen == set(range(13)), "all pairs of both, and places without one"


def test_no_gradient_goes_through_the_reference(file):
    config = dpo(dpo__beta=BETA)
    policy, reference = params_of(config, 1), params_of(config, 0)
    batch = fields(batches(config, file).eval_batch(0))

    def loss(reference):
        return dpo_loss(policy, batch, Totals.of(batch), config, reference)[0]

    grads = jax.jit(jax.grad(loss))(reference)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("where", "rank"),
    [
        ("precomputed", 2),
        ("on_the_fly", 2),
        pytest.param("precomputed", 0, marks=pytest.mark.slow),
        pytest.param("on_the_fly", 0, marks=pytest.mark.slow),
    ],
)
def test_a_stored_reference_is_read_and_not_run_again(file, where, rank):
    """Of the whole train step: how often a model looks its tokens up, and whether the stored answers count."""
    config = dpo(dpo__beta=BETA, dpo__reference=where, lora__rank=rank)
    base = lora.freeze(params_of(config))
    batch = with_reference(config, base, fields(batches(config, file).eval_batch(0)))
    optimizer = make_optimizer(config.optim, config.train.steps)
    state, _ = init_state(config, optimizer, on_mesh(config)[1])
    still = base if stays(config) else None
    assert (still is None) == (where == "precomputed" and rank == 0)
    step = make_train_step(config, optimizer, dpo_loss)
    found = equations(jax.make_jaxpr(step)(state, batch, still).jaxpr)
    table = (config.model.vocab_size, config.model.d_model)
    forwards = [e for e in found if e.primitive.name == "gather" and e.invars[0].aval.shape == table]
    assert len(forwards) == (1 if where == "precomputed" else 2)

    other = batch | {"reference_chosen_BP": batch["reference_chosen_BP"] - 1}
    here, there = (jax.jit(step)(state, each, still)[1]["rewards/chosen"] for each in (batch, other))
    assert there - here == pytest.approx(BETA if where == "precomputed" else 0, rel=1e-5)


def test_an_empty_batch_of_pairs_costs_nothing():
    """Rows without pairs: every term is 0 and nothing is NaN."""
    zeros = Answers(*(jnp.zeros((2, 3)) for _ in range(4)))
    for loss in LOSSES:
        terms = pair_terms(zeros, zeros, jnp.zeros((2, 3), bool), jnp.ones(()), settings(loss))
        assert all(float(value) == 0 for value in terms.values()), loss


def test_without_adapters_the_parameters_are_the_model():
    config = dpo()
    params = params_of(config)
    assert model_of(config, params) is params


@pytest.mark.slow
def test_accumulation_changes_nothing(file):
    """Micro-batches with different numbers of pairs: sums over the step, and no mean of means."""
    shape = dict(train__batch_size=8, train__seq_len=48, dpo__beta=BETA, dpo__sft_weight=0.5, loss__balance_weight=0.0)
    reference = params_of(dpo(**shape), 1)
    runs = []
    for steps in (1, 4):
        config, mesh = on_mesh(dpo(**shape, train__accumulation_steps=steps))
        batch = fields(batches(config, file, rows=8).eval_batch(0))
        assert len({int((batch["pairs_BP"][j::4] > 0).sum()) for j in range(4)}) > 1
        runs.append(train(config, mesh, [with_reference(config, reference, batch)] * 2, stage="dpo"))
    (one, log_one), (four, log_four) = runs
    for a, b in zip(log_one, log_four, strict=True):
        for name in ("loss", "preference_loss", "token_loss", "rewards/margins", "rewards/accuracies", "gradient_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6), name
    assert log_one[-1]["rewards/margins"] != 0
    assert_trees_close(one.params, four.params, 1e-4)


def test_in_bfloat16_margins_begin_at_exactly_zero_too(file):
    """The reference is held in bfloat16 and the policy in float32: both compute with the same numbers."""
    config = dpo(dpo__beta=BETA, model__dtype="bfloat16")
    params, batch = params_of(config), fields(batches(config, file).eval_batch(0))
    frozen = lora.freeze(params)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(frozen)} == {"bfloat16", "float32"}
    (_, terms), _ = value_and_grads(config, params, batch, frozen)
    assert all(terms[f"rewards/{name}"] == 0 for name in ("margins", "chosen", "rejected"))
    stored = with_reference(config, frozen, batch)
    (_, terms), _ = value_and_grads(config, params, stored)
    assert all(terms[f"rewards/{name}"] == 0 for name in ("margins", "chosen", "rejected"))


@pytest.mark.parametrize("where", ["precomputed", pytest.param("on_the_fly", marks=pytest.mark.slow)])
def test_a_reference_rounds_as_the_adapted_experts_do(file, where):
    """In bfloat16 the experts' kernels differ by more than a last bit; the adapters have one of their own."""
    config, mesh = on_mesh(dpo(model__dtype="bfloat16", model__expert_backend="dense", lora__rank=2))
    batch = fields(batches(config, file).eval_batch(0))
    adapters = lora.init(config.model, config.lora, jax.random.key(1))
    terms = []
    with jax.set_mesh(mesh):
        base = weights(config, mesh)
        for reference in (base, lora.freeze(mixtral.init(config.model, jax.random.key(config.train.seed)))):
            stored = with_reference(config, reference, batch) if where == "precomputed" else batch
            still = None if where == "precomputed" else reference
            terms.append(value_and_grads(config, lora.attach(base, adapters), stored, still)[0][1])
    names = ("rewards/margins", "rewards/chosen", "rewards/accuracies")
    assert all(terms[0][name] == 0 for name in names)
    assert any(terms[1][name] != 0 for name in names), "with the kernel of the configuration there is noise"


def test_a_difference_in_the_last_bits_is_none_and_has_its_gradient():
    """Two programs round differently: that is a tie, and no reason not to learn from the pair."""
    sums_BP = jnp.array([[-3.0, -40.0, -300.0, -2000.0]])
    near_BP = jnp.nextafter(sums_BP, jnp.zeros_like(sums_BP))
    assert (log_ratio(near_BP, sums_BP) == 0).all()
    assert (jax.grad(lambda p: log_ratio(p, sums_BP).sum())(near_BP) == 1).all()
    off_BP = sums_BP * (1 + 1e-5)
    np.testing.assert_array_equal(log_ratio(off_BP, sums_BP), off_BP - sums_BP)
    policy = Answers(near_BP, sums_BP, jnp.full((1, 4), 5.0), jnp.full((1, 4), 5.0))
    reference = Answers(sums_BP, sums_BP, jnp.full((1, 4), 5.0), jnp.full((1, 4), 5.0))
    terms = pair_terms(policy, reference, jnp.ones((1, 4), bool), 4.0, settings())
    assert terms["rewards/accuracies"] == 0
