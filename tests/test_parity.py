"""The same numbers as transformers: against stored goldens always, and live where torch is installed (marker parity)."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import base, shrink
from mixtral_jax.config import from_config_dict
from mixtral_jax.losses import Totals, pretrain_loss
from mixtral_jax.models import mixtral
from mixtral_jax.optim import make_optimizer
from mixtral_jax.sharding import named_leaves
from mixtral_jax.stages import STAGES
from mixtral_jax.step import TrainState, make_train_step
from tests.golden import reference, training

TOLERANCE = 1e-5  # of the scale of what is compared, in float32


def ours(name: str, **changes):
    """Returns our config, model and batch for a shape of reference.py; changes are `group__key=value`."""
    shape = reference.LIVE[name]
    return ours_of(shape, reference.weights(shape), **changes)


def ours_of(shape: dict, weights: dict[str, np.ndarray], **changes):
    """The same for any shape and weights."""
    c = shrink(base())
    c.model.update(shape)
    c.loss.update(balance_mode="huggingface", balance_weight=0.0, router_z_weight=0.0, z_weight=0.0, head_chunk=7)
    for key, value in changes.items():
        group, key = key.split("__")
        c[group][key] = value
    config = from_config_dict(c)
    like = mixtral.abstract(config.model)
    order = named_leaves(like)
    assert order.keys() == weights.keys()
    model = jax.tree.unflatten(jax.tree.structure(like), [weights[leaf] for leaf in order])
    return config, model, our_batch(reference.batch(shape))


def our_batch(made: dict) -> dict:
    """Tokens and mask of reference.py as a batch of ours."""
    tokens, mask = made["tokens"], made["mask"]
    weight = np.roll(mask, -1, axis=1).astype(np.float32)
    weight[:, -1] = 0
    batch = {
        "tokens_BT": tokens,
        "targets_BT": np.roll(tokens, -1, axis=1),
        "loss_weights_BT": weight,
        "positions_BT": np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
        "segment_ids_BT": mask,
    }
    return jax.tree.map(jnp.asarray, batch)


@jax.jit
def forward(model, batch):
    """float32 logits [B, T, V]."""
    return model(batch["tokens_BT"], batch["positions_BT"], batch["segment_ids_BT"])[0]


def check(name: str, golden: dict) -> None:
    config, model, batch = ours(name)
    valid = np.asarray(batch["segment_ids_BT"]) > 0

    def close(label, got, want):
        scale = np.abs(want).max()
        assert scale > 0, f"{label}: the reference is all zero and proves nothing"
        error = np.abs(np.asarray(got) - want).max()
        assert error <= TOLERANCE * scale, f"{label}: off by {error:.2e}, scale {scale:.2e}"

    close("logits", np.asarray(forward(model, batch))[valid], golden["logits"][valid])
    for which, term in (("loss", "token_loss"), ("aux", "balance_loss")):

        def value(model, term=term):
            # The loss of the next token without other terms; and the balance loss alone.
            weights = dataclasses.replace(config.loss, balance_weight=0.0, z_weight=0.0, router_z_weight=0.0)
            loss, (terms, _) = pretrain_loss(model, batch, Totals.of(batch), weights)
            return loss if term == "token_loss" else terms[term]

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
@pytest.mark.parametrize("name", reference.LIVE)
def test_equals_transformers_live(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.golden.make_goldens import compute

    check(name, compute(reference.LIVE[name]))


def trained(name: str) -> dict[str, np.ndarray]:
    """The losses and norms of training.STEPS steps of our train step, settings and batches those of training.py."""
    b1, b2 = training.BETAS
    chosen = training.settings(name)
    optim = dict(name="adamw", learning_rate=chosen["learning_rate"], schedule="constant", warmup_steps=0, b1=b1, b2=b2)
    optim |= dict(weight_decay=training.WEIGHT_DECAY, eps=chosen["eps"], clip_norm=training.CLIP)
    changes = {f"optim__{key}": value for key, value in optim.items()}
    config, model, _ = ours(name, loss__balance_weight=training.BALANCE, **changes)
    optimizer = make_optimizer(config.optim, training.STEPS)
    step = jax.jit(make_train_step(config, optimizer, STAGES["pretrain"].loss))
    model = jax.tree.map(jnp.asarray, model)
    state = TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(model), jnp.zeros((), bool))
    out: dict = {"token_loss": [], "balance_loss": [], "gradient_norm": []}
    for k in range(training.STEPS):
        state, metrics = step(state, our_batch(training.batch(name, k)))
        for key, values in out.items():
            values.append(float(metrics[key]))
    return {key: np.asarray(values) for key, values in out.items()}


def check_training(name: str, golden: dict) -> None:
    got = trained(name)
    assert golden["token_loss"][-1] < 0.5 * golden["token_loss"][0], "nothing was learned, and that proves little"
    assert golden["norm"].max() > training.CLIP, "clipping must have had something to do"
    np.testing.assert_allclose(got["token_loss"], golden["token_loss"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(got["balance_loss"], golden["aux"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(got["gradient_norm"], golden["norm"], rtol=1e-3)


@pytest.mark.parametrize("name", ["mixtral", "window_top3"])
def test_50_steps_of_adamw_equal_stored_ones_of_torch(name):
    with np.load(training.FILE) as golden:
        check_training(name, {key.partition(".")[2]: golden[key] for key in golden if key.startswith(f"{name}.")})


@pytest.mark.parity
@pytest.mark.parametrize("name", reference.LIVE)
def test_50_steps_of_adamw_equal_torchs_live(name):
    pytest.importorskip("torch")
    check_training(name, training.losses(name))


@pytest.mark.parity
@pytest.mark.parametrize("name", reference.LIVE)
def test_bfloat16_is_no_farther_from_float32_than_transformers_is(name):
    """Over enough tokens: near-ties of the router fall either way, and a token that falls is a large error."""
    torch = pytest.importorskip("torch")
    from tests.golden.make_goldens import build

    config, model, _ = ours(name)
    like = mixtral.abstract(dataclasses.replace(config.model, dtype="bfloat16"))
    rounded = jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(model))
    tokens = np.random.RandomState(5).randint(0, config.model.vocab_size, (64, 64)).astype(np.int32)
    batch = our_batch({"tokens": tokens, "mask": np.ones_like(tokens)})
    mine = np.asarray(forward(rounded, batch)) - np.asarray(forward(model, batch))
    reference_model, logits = build(reference.LIVE[name]), []
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            logits.append(reference_model.to(dtype)(torch.tensor(tokens).long()).logits.float().numpy())
    theirs = logits[1] - logits[0]
    for label, error in (
        ("root of the mean square", lambda e: np.sqrt(np.square(e).mean())),
        ("median", lambda e: np.median(np.abs(e))),
    ):
        print(f"{name}, {label}: {error(mine):.3e}, transformers {error(theirs):.3e}")
        assert error(mine) <= error(theirs), label


@pytest.mark.slow
@pytest.mark.parity
def test_equals_transformers_at_full_width(tmp_path):
    """One layer of 4 experts, 4096 x 14336. Each framework in a process of its own, one after the other."""
    pytest.importorskip("torch")
    for who in ("transformers", "ours"):
        command = [sys.executable, "-m", "tests.golden.full_width", who, str(tmp_path)]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    valid = reference.batch(reference.BASE)["mask"] > 0
    names = ["logits", "loss", *reference.dimensions(reference.BASE)]
    for name in names:
        got, want = (np.load(tmp_path / f"{who}.{name}.npy", mmap_mode="r") for who in ("ours", "transformers"))
        assert got.shape == want.shape, name
        if name == "logits":
            got, want = got[valid], want[valid]
        error, scale = np.abs(got - want).max(), np.abs(want).max()
        print(f"{name}: off by {error:.1e}, scale {scale:.1e}")
        assert scale > 0, name
        assert error <= TOLERANCE * scale, f"{name}: off by {error:.2e}, scale {scale:.2e}"
