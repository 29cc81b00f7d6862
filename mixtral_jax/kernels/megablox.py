"""The TPU's grouped matmul: jax's megablox kernels (Pallas), in chunks. On a CPU the same kernels are interpreted.

Interpretation is chosen when the program is lowered, so that a CPU host can compile for TPUs. It is slow: for tests.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from mixtral_jax.kernels.chunks import Products, chunk_rows, swiglu

# Rows, contracted width and output width of one tile. With bfloat16 and double buffers 9 to 13 MiB of the 16 MiB of VMEM
# that a kernel gets by default; float32 tiles are half as wide. tgmm writes float32 and reads what it adds to.
TILES = {"gmm": (512, 1024, 1024), "tgmm": (512, 512, 1024)}


def _tiling(kernel: str, rows: int, widths: tuple[int, int], dtype) -> tuple[int, int, int]:
    tile_rows, *tile_widths = TILES[kernel]
    if rows % tile_rows:
        tile_rows = 128  # chunks are whole tiles of 128
    scale = jnp.dtype(dtype).itemsize // 2 or 1
    return tile_rows, *(min(tile // scale, width) for tile, width in zip(tile_widths, widths, strict=True))


def _interpreted_on_cpu(kernel, *arrays, **options):
    # The kernels compute their metadata with rank promotion, which our tests forbid.
    with jax.numpy_rank_promotion("allow"):
        branches = [functools.partial(kernel, interpret=interpret, **options) for interpret in (True, False)]
        return lax.platform_dependent(*arrays, cpu=branches[0], default=branches[1])


def _kernels():
    """gmm and tgmm, imported where they are used: every command would take 0.15 s longer to start and keep 6 MB more."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

    return gmm, tgmm


def _gmm(x_MD, w_eDF, group_sizes_e, transpose_rhs=False):
    widths = w_eDF.shape[:0:-1] if transpose_rhs else w_eDF.shape[1:]
    return _interpreted_on_cpu(
        _kernels()[0],
        x_MD,
        w_eDF,
        group_sizes_e,
        preferred_element_type=x_MD.dtype,
        tiling=_tiling("gmm", x_MD.shape[0], widths, x_MD.dtype),
        transpose_rhs=transpose_rhs,
    )


def _add_tgmm(total_eDF, x_MD, y_MF, group_sizes_e):
    _, tgmm = _kernels()

    def add(x_DM, y_MF, group_sizes_e, total_eDF, interpret):
        return tgmm(x_DM, y_MF, group_sizes_e, jnp.float32, tiling, existing_out=total_eDF, interpret=interpret)

    tiling = _tiling("tgmm", x_MD.shape[0], total_eDF.shape[1:], x_MD.dtype)
    return _interpreted_on_cpu(add, x_MD.swapaxes(0, 1), y_MF, group_sizes_e, total_eDF)


PRODUCTS = Products(_gmm, functools.partial(_gmm, transpose_rhs=True), _add_tgmm)


def grouped_swiglu(x_MD, w_gate_eDF, w_up_eDF, w_down_eFD, group_sizes_e, block: int):
    """SwiGLU experts over grouped rows; see mixtral_jax.kernels for the signature and chunks.py for what is kept.

    Args and returns as `chunks.swiglu`; a chunk has 16 blocks.
    """
    chunk = chunk_rows(x_MD.shape[0], block)
    return swiglu(x_MD, w_gate_eDF, w_up_eDF, w_down_eFD, group_sizes_e, chunk, PRODUCTS)
