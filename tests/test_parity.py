"""The same numbers as transformers: against stored goldens always, and live where torch is installed (marker parity)."""

from pathlib import Path

import jax
import numpy as np
import pytest

from configs.common import base, shrink
from mixtral_jax.config import from_config_dict
from mixtral_jax.losses import Totals, pretrain_loss
from mixtral_jax.models import mixtral
from mixtral_jax.sharding import named_leaves
from tests.golden import reference

TOLERANCE = 1e-5  # of the scale of what is compared, in float32


def ours(name: str):
    """Returns our config, model and batch for a shape of reference.py."""
    shape = reference.SHAPES[name]
    c = shrink(base())
    c.model.update(shape)
    c.loss.update(balance_mode="huggingface", balance_weight=0.0, router_z_weight=0.0, z_weight=0.0, head_chunk=7)
    config = from_config_dict(c)
    weights = reference.weights(shape)
    like = mixtral.abstract(config.model)
    order = named_leaves(like)
    assert order.keys() == weights.keys()
    model = jax.tree.unflatten(jax.tree.structure(like), [weights[leaf] for leaf in order])
    made = reference.batch(shape)
    tokens, mask = made["tokens"], made["mask"]
    targets = np.roll(tokens, -1, axis=1)
    weight = np.roll(mask, -1, axis=1).astype(np.float32)
    weight[:, -1] = 0
    batch = {
        "tokens_BT": tokens,
        "targets_BT": targets,
        "loss_weights_BT": weight,
        "positions_BT": np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
        "segment_ids_BT": mask,
    }
    return config, model, jax.tree.map(jax.numpy.asarray, batch)


def check(name: str, golden: dict) -> None:
    config, model, batch = ours(name)
    valid = np.asarray(batch["segment_ids_BT"]) > 0

    @jax.jit
    def forward(model):
        return model(batch["tokens_BT"], batch["positions_BT"], batch["segment_ids_BT"])[0]

    def close(label, got, want):
        scale = np.abs(want).max()
        assert scale > 0, f"{label}: the reference is all zero and proves nothing"
        error = np.abs(np.asarray(got) - want).max()
        assert error <= TOLERANCE * scale, f"{label}: off by {error:.2e}, scale {scale:.2e}"

    close("logits", np.asarray(forward(model))[valid], golden["logits"][valid])
    for which, term in (("loss", "token_loss"), ("aux", "balance_loss")):

        def value(model, term=term):
            return pretrain_loss(model, batch, Totals.of(batch), config.loss)[1][0][term]

        got, grads = jax.jit(jax.value_and_grad(value))(model)
        close(which, got, golden[which])
        unused = {"aux": ("head_DV", "final_norm_D")}.get(which, ())
        for leaf, grad in named_leaves(grads).items():
            want = golden[f"{which}_grad.{leaf}"]
            if leaf in unused:
                assert not want.any()
                assert not np.asarray(grad).any()
            else:
                close(f"{which}_grad.{leaf}", grad, want)


@pytest.mark.parametrize("name", reference.SHAPES)
def test_equals_stored_goldens(name):
    path = Path(__file__).parent / "golden" / f"{name}.npz"
    with np.load(path) as golden:
        check(name, dict(golden))


@pytest.mark.parity
@pytest.mark.parametrize("name", reference.SHAPES)
def test_equals_transformers_live(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.golden.make_goldens import compute

    check(name, compute(reference.SHAPES[name]))
