"""How a layer's cost grows with experts E, choices K, tokens and the row's length T; claims are printed with what was measured.

    python -m benchmarks.growth [--rounds=7]

float32, D 512, F 1792. Assignments are balanced by construction (a random permutation), so that rows per expert are what the
figure says; the panel of T has whole layers and their own router. The points of a panel take turns, twice in each, of which the second counts (as in
benchmarks/cpu.py). Writes
results/DATE-growth-CPU.json, .md and .png.
"""

import argparse
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from benchmarks import ours
from benchmarks.common import RESULTS, interleaved, stem, write
from benchmarks.cpu import OURS, SHAPE, SMALL
from mixtral_jax import host_memory
from mixtral_jax.models import attention, moe
from mixtral_jax.models.layers import rope_table
from mixtral_jax.optim import scale_by_adam

EXPERTS, CHOICES, TOKENS, LENGTHS = (8, 16, 32, 64), (1, 2, 4, 8), (1024, 2048, 4096, 8192), (512, 1024, 2048, 4096)
ROWS = 256  # of an expert, at least: with fewer experts the same tokens give each more


def experts(shape: dict, e: int, k: int, tokens: int, train: bool):
    """The experts of one layer on balanced assignments, forward, or forward and all gradients."""
    config = ours.config_of(OURS, shape | {"num_experts": e, "experts_per_token": k}).model
    rng = np.random.default_rng(0)
    choices_NK = (np.arange(tokens * k).reshape(tokens, k)) % e  # K different ones, each expert equally often
    index_BTK = jnp.asarray(choices_NK[rng.permutation(tokens)][None], jnp.int32)
    gates_BTK = jnp.full((1, tokens, k), 1 / k)
    d, f = shape["d_model"], shape["d_ff"]
    x_BTD = jax.random.normal(jax.random.key(0), (1, tokens, d))
    weights = [0.02 * jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(e, d, f), (e, d, f), (e, f, d)])]

    def forward(x_BTD, *weights):
        return moe.local_experts(x_BTD, gates_BTK, index_BTK, *weights, config)[0]

    def both(x_BTD, *weights):
        out, pull = jax.vjp(forward, x_BTD, *weights)
        return pull(out)

    return functools.partial(jax.jit(both if train else forward), x_BTD, *weights)


def adam(shape: dict, e: int):
    """AdamW's direction and its application to the expert weights of a layer."""
    update = scale_by_adam(0.9, 0.95, 1e-8, "float32")
    w = jnp.full((3, e, shape["d_model"], shape["d_ff"]), 0.01)
    held = [(w, update.init(w))]

    @functools.partial(jax.jit, donate_argnums=0)
    def step(held, grad):
        w, state = held
        direction, state = update.update(grad, state)
        return w - 1e-4 * direction, state

    grad = jnp.full(w.shape, 1e-3)

    def run():
        held[0] = step(held[0], grad)
        return held[0]

    return run


def gradient_traffic(shape: dict, e: int):
    """What the weights' gradients cost beside their products: they are filled with zeros, and an expert's part is added to each."""
    shape_eDF = (3, e, shape["d_model"], shape["d_ff"])
    part = jnp.full((3, *shape_eDF[2:]), 1e-3)

    @jax.jit
    def run(part):
        return jax.lax.fori_loop(0, e, lambda i, grads: grads.at[:, i].add(part), jnp.zeros(shape_eDF))

    return functools.partial(run, part)


def layer_of_length(shape: dict, t: int, tokens: int) -> dict:
    """A layer on rows of T, forward: whole, and without attention's scores."""
    shape = shape | {"seq_len": t, "batch": tokens // t}
    block, x_BTD, _ = ours._layer(OURS, shape)
    place_BT = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), x_BTD.shape[:2])
    ones_BT = jnp.ones_like(place_BT)
    rope = rope_table(place_BT, shape["head_dim"], 1e6)
    heads, groups = shape["num_heads"], shape["num_kv_heads"]

    def layer(block, x_BTD):
        return block(x_BTD, rope, ones_BT, place_BT)[0]

    def without(block, x_BTD):
        def neighbours(q_BTNH, k_BTGH, v_BTGH, *_):  # reads all that attention reads, and no other position
            return q_BTNH + jnp.repeat(k_BTGH + v_BTGH, heads // groups, axis=2)

        with mock.patch.object(attention, "self_attend", neighbours):
            return layer(block, x_BTD)

    return {
        "layer": functools.partial(jax.jit(layer), block, x_BTD),
        "without scores": functools.partial(jax.jit(without), block, x_BTD),
    }


def claim(name: str, values: list[float], allowed: float) -> dict:
    """Whether the largest of some values is within a factor of the smallest."""
    ratio = max(values) / min(values)
    return {"claim": name, "measured": ratio, "allowed": allowed, "holds": ratio <= allowed}


def straight(name: str, seconds: dict[str, float], allowed: float) -> dict:
    """Whether measurements lie on a straight line: the largest factor between one and the line that fits best (relative errors)."""
    x, y = np.array([*map(float, seconds)]), np.array([*seconds.values()])
    line = np.polyval(np.polyfit(x, y, 1, w=1 / y), x)
    ratio = float(np.maximum(y / line, line / y).max())
    return {"claim": name, "measured": ratio, "allowed": allowed, "holds": ratio <= allowed}


def measure(shape: dict, rounds: int, small: bool) -> dict:
    """All panels: name -> {x: seconds}."""
    part = 16 if small else 1
    found = {}

    def panel(name: str, cases: dict) -> None:
        print(f"{name} ...", flush=True)
        found[name] = {str(x): each["median"] for x, each in interleaved(cases, rounds, warm=True).items()}

    most = EXPERTS[:2] if small else EXPERTS
    tokens = {e: ROWS * max(most) // 2 // part for e in most}
    panel("forward by E", {e: experts(shape, e, 2, n, train=False) for e, n in tokens.items()})
    panel("training by E", {e: experts(shape, e, 2, n, train=True) for e, n in tokens.items()})
    panel("gradient traffic by E", {e: gradient_traffic(shape, e) for e in most})
    for e in most:  # one after the other: 64 experts' moments take 2 GB
        panel(f"optimizer, {e}", {e: adam(shape, e)})
    found["optimizer by E"] = {str(e): found.pop(f"optimizer, {e}")[str(e)] for e in most}
    panel("forward by K", {k: experts(shape, 8, k, 2048 // part, train=False) for k in CHOICES})
    panel("forward by tokens", {n // part: experts(shape, 8, 2, n // part, train=False) for n in TOKENS})
    lengths = {t // part: layer_of_length(shape, t // part, 8192 // part) for t in LENGTHS}
    for name in ("layer", "without scores"):
        panel(f"{name} by T", {t: each[name] for t, each in lengths.items()})
    found["tokens by E"] = {str(e): n for e, n in tokens.items()}
    return found


def scores_of(found: dict) -> dict[str, float]:
    """Seconds of attention's scores by T: what a layer takes more with them than without."""
    rest = found["without scores by T"]
    return {t: seconds - rest[t] for t, seconds in found["layer by T"].items()}


def claims(found: dict) -> list[dict]:
    """What the project says of growth, with what was measured."""
    tokens = found["tokens by E"]
    rest = found["without scores by T"]
    scores = scores_of(found)
    longest = sorted(scores, key=int)[-2:]
    added = found["training by E"]
    first, last = min(added, key=int), max(added, key=int)
    weights = {e: found["gradient traffic by E"][e] for e in added}
    per_token = [(added[e] - weights[e]) / tokens[e] for e in (first, last)]
    return [
        claim("forward per token is flat in E", [s / tokens[e] for e, s in found["forward by E"].items()], 1.2),
        claim("training per token, without the added weights' gradients, is flat in E", per_token, 1.2),
        straight("forward is a straight line over K", found["forward by K"], 1.1),
        straight("forward is a straight line over tokens", found["forward by tokens"], 1.1),
        claim("a layer without attention's scores is flat in T", list(rest.values()), 1.2),
        claim(
            "scores are linear in T, from one of the longest two to the other",
            [scores[t] / int(t) for t in longest],
            1.25,
        ),
    ]


def draw(found: dict) -> Figure:
    """The panels."""
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    tokens = found["tokens by E"]
    panels = figure.subplots(2, 3).flat

    def line(axes, values: dict, label: str) -> None:
        axes.plot([int(x) for x in values], list(values.values()), "o-", label=label)

    def dress(axes, x: str, y: str) -> None:
        axes.set(xlabel=x, ylabel=y, ylim=(0, 1.4 * axes.get_ylim()[1]))  # the legend is above the lines
        axes.legend(frameon=False, loc="upper left")

    per_token = {
        name: {e: 1e6 * s / tokens[e] for e, s in found[name].items()}
        for name in ("forward by E", "training by E", "gradient traffic by E", "optimizer by E")
    }
    line(panels[0], per_token["forward by E"], "experts, forward")
    dress(panels[0], f"experts E (K 2, {tokens[str(max(map(int, tokens)))]:,} tokens)", "microseconds a token")
    base = per_token["gradient traffic by E"]
    work = [per_token["training by E"][e] - base[e] for e in base]
    labels = ("forward and backward", "zeros and adding of weight gradients", "AdamW of the weights")
    panels[1].stackplot(
        [int(e) for e in base], work, base.values(), per_token["optimizer by E"].values(), labels=labels
    )
    dress(panels[1], f"experts E (K 2, {tokens[str(max(map(int, tokens)))]:,} tokens)", "microseconds a token")
    for axes, name, x in (
        (panels[2], "forward by K", "choices K (E 8)"),
        (panels[3], "forward by tokens", "tokens (E 8, K 2)"),
    ):
        line(axes, {at: 1e3 * s for at, s in found[name].items()}, "experts, forward")
        dress(axes, x, "ms")
    lengths = {name: found[f"{name} by T"] for name in ("layer", "without scores")} | {"scores": scores_of(found)}
    for name, seconds in lengths.items():
        line(panels[4], {t: 1e3 * s for t, s in seconds.items()}, name)
    dress(panels[4], "T at a fixed number of tokens", "ms")
    panels[5].axis("off")
    return figure


def main() -> None:
    """Measures, says which claims hold, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each point (default 7)")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to see that all runs; writes nothing")
    arguments = parser.parse_args()
    shape = SMALL if arguments.small else SHAPE
    found = measure(shape, arguments.rounds, arguments.small)
    said = claims(found)
    rows = [
        [c["claim"], f"{c['measured']:.2f}", f"{c['allowed']:.2f}", "holds" if c["holds"] else "FAILS"] for c in said
    ]
    columns = ["claim", "largest over smallest, or over the line", "allowed", ""]
    figure = draw(found)
    if arguments.small:
        print(*rows, sep="\n")
        return
    write("growth", "How cost grows, float32, D 512, F 1792", columns, rows, {"seconds": found, "claims": said})
    figure.savefig(RESULTS / f"{stem('growth')}.png", dpi=110)


if __name__ == "__main__":
    host_memory.restart_with_huge_pages()
    main()
