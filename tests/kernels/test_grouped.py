"""Every backend against the dense oracle, forward and backward, whatever the groups; a GPU's kernels too where there is one."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.kernels import BACKENDS, blocks, chunks, tokamax_gpu, whole

M, D, F, E = 50, 16, 24, 4
GROUPS = {
    "balanced": [13, 12, 13, 12],
    "empty_experts": [0, 30, 0, 20],
    "one_expert": [0, 0, 50, 0],
    "first_expert": [50, 0, 0, 0],
    "rows_left_over": [5, 0, 9, 3],
    "no_rows": [0, 0, 0, 0],
}


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(M, D), (E, D, F), (E, D, F), (E, F, D), (M, D)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@functools.cache
def program(backend, block):
    """Compiled once for all groups: the kernel and its gradients."""

    @jax.jit
    def both(x, w_gate, w_up, w_down, dy, sizes):
        y, pull = jax.vjp(lambda *a: BACKENDS[backend](*a, sizes, block), x, w_gate, w_up, w_down)
        return [y, *pull(dy)]

    return both


def run(backend, groups, block, dtype=jnp.float32):
    return program(backend, block)(*inputs(dtype), jnp.asarray(groups, jnp.int32))


def assert_same(got, want):
    for name, a, b in zip(["y", "dx", "dw_gate", "dw_up", "dw_down"], got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()), rtol=0, err_msg=name)


@pytest.mark.parametrize("block", [1, 8, 64])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
def test_blocks_equal_dense(groups, block):
    assert_same(run("blocks", groups, block), run("dense", groups, block))


@functools.cache
def kept(block, keep):
    @jax.jit
    def both(x, w_gate, w_up, w_down, dy, sizes):
        layer = functools.partial(blocks.grouped_swiglu, block=block, keep=keep)
        y, pull = jax.vjp(lambda *a: layer(*a, sizes), x, w_gate, w_up, w_down)
        return [y, *pull(dy)]

    return both


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("sizes", [(353, 0, 90, 569), (1, 255, 257, 511), (1024, 0, 0, 0), (0, 31, 0, 700)])
def test_blocks_of_all_sizes_equal_dense(sizes, keep):
    """Blocks of 256 down to 32 rows; gate and up recomputed, or kept."""
    rng = np.random.default_rng(0)
    shapes = [(1024, D), (E, D, F), (E, D, F), (E, F, D), (1024, D)]
    arrays = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    groups = jnp.asarray(sizes, jnp.int32)
    assert_same(kept(256, keep)(*arrays, groups), program("dense", 0)(*arrays, groups))


def test_weights_read_out_of_all_layers_stacks_equal_those_given():
    """The second of three layers; the weights that are given are of no account, but theirs are the gradients."""
    x, *weights, dy = inputs()
    sizes = jnp.asarray(GROUPS["rows_left_over"], jnp.int32)
    stacks = blocks.Stacks(*(jnp.stack([w + 1, w, w - 1]) for w in weights), jnp.int32(1))
    elsewhere = [jnp.full_like(w, jnp.nan) for w in weights]

    @functools.partial(jax.jit, static_argnames="keep")
    def both(x, weights, stacks, keep):
        y, pull = jax.vjp(lambda x, *w: blocks.grouped_swiglu(x, *w, sizes, 8, keep, stacks), x, *weights)
        return [y, *pull(dy)]

    want = run("dense", GROUPS["rows_left_over"], 8)
    for keep in (False, True):
        assert_same(both(x, elsewhere, stacks, keep), want)


@pytest.mark.parametrize("sizes_of", [blocks.rungs, blocks.quarters])
@pytest.mark.parametrize("block", [512, 256, 64, 96, 160, 48, 8, 7, 1])
def test_blocks_cover_all_rows_and_less_than_one_smallest_block_more(block, sizes_of):
    """Each row once, in order, whatever the number of rows."""
    sizes = sizes_of(block)
    assert sizes[0] == block
    assert sizes == sorted(set(sizes), reverse=True)
    assert all(rows % sizes[-1] == 0 for rows in sizes)
    assert (
        block <= blocks.SMALLEST or block % blocks.SMALLEST or sizes_of is blocks.rungs or sizes[-1] == blocks.SMALLEST
    )

    @jax.jit
    def covered(size):
        def one_block(rows, first, carry):
            in_order, end = carry
            return in_order & (first == end), first + rows

        return blocks.over_blocks(size, sizes, one_block, (True, 0))

    for size in (0, 1, 5, 31, 32, 33, 353, 511, 512, 513, 1100):
        in_order, end = covered(jnp.int32(size))
        assert in_order
        assert size <= end < size + sizes[-1]


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
def test_megablox_equals_dense(groups):
    """The TPU's kernels, interpreted."""
    assert_same(run("megablox", groups, 8), run("dense", groups, 8))


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
def test_tokamax_equals_dense(groups):
    """On a CPU its XLA implementation stands in: what is tested is our side of the call."""
    pytest.importorskip("tokamax", reason="optional: pip install -r requirements-gpu.txt")
    assert_same(run("tokamax", groups, 8), run("dense", groups, 8))


@pytest.mark.skipif(importlib.util.find_spec("tokamax") is not None, reason="tokamax is here")
def test_tokamax_that_is_not_installed_is_explained():
    with pytest.raises(UserError, match=r"requirements-gpu\.txt"):
        run("tokamax", GROUPS["balanced"], 8)


def poisoned_products():
    """Grouped matmuls in plain jax that leave NaN in the rows after the last group, as a kernel may."""

    def member(rows, sizes_e):
        expert_M = jnp.searchsorted(jnp.cumsum(sizes_e), jnp.arange(rows), side="right")
        return (expert_M[:, None] == jnp.arange(E)[None, :]).astype(jnp.float32)

    def poison(y, sizes_e):
        return jnp.where(jnp.arange(y.shape[0])[:, None] < sizes_e.sum(), y, jnp.nan)

    return chunks.Products(
        dot=lambda x, w, s: poison(jnp.einsum("MD,eDF,Me->MF", x, w, member(len(x), s)), s),
        dot_transposed=lambda y, w, s: poison(jnp.einsum("MF,eDF,Me->MD", y, w, member(len(y), s)), s),
        add_outer=lambda total, x, y, s: total + jnp.einsum("MD,MF,Me->eDF", x, y, member(len(x), s)),
        outer=lambda x, y, s: jnp.einsum("MD,MF,Me->eDF", x, y, member(len(x), s)),
    )


@functools.cache
def chunked(chunk):
    @jax.jit
    def both(x, w_gate, w_up, w_down, dy, sizes):
        y, pull = jax.vjp(lambda *a: chunks.swiglu(*a, sizes, chunk, poisoned_products()), x, w_gate, w_up, w_down)
        return [y, *pull(dy)]

    return both


@pytest.mark.parametrize("chunk", [8, 64])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
def test_chunks_equal_dense_whatever_a_kernel_leaves_behind(groups, chunk):
    """Chunks of 8 rows cut the groups in many places; rows without an expert hold NaN on the way."""
    got = chunked(chunk)(*inputs(), jnp.asarray(groups, jnp.int32))
    assert_same(got, run("dense", groups, 8))


@functools.cache
def all_rows():
    @jax.jit
    def both(x, w_gate, w_up, w_down, dy, sizes):
        y, pull = jax.vjp(lambda *a: whole.swiglu(*a, sizes, poisoned_products()), x, w_gate, w_up, w_down)
        return [y, *pull(dy)]

    return both


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
def test_all_rows_at_once_equal_dense_whatever_a_kernel_leaves_behind(groups):
    got = all_rows()(*inputs(), jnp.asarray(groups, jnp.int32))
    assert_same(got, run("dense", groups, 8))


@pytest.mark.parametrize(("rows", "products"), [(64, 9), (65, 11)])
def test_few_rows_are_one_pass_that_recomputes_nothing(rows, products):
    """E D is 64: up to there 3 products forward and 6 backward; beyond, gate and up again (each loop's body is traced once)."""
    calls = []

    def counted(product):
        return lambda *a: (calls.append(1), product(*a))[1]

    by = chunks.Products(*map(counted, poisoned_products()))
    x, *weights, _ = inputs()
    x = jnp.resize(x, (rows, D))

    def loss(x, *weights):
        return tokamax_gpu.grouped_swiglu(x, *weights, jnp.full(E, 10, jnp.int32), 1, by).sum()

    jax.eval_shape(jax.grad(loss, argnums=range(4)), x, *weights)
    assert len(calls) == products


def test_an_expert_without_rows_has_no_gradient_whatever_the_kernel_says(monkeypatch):
    """tokamax's Triton kernel gives it that of the rows before its start."""
    monkeypatch.setattr(tokamax_gpu, "_ragged_dot", lambda a, b, sizes, *_, **__: jnp.full((E, D, F), jnp.nan))
    tokamax_gpu.products.cache_clear()
    x, y = jnp.ones((M, D)), jnp.ones((M, F))
    sizes = jnp.asarray(GROUPS["empty_experts"], jnp.int32)
    by = tokamax_gpu.products()
    for got in (by.outer(x, y, sizes), by.add_outer(jnp.zeros((E, D, F)), x, y, sizes)):
        assert [bool(jnp.isnan(one).any()) for one in got] == [False, True, False, True]
        assert not np.asarray(got[0]).any()
    tokamax_gpu.products.cache_clear()


def test_a_chunk_without_rows_is_not_run():
    """The count is dynamic: with 5 rows of 50 the products are called for one chunk of 8."""
    calls = []
    count = chunks.Products(
        dot=lambda x, w, s: (jax.debug.callback(lambda: calls.append(1)), poisoned_products().dot(x, w, s))[1],
        dot_transposed=poisoned_products().dot_transposed,
        add_outer=poisoned_products().add_outer,
    )
    x, *weights, _ = inputs()
    jax.jit(lambda s: chunks.swiglu(x, *weights, s, 8, count))(jnp.array([5, 0, 0, 0])).block_until_ready()
    jax.effects_barrier()
    assert len(calls) == 3, "gate, up and down of one chunk"


def test_megablox_in_several_chunks_equals_dense():
    """300 rows are three chunks of 128; a group lies across their borders."""
    rng = np.random.default_rng(0)
    shapes = [(300, D), (E, D, F), (E, D, F), (E, F, D), (300, D)]
    arrays = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    sizes = jnp.array([100, 0, 150, 20], jnp.int32)
    assert chunks.chunk_rows(300, 8) == 128
    assert_same(program("megablox", 8)(*arrays, sizes), program("dense", 8)(*arrays, sizes))


def test_dense_equals_a_loop_over_rows():
    x, w_gate, w_up, w_down, _ = (np.asarray(a, np.float64) for a in inputs())
    groups = GROUPS["rows_left_over"]
    want, row = np.zeros((M, D)), 0
    for expert, size in enumerate(groups):
        for _ in range(size):
            gate = x[row] @ w_gate[expert]
            want[row] = (gate / (1 + np.exp(-gate)) * (x[row] @ w_up[expert])) @ w_down[expert]
            row += 1
    np.testing.assert_allclose(run("dense", groups, 8)[0], want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("backend", ["blocks", "megablox"])
def test_rows_after_the_last_group_are_exactly_zero(backend):
    y, dx, *_ = run(backend, GROUPS["rows_left_over"], 8)
    assert not np.asarray(y[17:]).any()
    assert not np.asarray(dx[17:]).any()


@pytest.mark.parametrize("backend", ["blocks", "megablox"])
def test_bfloat16_stays_within_its_own_rounding(backend):
    """bf16 has 8 bits: a result may be off by a few of its steps (2^-8) of the scale."""
    exact = run("dense", GROUPS["balanced"], 8)
    for got, want in zip(run(backend, GROUPS["balanced"], 8, jnp.bfloat16), exact, strict=True):
        assert got.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)
        assert error < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("groups", [[200, 56, 0, 256], [0, 512, 0, 0]], ids=["imbalanced", "one_expert"])
def test_blocks_equal_dense_at_real_width(groups):
    """D 4096, F 14336: what is right at small sizes has been wrong at these elsewhere. Tolerance: 1e-4, because sums over
    14,336 products in float32 differ by the order of their terms."""
    d, f = 4096, 14336
    rng = np.random.default_rng(0)
    shapes = [(512, d), (4, d, f), (4, d, f), (4, f, d), (512, d)]
    x, w_gate, w_up, w_down, dy = (jnp.asarray(0.02 * rng.standard_normal(s, np.float32)) for s in shapes)
    sizes = jnp.asarray(groups, jnp.int32)
    results = []
    for backend in ("dense", "blocks"):

        def both(x, *weights, backend=backend):
            y, pull = jax.vjp(lambda *a: BACKENDS[backend](*a, sizes, 128), x, *weights)
            return y, pull(dy)

        results.append(jax.tree.leaves(jax.jit(both)(x, w_gate, w_up, w_down)))
    for want, got in zip(*results, strict=True):
        assert float(jnp.abs(got - want).max() / jnp.abs(want).max()) < 1e-4
