"""Bytes by formula against those of compiled modules on 8 fake devices, in float32; and exact bytes of the state."""

import functools

import jax
import pytest

from mixtral_jax import memory
from mixtral_jax.plan import amounts, aot, hlo, result, traffic
from tests.helpers import tiny
from tests.plan import NODE


@functools.cache
def compiled(remat, **axes):
    """A tiny train step's formulas, collectives, account and abstract state."""
    config = tiny(**{f"mesh__{axis}": size for axis, size in axes.items()}, model__remat=remat)
    config = result.resolve(config, NODE)
    mesh, _ = aot.plan_mesh(config, NODE, jax.devices())
    lowered, like = aot.lower(config, mesh)
    account = aot.compile_step(lowered, "test", quiet=True)
    found = hlo.collectives(account.text, tuple(mesh.shape.values()), mesh.axis_names)
    return config, traffic.transfers(config), found, account, like


def by_formula(transfers, *names):
    return sum(one.bytes * one.times for one in transfers if one.name in names)


def in_module(found, place, kind, axes, least=0):
    """Bytes of collectives whose origin contains `place`; `least` leaves out counters and other small change."""
    return sum(
        one.bytes * one.times
        for one in found
        if place in one.name and one.kind == kind and one.axes == axes and one.bytes >= least
    )


@pytest.mark.parametrize("remat", ["full", "none"])
def test_experts_weights_and_tokens_are_exact(remat):
    _, transfers, found, *_ = compiled(remat, fsdp=2, expert=4)
    place = "experts/shard_map"
    assert in_module(found, place, "all-gather", ("fsdp",)) == by_formula(transfers, "expert weights") > 0
    assert in_module(found, place, "reduce-scatter", ("fsdp",)) == by_formula(transfers, "gradients of experts") > 0
    tokens = by_formula(transfers, "tokens to experts", "gates and choices")
    assert in_module(found, place, "all-gather", ("expert",)) == tokens > 0
    tokens = by_formula(transfers, "tokens from experts", "gradients of gates")
    assert in_module(found, place, "reduce-scatter", ("expert",)) == tokens > 0


def test_embedding_and_head_are_exact():
    _, transfers, found, *_ = compiled("full", fsdp=2, expert=4)
    ends = [one for one in found if "/while/" not in one.name]
    assert in_module(ends, "shard_map", "all-gather", ("fsdp",)) == by_formula(transfers, "embedding", "head") > 0
    scattered = sum(
        one.bytes * one.times for one in transfers if one.kind == "reduce-scatter" and "gradient of the" in one.name
    )
    assert in_module(ends, "shard_map", "reduce-scatter", ("fsdp",)) == scattered > 0


@pytest.mark.skipif(
    jax.version.__version_info__ >= (0, 11),
    reason="later partitioners gather elsewhere; plans compile with requirements-tpu.txt",
)
def test_attention_gathers_its_weights():
    """XLA gathers them once for both uses in the backward pass here, and once for each on TPUs, as the formula has it."""
    _, transfers, found, *_ = compiled("full", fsdp=2, expert=4)
    got = in_module(found, "attention/", "all-gather", ("fsdp",), least=1024)
    assert got == by_formula(transfers, "attention weights") * 2 / 3 > 0
    _, transfers, found, *_ = compiled("none", fsdp=2, expert=4)
    assert in_module(found, "attention/", "all-gather", ("fsdp",), least=1024) == by_formula(
        transfers, "attention weights"
    )


def test_context_and_gradients_over_data_are_exact():
    _, transfers, found, *_ = compiled("full", data=2, context=2, tensor=2)
    place = "attention/shard_map"
    got = in_module(found, place, "all-gather", ("context",), least=1024)
    assert got == by_formula(transfers, "keys and values") > 0
    got = in_module(found, place, "reduce-scatter", ("context",))
    assert got == by_formula(transfers, "gradients of keys and values") > 0
    got = in_module(found, "experts/shard_map", "all-reduce", ("data", "context"), least=1024)
    assert got == by_formula(transfers, "gradients of experts") > 0


@pytest.mark.parametrize("axes", [dict(fsdp=2, expert=4), dict(data=2, context=2, tensor=2)], ids=str)
def test_each_axis_is_near_the_whole_module(axes):
    """What is left is small, or XLA:CPU's own: sums that it scatters late, or over two axes one by one, and its top-k."""
    config, transfers, found, *_ = compiled("full", **axes)
    sizes = {axis: size for axis, size in vars(config.mesh).items() if size > 1}
    own = [one for one in found if "top_k" not in one.name]
    formula, module = amounts.by_axis(transfers, sizes), amounts.by_axis(own, sizes)
    for axis in sizes:
        assert formula[axis] == pytest.approx(module[axis], rel=0.25), axis


def test_the_state_is_exact_to_the_byte():
    """The compiler's arguments are the parameters, the moments, three counters and the batch, and nothing else."""
    config, _, _, account, like = compiled("full", fsdp=2, expert=4)
    state = memory.state_bytes(like)
    rows = result.by_formula(config, NODE, {axis: [1, 8] for axis in vars(config.mesh)}, result.shapes_of(config))
    rows = rows["hbm_bytes_per_device"]
    params = sum(size for name, size in state.items() if name.startswith("params"))
    assert rows["parameters"] == params
    assert rows["optimizer"] == sum(size for name, size in state.items() if name.startswith("opt_state"))
    assert 2 * params < rows["optimizer"] < 2 * params + 64, "two moments, and the counts of optax"
    assert rows["batch"] == 5 * 4 * config.train.batch_size * config.train.seq_len // 8
    scalars = account.memory["argument"] - rows["parameters"] - rows["optimizer"] - rows["batch"]
    assert scalars == 8, "step and skipped"


def test_receive_buffers():
    config = tiny(mesh__expert=4, mesh__fsdp=2, model__dispatch="ragged", model__buffer_factor=1.5, train__batch_size=8)
    share = 32 * 2 * 32 * 4  # a row of 32 tokens, 2 choices, D 32, float32
    got = traffic.receive_buffers(config)
    assert got == {"even_share": share, "configured": 1.5 * share, "dropless": 4 * share}
    whole = tiny(mesh__expert=8, mesh__fsdp=1, model__dispatch="ragged", train__batch_size=8)
    got = traffic.receive_buffers(whole)
    assert got["configured"] == got["dropless"] == 4 * share, "of one expert a token chooses it once"
    ring = tiny(mesh__expert=8, mesh__fsdp=1, model__dispatch="auto", model__buffer_factor=1.5, train__batch_size=8)
    got = traffic.receive_buffers(result.resolve(ring, NODE))
    assert got["configured"] == got["dropless"] == 8 * share, "the ring holds the rows of all and knows no bound"
    blocks = tiny(mesh__expert=8, mesh__fsdp=1, model__dispatch="ragged", model__buffer_factor=0.1, train__batch_size=8)
    rows = blocks.model.expert_block
    assert traffic.receive_buffers(blocks)["configured"] == rows * 32 * 4, "whole blocks, as the program has them"


def test_a_ragged_exchange_by_hand():
    """There and back, both again where the layer runs again, and backward: each time 7 of 8 devices' share of 64 rows."""
    for remat, passes in (("none", 4), ("full", 6)):
        config = tiny(mesh__expert=8, mesh__fsdp=1, model__dispatch="ragged", model__remat=remat, train__batch_size=8)
        (one,) = [one for one in traffic.transfers(config) if one.kind == "ragged-all-to-all"]
        assert one.times == passes * config.model.num_layers
        assert one.bytes == 64 * 32 * 4 * 7 / 8
