"""Few rows through experts that each row picks, for decoding on a GPU: a Pallas (Triton) kernel reads the index, then that expert.

The weights stay stacked, [E, D, F]; a slice by an index that is known at run time would be copied first, and branches over
separate arrays are a conditional each. A program multiplies one row by a strip of one expert's matrix; sums are float32.
On a CPU the same kernels are interpreted, for tests. Not measured yet: docs/gpu.md.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as triton_pallas

STRIP = 64  # columns of a program
DEPTH = 128  # rows of the matrix that are read at once
PART = 2048  # rows of the matrix of one program, where a strip alone would leave processors idle


def _fitting(n: int, most: int) -> int:
    """The largest power of two that divides n, at most `most`."""
    return min(n & -n, most)


def _hidden_kernel(index_ref, x_ref, gate_ref, up_ref, hidden_ref, *, k: int, depth: int, strip: int):
    """hidden[c, strip] of choice c: silu(x gate) * (x up) of its expert."""
    choice, columns = pl.program_id(0), pl.ds(pl.program_id(1) * strip, strip)
    expert, row = index_ref[choice], choice // k

    def add(i, sums):
        rows = pl.ds(i * depth, depth)
        x_d1 = x_ref[row, rows].astype(jnp.float32)[:, None]
        parts = (x_d1 * w_ref[expert, rows, columns].astype(jnp.float32) for w_ref in (gate_ref, up_ref))
        return tuple(total + part.sum(0) for total, part in zip(sums, parts, strict=True))

    zero = jnp.zeros((strip,), jnp.float32)
    gate_f, up_f = lax.fori_loop(0, x_ref.shape[1] // depth, add, (zero, zero))
    hidden_ref[choice, columns] = (gate_f * jax.nn.sigmoid(gate_f) * up_f).astype(hidden_ref.dtype)


def _down_kernel(index_ref, hidden_ref, down_ref, out_ref, *, depth: int, strip: int, part: int):
    """out[p, c, strip]: what part p of the rows of its expert's last matrix adds to choice c."""
    choice, columns, p = pl.program_id(0), pl.ds(pl.program_id(1) * strip, strip), pl.program_id(2)
    expert = index_ref[choice]

    def add(i, total_d):
        rows = pl.ds(p * part + i * depth, depth)
        h_f1 = hidden_ref[choice, rows].astype(jnp.float32)[:, None]
        return total_d + (h_f1 * down_ref[expert, rows, columns].astype(jnp.float32)).sum(0)

    out_ref[p, choice, columns] = lax.fori_loop(0, part // depth, add, jnp.zeros((strip,), jnp.float32))


def _call(kernel, out_shape, grid, interpret: bool):
    options = {} if interpret else {"compiler_params": triton_pallas.CompilerParams(num_warps=4, num_stages=2)}
    return pl.pallas_call(kernel, out_shape=out_shape, grid=grid, interpret=interpret, **options)


def _products(x_MD, index_C, w_gate_EDF, w_up_EDF, w_down_EFD, interpret: bool):
    (m, d), f, c = x_MD.shape, w_gate_EDF.shape[2], index_C.shape[0]
    strip, depth = _fitting(f, STRIP), _fitting(d, DEPTH)
    kernel = functools.partial(_hidden_kernel, k=c // m, depth=depth, strip=strip)
    hidden_CF = _call(kernel, jax.ShapeDtypeStruct((c, f), x_MD.dtype), (c, f // strip), interpret)(
        index_C, x_MD, w_gate_EDF, w_up_EDF
    )
    strip, part = _fitting(d, STRIP), _fitting(f, PART)
    kernel = functools.partial(_down_kernel, depth=_fitting(part, DEPTH), strip=strip, part=part)
    out = jax.ShapeDtypeStruct((f // part, c, d), jnp.float32)
    return _call(kernel, out, (c, d // strip, f // part), interpret)(index_C, hidden_CF, w_down_EFD).sum(0)


def swiglu(x_MD, gates_MK, index_MK, w_gate_EDF, w_up_EDF, w_down_EFD):
    """Sums gate * expert(row) over each row's experts. Forward only.

    Args:
        x_MD: one row for each token.
        gates_MK: float32.
        index_MK: expert 0..E-1 of each choice; E means none.
        w_gate_EDF, w_up_EDF, w_down_EFD: in x's dtype.

    Returns:
        out_MD in x's dtype; zero where no expert was chosen.
    """
    m, k = index_MK.shape
    e = w_gate_EDF.shape[0]
    gates_MK = jnp.where(index_MK < e, gates_MK, 0)
    index_C = jnp.minimum(index_MK, e - 1).reshape(-1)  # what has no expert reads one, and counts for nothing
    out_CD = lax.platform_dependent(
        *(x_MD, index_C, w_gate_EDF, w_up_EDF, w_down_EFD),
        cpu=functools.partial(_products, interpret=True),
        default=functools.partial(_products, interpret=False),
    )
    return (out_CD.reshape(m, k, -1) * gates_MK[..., None]).sum(1).astype(x_MD.dtype)
