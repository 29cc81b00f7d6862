"""Finds the tiles of tokamax's kernels for the six products of an expert layer at Mixtral's width, on the GPU that is here.

    python -m benchmarks.tune --batch=2 --minutes=9 [--kernel=mosaic]

tokamax chooses among some hundred tilings by compiling and timing each; without that it takes one that is safe. What is found is
kept, product by product, in results/tokamax-DEVICE.json, so that a call that ran out of its minutes is simply made again. The
candidates mixtral_jax-tokamax_mosaic-tuned and mixtral_jax-tokamax_triton-tuned of benchmarks/gpu.py use the file.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.common import RESULTS, device_slug
from mixtral_jax.kernels.tokamax_gpu import OUTER, PLAIN, TRANSPOSED

KERNELS = {"mosaic": "mosaic_gpu", "triton": "triton", "xla": "xla"}


def products_of(shape: dict) -> dict[str, tuple]:
    """The products of a layer's forward and backward pass: name -> shapes of both operands, and what is contracted."""
    m = shape["batch"] * shape["seq_len"] * shape["experts_per_token"]
    d, f, e = shape["d_model"], shape["d_ff"], shape["num_experts"]
    return {
        "gate and up": ((m, d), (e, d, f), PLAIN),
        "down": ((m, f), (e, f, d), PLAIN),
        "d_hidden": ((m, d), (e, f, d), TRANSPOSED),
        "dx": ((m, f), (e, d, f), TRANSPOSED),
        "d_gate and d_up": ((m, d), (m, f), OUTER),
        "d_down": ((m, f), (m, d), OUTER),
    }


def bound(shape: dict, product: str, kernel: str):
    """One product as tokamax describes it, with real numbers and an even split of the rows."""
    from tokamax._src.ops.ragged_dot.api import IMPLEMENTATIONS  # its public call chooses the kernel itself

    a, b, numbers = products_of(shape)[product]
    m, e, dtype = a[0], shape["num_experts"], shape["dtype"]
    sizes_e = np.full(e, m // e, np.int32)
    keys = jax.random.split(jax.random.key(0))
    operands = [jax.random.normal(key, size).astype(dtype) for key, size in zip(keys, (a, b), strict=True)]
    return IMPLEMENTATIONS[KERNELS[kernel]].bind(
        *operands,
        group_sizes=jax.numpy.asarray(sizes_e),
        ragged_dot_dimension_numbers=numbers,
        preferred_element_type=jax.numpy.dtype(dtype),
    )


def path_of(device: str) -> Path:
    """Where a device's tiles are."""
    return RESULTS / f"tokamax-{device_slug(device)}.json"


def load(path: Path):
    """What has been found, a context for tokamax's calls; None without a file."""
    from tokamax import AutotuningResult

    return AutotuningResult.loads(path.read_text()) if path.exists() else None


def tune(shape: dict, kernel: str, path: Path, minutes: float) -> list[str]:
    """Tunes what is not in the file yet, until the minutes are over; returns the names of what is still missing."""
    from tokamax import autotune

    begun, found, missing = time.monotonic(), load(path), []
    known = {ba.autotuning_cache_key for ba, _ in found.data} if found else set()
    for name in products_of(shape):
        if time.monotonic() - begun > 60 * minutes:
            missing.append(name)
            continue
        call = bound(shape, name, kernel)
        if call.autotuning_cache_key in known:
            continue
        one = autotune([call], progress_bar=False)
        if not one.data:
            print(f"  {name}: no tiling of {kernel} ran here", flush=True)
            continue
        found = one if found is None else found | one
        path.write_text(found.dumps())
        print(f"  {name}: {len(one.data[0][1])} tilings tried, {time.monotonic() - begun:.0f} s", flush=True)
    return missing


def main() -> None:
    """Tunes and says what is left."""
    from absl import flags

    from benchmarks.gpu import shape_of

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2, help="rows of 4096 tokens (default 2, the layer's cases)")
    parser.add_argument("--minutes", type=float, default=9, help="no product is begun after that (default 9)")
    parser.add_argument("--kernel", choices=("mosaic", "triton"), default="mosaic")
    found = parser.parse_args()
    flags.FLAGS.mark_as_parsed()
    if jax.default_backend() != "gpu":
        raise SystemExit(f"jax finds no GPU here, it runs on {jax.devices()[0].device_kind}: there is nothing to tune")
    path = path_of(jax.devices()[0].device_kind)
    missing = tune(shape_of("moe_train", False, batch=found.batch), found.kernel, path, found.minutes)
    print(f"{path}: {'run this again for ' + ', '.join(missing) if missing else 'complete'}")


if __name__ == "__main__":
    main()
