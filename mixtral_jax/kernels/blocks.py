"""Block-sparse experts in plain JAX: each expert runs over blocks of its own rows, as many as it has.

The loop counts are dynamic, so an imbalanced router costs no more than a balanced one. After the blocks of full size come
smaller ones, each at most once: less than SMALLEST rows of an expert are padding. (With blocks of 256 alone
and 512 rows an expert, a quarter of the work was padding; with blocks of 64 alone the matmuls are slower.) Blocks need no
padding between groups: the last block of an expert may reach into the next expert's rows, whose results are written later
and win.

The backward pass is written by hand. It finds gate and up stored (`keep`), or recomputes them: 2 extra matmuls of 9, and
the F-wide values exist for one block at a time and never for M rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

SMALLEST = 32  # rows of the smallest block: matmuls of fewer run at less than half the rate


def silu_and_slope(x):
    """silu(x) and its derivative."""
    sigmoid = jax.nn.sigmoid(x)
    silu = x * sigmoid
    return silu, sigmoid + silu * (1 - sigmoid)


def matmul(a, b, contract):
    """Contracts one axis of each with float32 accumulation; the caller casts down where a value is stored."""
    return lax.dot_general(a, b, ((contract[:1], contract[1:]), ((), ())), preferred_element_type=jnp.float32)


def padded(x_MD, block: int):
    """Room for a last block that reaches over the end."""
    # dynamic_slice clamps at the end of the array, which would shift the last block: give it room instead.
    return jnp.pad(x_MD, ((0, block), (0, 0)))


def rungs(block: int) -> list[int]:
    """Sizes of blocks from the largest: block times 1, 3/4, 1/2, 3/8, 1/4 and so on, in whole multiples of SMALLEST.

    Any number of rows below `block` is covered by two of them or three: with halves alone it would be one more, and each
    block adds to an expert's weight gradients, which takes as long as multiplying 60 rows.
    """
    sizes, half = [block], block
    while half % (2 * SMALLEST) == 0:
        half //= 2
        sizes += [3 * half // 2] if 3 * half // 2 % SMALLEST == 0 else []
        sizes.append(half)
    return sizes


def quarters(block: int) -> list[int]:
    """As `rungs`, with fewer sizes: block, its quarter and so on. For experts that each have loops of their own, forward only.

    A program's size, and so the memory it keeps, grows with the number of loops; a block costs the forward pass little.
    """
    sizes = [block]
    while sizes[-1] > SMALLEST and sizes[-1] % SMALLEST == 0:
        sizes.append(max(sizes[-1] // (4 * SMALLEST), 1) * SMALLEST)
    return sizes


def over_blocks(size, sizes: list[int], one_block, carry):
    """Covers `size` rows, known at run time, with blocks: carry = one_block(rows, first, carry) for each.

    Args:
        size: int32 scalar.
        sizes: of blocks, descending, each a multiple of the last.
        one_block: gets the block's static number of rows and the int32 place of its first one, of `size`. The last one
            may reach beyond `size`, by less than the smallest rung.
        carry: any pytree.
    """
    # lax.div: of numbers that cannot be negative, Python's // is ten operations for one, and there are many of these loops.
    left = lax.div(size + sizes[-1] - 1, sizes[-1]) * sizes[-1]
    first = jnp.zeros_like(left)
    for rows in sizes:
        count = lax.div(left, rows)

        def step(i, carry, rows=rows, first=first):
            return one_block(rows, first + i * rows, carry)

        carry = lax.fori_loop(0, count, step, carry)
        first, left = first + count * rows, left - count * rows
    return carry


def keep_grouped(y_MD, group_sizes_e):
    """Zeroes the rows after the last group."""
    rows_M = jnp.arange(y_MD.shape[0])
    return jnp.where(rows_M[:, None] < group_sizes_e.sum(), y_MD, 0)


def cut(x_MD, at, rows: int):
    """`rows` rows from `at`."""
    return lax.dynamic_slice(x_MD, (at, 0), (rows, x_MD.shape[1]), allow_negative_indices=False)


def put(x_MD, part_bD, at):
    """x with part's rows from `at`, in x's dtype."""
    return lax.dynamic_update_slice(x_MD, part_bD.astype(x_MD.dtype), (at, 0), allow_negative_indices=False)


def expert_blocks(y_MD, padded_MD, weights, start, size, sizes: list[int], kept=(), branches: tuple[int, ...] = ()):
    """Runs one expert over the blocks of its own rows, `size` rows from `start`, and writes the results into y_MD.

    `sizes` are those of over_blocks. `kept` is empty, or two arrays [M, F] that gate and up are written into. Returns y_MD and kept.
    `branches` are sizes of blocks, ascending, the last at least `size`: then one block does it, of the first that is large
    enough, and there is no loop.
    """
    w_gate_DF, w_up_DF, w_down_FD = weights
    dtype = padded_MD.dtype

    def one_block(rows, first, carry):
        y_MD, kept = carry
        at = start + first
        rows_bD = cut(padded_MD, at, rows)
        gate_bF = matmul(rows_bD, w_gate_DF, (1, 0))
        up_bF = matmul(rows_bD, w_up_DF, (1, 0))
        hidden_bF = (jax.nn.silu(gate_bF) * up_bF).astype(dtype)
        if kept:
            kept = [put(all_MF, part_bF, at) for all_MF, part_bF in zip(kept, (gate_bF, up_bF), strict=True)]
        return put(y_MD, matmul(hidden_bF, w_down_FD, (1, 0)), at), kept

    carry = (y_MD, list(kept))
    if branches:
        choice = sum((size > rows).astype(jnp.int32) for rows in (0, *branches[:-1]))
        return lax.switch(choice, [lambda carry: carry, *(functools.partial(one_block, b, 0) for b in branches)], carry)
    return over_blocks(size, sizes, one_block, carry)


class Stacks(NamedTuple):
    """The expert weights of all layers, and which layer is meant: weights by reference, see `grouped_swiglu`."""

    w_gate_LeDF: jax.Array
    w_up_LeDF: jax.Array
    w_down_LeFD: jax.Array
    layer: jax.Array  # int32 scalar


def _expert(weights, e):
    """The three matrices of expert e: out of this layer's weights, or out of Stacks."""
    if not isinstance(weights, Stacks):
        return [lax.dynamic_index_in_dim(w, e, keepdims=False) for w in weights]
    *stacks, layer = weights

    def matrix(w):
        shape = w.shape[2:]
        return lax.dynamic_slice(w, (layer, e, 0, 0), (1, 1, *shape), allow_negative_indices=False).reshape(shape)

    return [matrix(w) for w in stacks]


def grouped_swiglu(
    x_MD, w_gate_eDF, w_up_eDF, w_down_eFD, group_sizes_e, block: int, keep: bool = False, stacks: Stacks | None = None
):
    """SwiGLU experts over grouped rows; see mixtral_jax.kernels for the signature.

    Args:
        x_MD: rows sorted by expert, float.
        w_gate_eDF, w_up_eDF, w_down_eFD: expert weights, in x's dtype.
        group_sizes_e: rows of each expert, int32; the sum may be less than M.
        block: rows of the largest block. Work is wasted only in an expert's last block.
        keep: store gate and up, [M, F] each in x's dtype, for the backward pass.
        stacks: the same weights again, as a part of all layers' stacks. They are read there, and the arguments above only
            receive the gradients: a layer's slice of a stack is then never copied out of it. No gradient flows to them.

    Returns:
        y_MD in x's dtype, zero after the last group.
    """
    return _grouped(x_MD, (w_gate_eDF, w_up_eDF, w_down_eFD), group_sizes_e, stacks, block, keep)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _grouped(x_MD, weights, group_sizes_e, stacks, block: int, keep: bool):
    return _run(x_MD, stacks or weights, group_sizes_e, block, keep=False)[0]


def _run(x_MD, weights, group_sizes_e, block: int, keep: bool):
    """The output, and the two kept arrays or none."""
    padded_MD = padded(x_MD, block)
    starts_e = jnp.cumsum(group_sizes_e) - group_sizes_e
    wide = (padded_MD.shape[0], weights[0].shape[-1])
    kept = [jnp.zeros(wide, x_MD.dtype) for _ in range(2)] if keep else []

    def one_expert(carry, inputs):
        e, start, size = inputs
        y_MD, kept = carry
        return expert_blocks(y_MD, padded_MD, _expert(weights, e), start, size, rungs(block), kept), None

    inputs = (jnp.arange(len(starts_e)), starts_e, group_sizes_e)
    (y_MD, kept), _ = lax.scan(one_expert, (jnp.zeros_like(padded_MD), kept), inputs)
    return keep_grouped(y_MD[: x_MD.shape[0]], group_sizes_e), kept


def _forward(x_MD, weights, group_sizes_e, stacks, block, keep):
    # Frozen weights (with LoRA) get no gradient: XLA would not see that nobody reads what the loops add up. The answer
    # goes to the backward pass as structure: an empty tuple or None.
    learn = () if any(w.perturbed for w in weights) else None
    values = jax.tree.map(lambda a: a.value, (x_MD, weights, group_sizes_e, stacks), is_leaf=_is_primal)
    x_MD, weights, group_sizes_e, stacks = values
    y_MD, kept = _run(x_MD, stacks or weights, group_sizes_e, block, keep)
    return y_MD, (x_MD, stacks or weights, group_sizes_e, kept, learn)


def _is_primal(leaf) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)


def _backward(block, keep, saved, dy_MD):
    x_MD, weights, group_sizes_e, kept, learn = saved
    m, dtype = x_MD.shape[0], x_MD.dtype
    if isinstance(dy_MD, jax.custom_derivatives.SymbolicZero):
        dy_MD = jnp.zeros(x_MD.shape, dtype)
    padded_MD, padded_dy_MD = padded(x_MD, block), padded(dy_MD, block)
    starts_e = jnp.cumsum(group_sizes_e) - group_sizes_e

    def one_expert(carry, inputs):
        e, start, size = inputs
        w_gate_DF, w_up_DF, w_down_FD = _expert(weights, e)

        def one_block(rows, first, carry):
            dx_MD, *grads = carry
            at = start + first
            rows_bD = cut(padded_MD, at, rows)
            # Rows past this expert's own belong to the next: their part of the weight gradients must vanish.
            mine_b = first + jnp.arange(rows) < size
            dy_bD = jnp.where(mine_b[:, None], cut(padded_dy_MD, at, rows), 0)
            if keep:
                gate_bF, up_bF = (cut(all_MF, at, rows).astype(jnp.float32) for all_MF in kept)
            else:
                gate_bF, up_bF = (matmul(rows_bD, w_DF, (1, 0)) for w_DF in (w_gate_DF, w_up_DF))
            silu_bF, slope_bF = silu_and_slope(gate_bF)
            dh_bF = matmul(dy_bD, w_down_FD, (1, 1))
            hidden_bF = (silu_bF * up_bF).astype(dtype)
            dg_bF = (dh_bF * up_bF * slope_bF).astype(dtype)
            du_bF = (dh_bF * silu_bF).astype(dtype)
            dx_bD = matmul(dg_bF, w_gate_DF, (1, 1)) + matmul(du_bF, w_up_DF, (1, 1))
            pairs = [(rows_bD, dg_bF), (rows_bD, du_bF), (hidden_bF, dy_bD)]
            if grads:
                grads = [d_w.at[e].add(matmul(*pair, (0, 0))) for d_w, pair in zip(grads, pairs, strict=True)]
            return put(dx_MD, dx_bD, at), *grads

        return over_blocks(size, rungs(block), one_block, carry), None

    # All experts' gradients in one carry: as outputs of the scan each would be filled with zeros and copied once more.
    shapes = [(len(starts_e), *w.shape[-2:]) for w in weights[:3]]
    zeros = [] if learn is None else [jnp.zeros(shape, jnp.float32) for shape in shapes]
    inputs = (jnp.arange(len(starts_e)), starts_e, group_sizes_e)
    (dx_MD, *grads), _ = lax.scan(one_expert, (jnp.zeros_like(padded_MD), *zeros), inputs)
    grads = None if learn is None else tuple(grad.astype(dtype) for grad in grads)
    return keep_grouped(dx_MD[:m], group_sizes_e), grads, None, None


_grouped.defvjp(_forward, _backward, symbolic_zeros=True)
