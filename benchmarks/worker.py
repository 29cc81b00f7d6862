"""A process that measures one candidate on one case when it is told to; benchmarks/cpu.py and gpu.py start them.

    python -m benchmarks.worker CASE CANDIDATE SHAPE_JSON

It prints a line of JSON when it is warm, and one with seconds for each line `run` that it reads: of the second of two runs. A process for each candidate
keeps their memory and their threads apart: while one runs, the others wait in a read.
"""

import contextlib
import ctypes
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


def main() -> None:
    """Builds the candidate, warms it up, and serves."""
    case, candidate, shape = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    begun = time.perf_counter()
    run, peak, about = build(case, candidate, shape)
    run()
    first = time.perf_counter() - begun
    run()
    _say({"ready": True, "first_seconds": first, "start_peak_bytes": peak(), **about})
    give_back()
    forget_peak()
    for line in sys.stdin:
        if line.strip() != "run":
            break
        run()  # after a pause memory that was freed is gone from the machine, and its caches hold what others left
        start = time.perf_counter()
        run()
        _say({"seconds": time.perf_counter() - start, "peak_bytes": peak()})


def build(case: str, candidate: str, shape: dict) -> "tuple[Run, Callable[[], int], dict]":
    """Prepares a candidate in this process.

    Returns:
        what does the case once and waits for its end; the most memory so far, of the device where it has its own and of the
        process otherwise; and what is to be known of the device.
    """
    if candidate.startswith("mixtral_jax"):
        from benchmarks import ours as candidates
    else:
        from benchmarks import transformers_peer as candidates
    run = candidates.CASES[case](candidate, shape)
    return run, lambda: candidates.device_peak_bytes(shape) or peak_bytes(), candidates.about(shape)


def peak_bytes() -> int:
    """The most memory the process has had resident. (getrusage counts what its parent had when it was forked.)"""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def give_back() -> None:
    """What was freed after building and compiling is given back to the system, by every candidate alike."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def forget_peak() -> None:
    """The peak from here on: building and compiling are not counted with what runs then."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def tokens(shape: dict, rows: int, width: int) -> np.ndarray:
    """The same random tokens for all candidates: int32 [rows, width]."""
    return np.random.default_rng(0).integers(3, shape["vocab_size"], (rows, width)).astype(np.int32)


def documents_of(shape: dict) -> np.ndarray:
    """Lengths of the documents of the case `data`, the same for all candidates: 32 to two rows' length, together 8,192 rows."""
    longest = 2 * shape["seq_len"]
    count = 2 * shape["rows"] * shape["seq_len"] // (32 + longest)
    return np.random.default_rng(1).integers(32, longest, count)


def _say(what: dict) -> None:
    print(json.dumps(what), flush=True)


Run = Callable[[], object]

if __name__ == "__main__":
    main()
