"""Where the time of a training step on a CPU goes: its phases, each alone, beside the whole step and a matmul; in turns.

    python -m benchmarks.phases [--rounds=9]

The model of benchmarks/cpu.py. A phase alone allocates its own results, so the sum is not exactly the step. Writes
results/DATE-phases-CPU.json and .md.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import ours
from benchmarks.common import interleaved, write
from benchmarks.cpu import OURS, SHAPE, SMALL, useful_flops
from mixtral_jax import host_memory
from mixtral_jax.losses import summed_losses
from mixtral_jax.models.layers import rms_norm, rope_table
from mixtral_jax.optim import clip_by_norm, make_optimizer
from mixtral_jax.step import init_state


def attention(shape: dict):
    """Projections, scores and their gradients of one layer."""
    block, x_BTD, _ = ours._layer(OURS, shape)
    place_BT = np.broadcast_to(np.arange(shape["seq_len"], dtype=np.int32), x_BTD.shape[:2])
    ones_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)

    def forward(block, x_BTD):
        rope = rope_table(jnp.asarray(place_BT), shape["head_dim"], 1e6)
        return block.attention(rms_norm(x_BTD, block.attention_norm_D[...], 1e-5), rope, ones_BT, place_BT)[0]

    def both(block, x_BTD):
        out, pull = jax.vjp(forward, block, x_BTD)
        return pull(out)

    return functools.partial(jax.jit(both), block, x_BTD)


def head(shape: dict):
    """Logits, loss and the gradients of the hidden states and the head."""
    rng = np.random.default_rng(0)
    tokens = (shape["batch"], shape["seq_len"])
    x_BTD = jnp.asarray(rng.standard_normal((*tokens, shape["d_model"])), jnp.float32)
    head_DV = jnp.asarray(0.02 * rng.standard_normal((shape["d_model"], shape["vocab_size"])), jnp.float32)
    targets_BT = jnp.asarray(rng.integers(0, shape["vocab_size"], tokens))
    weights_BT = jnp.full(tokens, 1 / targets_BT.size)

    def loss(x_BTD, head_DV):
        return summed_losses(x_BTD, head_DV, targets_BT, weights_BT, 0.0, 512)[0]

    return functools.partial(jax.jit(jax.value_and_grad(loss, argnums=(0, 1))), x_BTD, head_DV)


def optimizer(shape: dict):
    """The norm of all gradients, clipping and AdamW, as the step does them."""
    config = ours.config_of(OURS, shape)
    mesh = ours.make_mesh(config.mesh, jax.devices()[:1])
    adamw = make_optimizer(config.optim, config.train.steps)
    state, _ = init_state(config, adamw, mesh)
    grads = jax.tree.map(lambda a: jnp.full(a.shape, 1e-3, jnp.float32), state.params)
    held = [(state.params, state.opt_state)]

    @functools.partial(jax.jit, donate_argnums=0)
    def update(held, grads, ok):
        params, opt_state = held
        clipped = clip_by_norm(grads, optax.tree.norm(grads), 1.0)
        updates, opt_state = adamw.update(clipped, opt_state, params, ok=ok)
        return optax.apply_updates(params, updates), opt_state

    def run():
        held[0] = update(held[0], grads, jnp.asarray(True))
        return held[0]

    return run


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each phase (default 9)")
    parser.add_argument("--small", action="store_true", help="a tiny shape; prints and writes nothing")
    arguments = parser.parse_args()
    shape = SMALL if arguments.small else SHAPE
    square = jnp.asarray(np.random.default_rng(0).standard_normal((2048, 2048)), jnp.float32)
    cases = {
        "matmul": functools.partial(jax.jit(jnp.matmul), square, square),
        "step": ours.train(OURS, shape),
        "experts": ours.moe_train(OURS, shape),
        "attention": attention(shape),
        "head": head(shape),
        "optimizer": optimizer(shape),
    }
    times = interleaved(cases, arguments.rounds)
    rate = 2 * 2048**3 / times["matmul"]["median"]
    layers, step = shape["num_layers"], times["step"]["median"]
    logits = 6.0 * shape["batch"] * shape["seq_len"] * shape["d_model"] * shape["vocab_size"]
    flops = {"experts": layers * useful_flops("moe_train", shape), "head": logits, "optimizer": 0.0}
    flops["attention"] = useful_flops("train", shape) - flops["experts"] - flops["head"]
    rows = [["whole step", f"{1e3 * step:,.0f}", "100%", f"{useful_flops('train', shape) / step / rate:.0%}"]]
    rest = step
    for name in ("experts", "attention", "head", "optimizer"):
        seconds = times[name]["median"] * (layers if name in ("experts", "attention") else 1)
        rest -= seconds
        share = f"{flops[name] / seconds / rate:.0%}" if flops[name] else ""
        title = f"{name}, {layers} layers" if name in ("experts", "attention") else name
        rows.append([title, f"{1e3 * seconds:,.0f}", f"{seconds / step:.0%}", share])
    rows.append(["all else (residuals, norms, embedding)", f"{1e3 * rest:,.0f}", f"{rest / step:.0%}", ""])
    columns = ["phase", "ms", "of the step", "useful FLOPs of the matmul rate"]
    if arguments.small:
        print(*rows, sep="\n")
        return
    title = f"Phases of a training step, float32, matmul {rate / 1e9:.0f} GFLOP/s"
    write("phases", title, columns, rows, {"seconds": times, "shape": shape})


if __name__ == "__main__":
    host_memory.restart_with_huge_pages()
    main()
