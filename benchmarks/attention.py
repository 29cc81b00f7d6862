"""Attention over long rows: time and peak memory of plain and chunked, forward and backward, on the processor at hand.

python -m benchmarks.attention [--lengths=1024,...,32768] [--limit_gib=12]

One row, float32, N 4, G 1, H 64, packed documents of 4,096 tokens or one document. Each case runs in a process of its own,
so that its peak memory (VmHWM, less that of the process once all is compiled) is its own; of small cases a part hides
under what the compiler took. A case whose scores alone would pass
the limit is not run.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import write
from mixtral_jax.models.attention import chunked, plain
from mixtral_jax.models.attention.plain import Places

N, G, H = 4, 1, 64
BACKENDS = {"plain": plain.attend, "chunked": chunked.attend}


def peak() -> int:
    """The process's largest resident memory so far, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def case(backend: str, t: int, document: int) -> tuple[float, float, float]:
    """Milliseconds of forward and of forward and backward (best of 3, of 1 for long rows), and the peak in MiB beyond the inputs."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, t, heads, H)), jnp.float32) for heads in (N, G, G))
    place = np.arange(t, dtype=np.int32)
    places = Places(jnp.asarray(place // document + 1)[None], jnp.asarray(place % document)[None], jnp.asarray(place))

    def loss(q, k, v):
        return (BACKENDS[backend](q, k, v, places, places, 0) * q).sum()

    runs = [jax.jit(f).lower(q, k, v).compile() for f in (loss, jax.grad(loss, argnums=(0, 1, 2)))]
    before, best = peak(), []
    for run in runs:
        seconds = []
        for _ in range(3 if t <= 2048 else 1):
            start = time.perf_counter()
            jax.block_until_ready(run(q, k, v))
            seconds.append(time.perf_counter() - start)
        best.append(min(seconds) * 1e3)
    return *best, (peak() - before) / 2**20


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384,32768")
    parser.add_argument("--limit_gib", type=float, default=12.0)
    parser.add_argument("--case", help="backend,T,document: one case, for the processes that this program starts")
    arguments = parser.parse_args()
    if arguments.case:
        backend, t, document = arguments.case.split(",")
        print(*case(backend, int(t), int(document)))
        return
    rows = []
    for t in map(int, arguments.lengths.split(",")):
        for documents, document in (("one", t), ("of 4,096", 4096)):
            if documents != "one" and t < 4 * document:
                continue
            for backend in BACKENDS:
                # Scores, weights and the gradients of both are alive at once.
                if backend == "plain" and 4 * 4 * N * t * t > arguments.limit_gib * 2**30:
                    rows.append([t, documents, backend, "not run", "not run", f"more than {4 * 4 * N * t * t >> 20:,}"])
                    continue
                command = [sys.executable, "-m", "benchmarks.attention", f"--case={backend},{t},{document}"]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                forward, both, mib = map(float, done.stdout.split())
                rows.append([t, documents, backend, f"{forward:,.0f}", f"{both:,.0f}", f"{mib:,.0f}"])
                print(*rows[-1], sep="\t", flush=True)
    columns = ["T", "documents", "backend", "forward ms", "forward + backward ms", "peak MiB beyond the inputs"]
    about = {"load": os.getloadavg(), "shape": {"B": 1, "N": N, "G": G, "H": H}}
    write("attention", "Attention over long rows, float32, N 4, G 1, H 64", columns, rows, about)


if __name__ == "__main__":
    main()
