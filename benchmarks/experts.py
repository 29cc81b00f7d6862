"""The expert layer's backends against lax.ragged_dot on this machine, forward and backward, in one run.

    python -m benchmarks.experts

Shape: D 512, F 1792, E 8, K 2, 2,048 tokens (4,096 rows), float32, a random imbalanced split of the rows. Useful FLOPs
are 6 * rows * D * F forward and three times that forward and backward; what a backend computes beyond them is its waste.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import interleaved, write
from mixtral_jax.kernels import BACKENDS

D, F, E, K, TOKENS = 512, 1792, 8, 2, 2048
ROWS = TOKENS * K


def ragged(x_MD, w_gate_eDF, w_up_eDF, w_down_eFD, group_sizes_e, block):
    """The same layer with jax.lax.ragged_dot, which on a CPU multiplies by all experts."""
    del block
    gate_MF = jax.lax.ragged_dot(x_MD, w_gate_eDF, group_sizes_e)
    up_MF = jax.lax.ragged_dot(x_MD, w_up_eDF, group_sizes_e)
    return jax.lax.ragged_dot(jax.nn.silu(gate_MF) * up_MF, w_down_eFD, group_sizes_e)


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each case (default 7)")
    rounds = parser.parse_args().rounds
    rng = np.random.default_rng(0)
    shapes = [(ROWS, D), (E, D, F), (E, D, F), (E, F, D), (ROWS, D)]
    x, w_gate, w_up, w_down, dy = (jnp.asarray(0.1 * rng.standard_normal(s), jnp.float32) for s in shapes)
    split = rng.dirichlet(np.full(E, 5.0))
    sizes = jnp.asarray(rng.multinomial(ROWS, split), jnp.int32)
    layers = {"ragged_dot": (ragged, 0), "dense": (BACKENDS["dense"], 0)}
    layers |= {f"blocks of {block}": (BACKENDS["blocks"], block) for block in (128, 256, 512)}
    square = jnp.asarray(rng.standard_normal((2048, 2048)), jnp.float32)
    cases = {"matmul": functools.partial(jax.jit(jnp.matmul), square, square)}
    want = None
    for name, (layer, block) in layers.items():

        def forward(x, w_gate, w_up, w_down, layer=layer, block=block):
            return layer(x, w_gate, w_up, w_down, sizes, block)

        def both(x, w_gate, w_up, w_down, forward=forward):
            y, pull = jax.vjp(forward, x, w_gate, w_up, w_down)
            return y, pull(dy)

        got = jax.jit(both)(x, w_gate, w_up, w_down)
        want = want or got
        error = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(*map(jax.tree.leaves, (got, want))))
        assert error < 1e-4, f"{name} differs from ragged_dot by {error:.1e}"
        cases[f"{name}, forward"] = functools.partial(jax.jit(forward), x, w_gate, w_up, w_down)
        cases[f"{name}, forward + backward"] = functools.partial(jax.jit(both), x, w_gate, w_up, w_down)
    times = interleaved(cases, rounds)
    useful = 6 * ROWS * D * F
    matmul = 2 * 2048**3 / times["matmul"]["median"]
    rows = [["dense matmul 2048^3", f"{1e3 * times['matmul']['median']:.1f}", "", f"{matmul / 1e9:.0f}", "", ""]]
    for name, seconds in list(times.items())[1:]:
        what = name.split(", ")[1]
        rate = useful * (3 if "backward" in what else 1) / seconds["median"]
        ratio = times[f"ragged_dot, {what}"]["median"] / seconds["median"]
        spread = f"{1e3 * seconds['min']:.1f}-{1e3 * seconds['max']:.1f}"
        rows.append(
            [
                name,
                f"{1e3 * seconds['median']:.1f}",
                spread,
                f"{rate / 1e9:.0f}",
                f"{rate / matmul:.0%}",
                f"{ratio:.1f}x",
            ]
        )
    columns = ["case", "median ms", "min-max ms", "useful GFLOP/s", "of matmul rate", "over ragged_dot"]
    title = f"Expert layer: D {D}, F {F}, E {E}, K {K}, {TOKENS} tokens, float32, rows per expert {sizes.tolist()}"
    write("experts", title, columns, rows, {"seconds": times, "group_sizes": sizes.tolist()})


if __name__ == "__main__":
    main()
