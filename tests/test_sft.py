"""SFT's loss on conversations: weights choose the tokens, and neither packing nor accumulation changes what they add up to."""

import jax
import numpy as np
import pytest

from mixtral_jax.data import Batches, TokenFile, pack
from mixtral_jax.losses import Totals
from mixtral_jax.models import mixtral
from mixtral_jax.stages import STAGES
from tests.helpers import assert_trees_close, on_mesh, relative_errors, tiny, train

SHAPE = dict(train__stage="sft", train__seq_len=32, model__num_layers=1, loss__balance_weight=0.0)


def conversations(n: int = 11) -> TokenFile:
    """Two turns each, the first answer of every third one without weight."""
    rng = np.random.default_rng(1)
    tokens, weights, lengths = [], [], []
    for i in range(n):
        document, of_it = [1], [0.0]
        for turn in range(2):
            question, answer = rng.integers(3, 128, rng.integers(2, 6)), rng.integers(3, 128, rng.integers(1, 7))
            document += [*question, *answer, 2]
            of_it += [0.0] * len(question) + [0.0 if turn == 0 and i % 3 == 0 else 1.0] * (len(answer) + 1)
        tokens, weights = tokens + document, weights + of_it
        lengths.append(len(document))
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    ids = [f"chats:{i + 1}" for i in range(n)]
    return TokenFile(np.array(tokens, np.int32), offsets, np.array(lengths), ids, np.array(weights, np.float32))


def batch(file: TokenFile, rows: int, one_per_row: bool = False) -> dict:
    plan = pack(file.lengths, 32, one_per_row=one_per_row)
    found = Batches(file, plan, batch_size=rows, seq_len=32, seed=0, shuffle=False).eval_batch(0)
    assert plan.n_rows <= rows
    return {name: value for name, value in found.items() if isinstance(value, np.ndarray)}


def value_and_grads(config, params, batch):
    def loss(params, batch):
        return STAGES["sft"].loss(params, batch, Totals.of(batch), config)[0]

    return jax.device_get(jax.jit(jax.value_and_grad(loss))(params, batch))


def test_the_loss_is_the_mean_over_trained_tokens_packed_or_not():
    """Against the full logits of every conversation alone; nothing of one is seen or predicted by another."""
    config, file = tiny(**SHAPE, loss__z_weight=0.0, loss__router_z_weight=0.0), conversations()
    params = mixtral.init(config.model, jax.random.key(0))
    packed, alone = (
        value_and_grads(config, params, batch(file, 12)),
        value_and_grads(config, params, batch(file, 12, True)),
    )
    assert (batch(file, 12)["segment_ids_BT"].max(1) > 1).any(), "some rows hold several"
    assert packed[0] == pytest.approx(alone[0], rel=1e-5)
    assert max(relative_errors(packed[1], alone[1]).values()) < 1e-5
    forward = jax.jit(lambda m, *row: m(*row)[0])
    total = count = 0.0
    for i in range(len(file.ids)):
        span = slice(file.offsets[i], file.offsets[i + 1])
        ids, weights = file.tokens[span], file.weights[span]
        row, segments = np.zeros((1, 32), np.int32), np.zeros((1, 32), np.int32)
        row[0, : len(ids)], segments[0, : len(ids)] = ids, 1
        log_probs_TV = np.asarray(
            jax.nn.log_softmax(forward(params, row, np.arange(32, dtype=np.int32)[None], segments)[0])
        )
        total -= sum(weights[t + 1] * log_probs_TV[t, ids[t + 1]] for t in range(len(ids) - 1))
        count += weights[1:].sum()
    assert packed[0] == pytest.approx(total / count, rel=1e-5)


def test_accumulation_changes_nothing():
    """Micro-batches with different numbers of trained tokens."""
    file, runs = conversations(), []
    for steps in (1, 4):
        config, mesh = on_mesh(tiny(**SHAPE, train__batch_size=12, train__accumulation_steps=steps))
        rows = batch(file, 12)
        assert len({float(rows["loss_weights_BT"][j::4].sum()) for j in range(4)}) > 1
        runs.append(train(config, mesh, [rows] * 2, stage="sft"))
    (one, log_one), (four, log_four) = runs
    for a, b in zip(log_one, log_four, strict=True):
        for name in ("loss", "token_loss", "gradient_norm", "trained_tokens"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name
    assert_trees_close(one.params, four.params, 1e-4)


def test_a_step_of_questions_only_moves_nothing_by_its_tokens():
    """All weights 0: the token loss is 0 and not NaN, and the routers' terms go on."""
    config = tiny(**SHAPE)
    rows = batch(conversations(), 12)
    rows["loss_weights_BT"] = np.zeros_like(rows["loss_weights_BT"])
    params = mixtral.init(config.model, jax.random.key(0))
    loss, grads = value_and_grads(config, params, rows)
    assert np.isfinite(loss)
    assert loss > 0, "router z"
    assert not np.any(grads.head_DV[...])
