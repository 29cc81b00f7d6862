"""How tokens travel to the shards of `expert`, inside one shard_map: around a ring, or by a ragged all-to-all.

`ring` gathers the tokens of all shards, lets each shard run its own experts on the rows that chose them, and
reduce-scatters the sums: n / K times the traffic of `ragged` on n shards, in two collectives that are fast everywhere.
`ragged` sends each row to the one shard that owns its expert, and its result back.

A ragged exchange moves one slice of rows for each pair of a source shard and a global expert. Rows leave sorted by
expert, and each slice is written where its expert's rows belong in the receiver's buffer, so that what arrives is
grouped already: nothing is sorted, or even copied, at the receiver.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

AXIS = "expert"


class Slices(NamedTuple):
    """What one shard says to an exchange, int32: one entry for each slice, the slices of destination 0 first.

    The names and meanings are those of jax.lax.ragged_all_to_all.
    """

    input_offsets: jax.Array  # where each slice starts in this shard's operand
    send_sizes: jax.Array  # its rows
    output_offsets: jax.Array  # where it goes in its receiver's buffer
    recv_sizes: jax.Array  # rows of each slice that arrives here, the slices of source 0 first


class Plan(NamedTuple):
    """An exchange, the same one backwards, and what arrives: rows of each local expert."""

    there: Slices
    back: Slices
    group_sizes_e: jax.Array


def buffer_rows(tokens: int, k: int, shards: int, e: int, factor: float, block: int) -> int:
    """Rows of one shard's receive buffer.

    Args:
        tokens: tokens of one shard.
        k: experts per token.
        shards: shards of the expert axis.
        e: experts of one shard.
        factor: model.buffer_factor; 0 leaves room for all that can come.
        block: what the bounded buffer is rounded up to, so that tiny batches lose nothing to the bound.

    Returns:
        shards * tokens * min(k, e), the worst case (a token never sends two rows to one expert); or, where that is less,
        factor times the even share tokens * k, rounded up to whole blocks.
    """
    worst = shards * tokens * min(k, e)
    if factor == 0:
        return worst
    share = -(-int(factor * 2**20) * tokens * k // 2**20)  # in integers: 1.1 * 10 is 11.000000000000002 in floats
    return min(worst, -(-share // block) * block)


def kept_rows(counts_SE, capacity: int, shards: int):
    """Bounds what each shard receives; what comes first, by source shard and then by expert, stays.

    Args:
        counts_SE: rows that each source has for each global expert, int32.
        capacity: rows of a receive buffer.
        shards: number of shards S; shard d owns the experts d * E / S onwards.

    Returns:
        kept_SE, int32: of the rows of source s for expert e the first kept_SE[s, e] are sent.
    """
    counts_SSe = counts_SE.reshape(shards, shards, -1)  # source, destination, local expert
    arrivals_SSe = counts_SSe.swapaxes(0, 1)  # destination first
    flat = arrivals_SSe.reshape(shards, -1)
    before = jnp.cumsum(flat, axis=1) - flat
    kept = jnp.clip(capacity - before, 0, flat)
    return kept.reshape(arrivals_SSe.shape).swapaxes(0, 1).reshape(counts_SE.shape)


def plan(group_sizes_E, capacity: int) -> Plan:
    """Plans the exchange of rows that are sorted by global expert. Call it inside shard_map.

    Args:
        group_sizes_E: this shard's rows for each global expert, int32.
        capacity: rows of a receive buffer.
    """
    shards, me = lax.axis_size(AXIS), lax.axis_index(AXIS)
    counts_SE = lax.all_gather(group_sizes_E, AXIS)
    kept_SE = kept_rows(counts_SE, capacity, shards)
    sorted_at_SE = jnp.cumsum(counts_SE, axis=1) - counts_SE
    # At a destination rows lie by expert, and those of one expert by source.
    kept_SSe = kept_SE.reshape(shards, shards, -1)
    total_Se = kept_SSe.sum(0)
    expert_at_Se = jnp.cumsum(total_Se, axis=1) - total_Se
    arrive_at_SSe = expert_at_Se[None] + jnp.cumsum(kept_SSe, axis=0) - kept_SSe
    mine = kept_SSe[:, me].reshape(-1)  # by source, then by my experts
    there = Slices(sorted_at_SE[me], kept_SE[me], arrive_at_SSe[me].reshape(-1), mine)
    sorted_at_SSe = sorted_at_SE.reshape(kept_SSe.shape)
    back = Slices(arrive_at_SSe[:, me].reshape(-1), mine, sorted_at_SSe[:, me].reshape(-1), kept_SE[me])
    return Plan(there, back, total_Se[me])


def _emulated(operand_MD, output_RD, input_offsets, send_sizes, output_offsets, recv_sizes):
    """lax.ragged_all_to_all for XLA:CPU, which lacks it: all-gather, then each row picks its source.

    It is stricter than the original, whose behaviour is undefined where slices disagree or reach over an end: such a
    result is all NaN.
    """
    operand_SMD = lax.all_gather(operand_MD, AXIS)
    shards, m, d = operand_SMD.shape
    # What the sources say about the slices that come here.
    come_from, sizes, arrive_at = (
        lax.all_to_all(a, AXIS, 0, 0, tiled=True) for a in (input_offsets, send_sizes, output_offsets)
    )
    source = jnp.repeat(jnp.arange(shards), sizes.shape[0] // shards)
    row_R = jnp.arange(output_RD.shape[0])[:, None]
    hit_Rs = (row_R >= arrive_at[None]) & (row_R < (arrive_at + sizes)[None])
    # Rows of the gathered operands, seen as one long array.
    from_R = jnp.where(hit_Rs, (source * m + come_from - arrive_at)[None] + row_R, 0).sum(1)
    rows_RD = jnp.where(hit_Rs.any(1)[:, None], operand_SMD.reshape(shards * m, d)[from_R], output_RD)
    fits = (arrive_at + sizes <= output_RD.shape[0]) & (come_from + sizes <= m) & (sizes == recv_sizes)
    valid = fits.all() & (hit_Rs.sum(1) <= 1).all()
    return rows_RD + jnp.where(valid, 0.0, jnp.nan).astype(rows_RD.dtype)


def _ragged_all_to_all(operand_MD, rows: int, slices: Slices):
    # Zeros that seem to depend on the data: differentiating a scan keeps plain zeros, R x D, as a residual of its layers.
    zero = (slices.send_sizes[0] * 0).astype(operand_MD.dtype)
    output_RD = jnp.broadcast_to(zero, (rows, operand_MD.shape[1]))
    # Chosen when the program is lowered, for the platform it is lowered for: a CPU host may compile for a TPU.
    return lax.platform_dependent(
        operand_MD, output_RD, *slices, cpu=_emulated, default=functools.partial(lax.ragged_all_to_all, axis_name=AXIS)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def exchange(x_MD, rows: int, there: Slices, back: Slices):
    """Moves rows between the shards of `expert`; its gradient is the exchange backwards. Call it inside shard_map.

    Args:
        x_MD: this shard's rows.
        rows: rows of the result.
        there: the slices to move.
        back: the slices of the way back; a row that does not travel gets no gradient.

    Returns:
        y_RD with `rows` rows in x's dtype; zero where nothing arrived.
    """
    return _ragged_all_to_all(x_MD, rows, there)


def _exchange_forward(x_MD, rows, there, back):
    # The number of rows to return to is static, and residuals are arrays: an empty one carries it.
    return _ragged_all_to_all(x_MD, rows, there), (jnp.zeros((x_MD.shape[0], 0)), back)


def _exchange_backward(rows, saved, dy_RD):
    del rows
    like_M0, back = saved
    return _ragged_all_to_all(dy_RD, like_M0.shape[0], back), None, None


exchange.defvjp(_exchange_forward, _exchange_backward)


def ragged(rows_MD, group_sizes_E, capacity: int, multiply: Callable):
    """Sends rows to their experts and the results back. Call it inside shard_map.

    Args:
        rows_MD: rows sorted by global expert; rows after the last group stay here.
        group_sizes_E: int32.
        capacity: rows of the receive buffer; what does not fit is dropped.
        multiply: (rows_RD, group_sizes_e) -> rows_RD, this shard's experts.

    Returns:
        y_MD at the rows' old places, zero for rows that stayed or were dropped; the rows computed here, int32.
    """
    there, back, group_sizes_e = plan(group_sizes_E, capacity)
    with jax.named_scope("to_experts"):
        received_RD = exchange(rows_MD, capacity, there, back)
    received_RD = multiply(received_RD, group_sizes_e)
    with jax.named_scope("from_experts"):
        return exchange(received_RD, rows_MD.shape[0], back, there), group_sizes_e.sum()
