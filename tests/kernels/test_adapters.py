"""Experts with adapters against the dense oracle, forward and backward; and the backward pass has no weight gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels import dense
from mixtral_jax.kernels.adapters import ExpertAdapters, grouped_swiglu_lora
from mixtral_jax.kernels.blocks import grouped_swiglu
from tests.kernels.test_grouped import GROUPS, D, E, F, M

R, SCALE = 3, 2.5
SHAPES = ExpertAdapters((E, D, R), (E, R, F), (E, D, R), (E, R, F), (E, F, R), (E, R, D))
NAMES = ["y", "dx", *ExpertAdapters._fields]


def inputs(dtype=jnp.float32):
    """x, weights, adapters, dy, and x's dtype everywhere but in the adapters: they are float32 masters."""
    rng = np.random.default_rng(0)
    x, *weights, dy = (
        jnp.asarray(rng.standard_normal(s), dtype) for s in ((M, D), (E, D, F), (E, D, F), (E, F, D), (M, D))
    )
    adapters = ExpertAdapters(*(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in SHAPES))
    return x, tuple(weights), adapters, dy


@functools.cache
def program(kernel, block):
    """Compiled once for all groups: the kernel and its gradients in x and the adapters."""

    @jax.jit
    def both(x, weights, adapters, dy, sizes):
        y, pull = jax.vjp(lambda x, adapters: kernel(x, weights, adapters, sizes, block, SCALE), x, adapters)
        dx, grads = pull(dy)
        return [y, dx, *grads]

    return both


def run(kernel, groups, block, dtype=jnp.float32):
    return program(kernel, block)(*inputs(dtype), jnp.asarray(groups, jnp.int32))


@pytest.mark.parametrize("block", [1, 8, 64])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
def test_the_kernel_equals_the_dense_oracle(groups, block):
    got, want = run(grouped_swiglu_lora, groups, block), run(dense.grouped_swiglu_lora, groups, block)
    for name, a, b in zip(NAMES, got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()), rtol=0, err_msg=name)
    assert not np.asarray(got[0][sum(groups) :]).any()
    assert not np.asarray(got[1][sum(groups) :]).any()


def test_the_oracle_equals_experts_with_merged_weights():
    x, weights, adapters, _ = inputs()
    pairs = zip(weights, adapters[0::2], adapters[1::2], strict=True)
    merged = [w + SCALE * jnp.einsum("eIR,eRO->eIO", a, b) for w, a, b in pairs]
    sizes = jnp.asarray(GROUPS["rows_left_over"], jnp.int32)
    want = dense.grouped_swiglu(x, *merged, sizes)
    got = dense.grouped_swiglu_lora(x, weights, adapters, sizes, 8, SCALE)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_without_a_delta_it_is_the_kernel_of_blocks_bit_by_bit(dtype):
    x, weights, adapters, _ = inputs(dtype)
    b_zero = {name: jnp.zeros_like(a) for name, a in adapters._asdict().items() if "_b_" in name}
    sizes = jnp.asarray(GROUPS["balanced"], jnp.int32)
    got = jax.jit(lambda: grouped_swiglu_lora(x, weights, adapters._replace(**b_zero), sizes, 8, SCALE))()
    want = jax.jit(lambda: grouped_swiglu(x, *weights, sizes, 8))()
    np.testing.assert_array_equal(got, want)


def test_bfloat16_stays_within_its_own_rounding_and_gradients_are_float32():
    """bf16 has 8 bits: a result may be off by a few of its steps (2^-8) of the scale; here two products follow each other."""
    exact = run(dense.grouped_swiglu_lora, GROUPS["balanced"], 8)
    for name, got, want in zip(
        NAMES, run(grouped_swiglu_lora, GROUPS["balanced"], 8, jnp.bfloat16), exact, strict=True
    ):
        assert got.dtype == (jnp.bfloat16 if name in ("y", "dx") else jnp.float32), name
        assert np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want) < 0.02, name


def shapes_of(text: str, operation: str) -> list[tuple[int, ...]]:
    """The shapes of the results of an operation in a jaxpr's text."""
    found = re.findall(rf":\w+\[([\d,]*)\] = {operation}\[", text)
    return [tuple(map(int, shape.split(","))) for shape in found]


def test_the_backward_pass_makes_no_weight_gradient():
    """No product and no buffer of D x F: the pass of the frozen kernel has 8 products with F and D, full training 3 + 8."""
    x, weights, adapters, dy = inputs()
    sizes = jnp.asarray(GROUPS["balanced"], jnp.int32)
    block = 8

    def frozen(x, weights, adapters):
        return (grouped_swiglu_lora(x, weights, adapters, sizes, block, SCALE) * dy).sum()

    def full(x, weights):
        return (grouped_swiglu(x, *weights, sizes, block) * dy).sum()

    lora = str(jax.make_jaxpr(jax.grad(frozen, argnums=(0, 2)))(x, weights, adapters))
    plain = str(jax.make_jaxpr(jax.grad(full, argnums=(0, 1)))(x, weights))
    wide = [(block, D), (block, F)]  # rows on the left: the products that read a weight, and what is R wide
    for shape in ((D, F), (F, D)):
        assert plain.count(f"f32[{shape[0]},{shape[1]}]") > 0
        assert shape in shapes_of(plain, "dot_general"), "the test must see it where there is one"
        assert shape not in shapes_of(lora, "dot_general")
        assert shape not in shapes_of(lora, "broadcast_in_dim")
        assert (E, *shape) not in shapes_of(lora, "broadcast_in_dim")
    # Of the products with rows in front: forward gate, up, down; backward gate, up, dh, and two of dx. Beside them, those
    # of the adapters that end in D or F: 3 forward, 2 + 3 backward (recomputed, and in the gradient of the input).
    assert sum(shape in wide for shape in shapes_of(lora, "dot_general")) == 3 + 5 + 3 + 2 + 3
