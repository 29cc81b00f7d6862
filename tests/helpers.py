"""What many tests need: a tiny configuration, random packed batches, and comparisons by name."""

import dataclasses

import jax
import numpy as np

from configs.common import base, shrink
from mixtral_jax.config import Config, from_config_dict, resolve_mesh
from mixtral_jax.losses import Totals
from mixtral_jax.optim import make_optimizer
from mixtral_jax.sharding import make_mesh, named_leaves, place, replicated, tree_shardings
from mixtral_jax.stages import STAGES
from mixtral_jax.step import TrainState, init_state, make_train_step

ALL_TERMS = dict(balance_weight=0.04, router_z_weight=1e-3, z_weight=1e-3)


def tiny(**overrides) -> Config:
    """The smallest configuration; overrides are `group__key=value`. All loss terms are on."""
    c = shrink(base())
    c.model.update(d_model=32, d_ff=48, head_dim=8, vocab_size=128, expert_block=8, max_seq_len=64, init_std=0.1)
    c.train.update(seq_len=32, batch_size=8)
    c.loss.update(head_chunk=16, **ALL_TERMS)
    c.mesh.update(fsdp=1)
    for name, value in overrides.items():
        group, key = name.split("__")
        c[group][key] = value
    return from_config_dict(c)


def random_batch(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Random documents of random lengths packed into rows, with padding at the end of every row."""
    rng = np.random.default_rng(seed)
    b, t = config.train.batch_size, config.train.seq_len
    batch = {
        "tokens_BT": rng.integers(0, config.model.vocab_size, (b, t), dtype=np.int32),
        "targets_BT": rng.integers(0, config.model.vocab_size, (b, t), dtype=np.int32),
        "loss_weights_BT": np.zeros((b, t), np.float32),
        "positions_BT": np.zeros((b, t), np.int32),
        "segment_ids_BT": np.zeros((b, t), np.int32),
    }
    for row in range(b):
        at, segment = 0, 1
        while at < t - 4:
            length = int(rng.integers(2, t // 2))
            span = slice(at, min(at + length, t - 1))
            batch["positions_BT"][row, span] = np.arange(span.stop - span.start)
            batch["segment_ids_BT"][row, span] = segment
            batch["loss_weights_BT"][row, span] = rng.random(span.stop - span.start) < 0.8
            at, segment = span.stop, segment + 1
    return batch


def on_mesh(config: Config, **axes):
    """Returns config with this mesh, and the mesh on as many of the 8 devices as it takes."""
    sizes = dict(data=1, fsdp=1, expert=1, context=1, tensor=1) | axes
    count = int(np.prod(list(sizes.values())))
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes))
    config = resolve_mesh(config, count)
    return config, make_mesh(config.mesh, jax.devices()[:count])


def train(config: Config, mesh, batches: list[dict], stage: str = "pretrain"):
    """Runs the real train step over host batches; returns the final state (host arrays) and the metrics of each step."""
    optimizer = make_optimizer(config.optim, config.train.steps)
    state, shardings = init_state(config, optimizer, mesh)
    step = jax.jit(
        make_train_step(config, optimizer, STAGES[stage].loss),
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
    )
    log = []
    with jax.set_mesh(mesh):
        for batch in batches:
            state, metrics = step(state, place(batch, mesh))
            log.append(jax.device_get(metrics))
    return jax.device_get(state), log


def gradients(config, mesh, params, batch):
    """The pretraining loss, its terms and its gradients on a mesh, on the host: ((loss, (terms, stats)), grads)."""
    assert params.config == config.model, (
        "the parameters carry another configuration, and that is the one that would run"
    )

    def loss_fn(params, batch):
        return STAGES["pretrain"].loss(params, batch, Totals.of(batch), config)

    with jax.set_mesh(mesh):
        out = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(shard(params, mesh), place(batch, mesh))
    return jax.device_get(out)


def shard(tree, mesh):
    """Puts parameters (or a TrainState) on a mesh by their names."""
    params = tree.params if isinstance(tree, TrainState) else tree
    return jax.device_put(tree, tree_shardings(tree, mesh, params))


def relative_errors(got, want) -> dict[str, float]:
    """Largest error of each named leaf over the leaf's scale."""
    got, want = named_leaves(got), named_leaves(want)
    assert got.keys() == want.keys()
    return {
        name: float(
            np.abs(np.asarray(got[name]) - np.asarray(want[name])).max()
            / (np.abs(np.asarray(want[name])).max() + 1e-30)
        )
        for name in want
    }


def assert_trees_close(got, want, tolerance: float) -> None:
    """Fails naming the worst leaf."""
    errors = relative_errors(got, want)
    worst = max(errors, key=errors.get)
    assert errors[worst] <= tolerance, f"{worst} is off by {errors[worst]:.2e} of its scale, more than {tolerance:.0e}"


def equations(jaxpr):
    """All equations of a jaxpr, those of inner ones included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
