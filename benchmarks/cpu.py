"""Training, prefill, decoding and the expert layer on a CPU, beside transformers: same shape, batch and precision, in one run.

    .venv-parity/bin/python -m benchmarks.cpu [--cases=train,decode_1] [--peers=transformers-grouped_mm] [--rounds=7]

Every candidate is a process of its own (benchmarks/worker.py): they are warm, run one after the other in turns (A B A B ...), and
their peak memory is their own. The rate of a plain matmul and the bandwidth of a copy are measured in the same turns. Where
transformers is not installed, ours is measured alone. Writes results/DATE-cpu.json, .md and .png.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import version

import numpy as np
from matplotlib.figure import Figure

from benchmarks.common import RESULTS, write

SHAPE = dict(
    vocab_size=32000,
    num_layers=8,
    d_model=512,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    d_ff=1792,
    num_experts=8,
    experts_per_token=2,
    batch=4,
    seq_len=512,
    prompt=32,
    new_tokens=16,
    dtype="float32",
    moments="float32",
    remat="none",
    device="cpu",
)
SMALL = SHAPE | dict(
    vocab_size=512,
    num_layers=2,
    d_model=64,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    d_ff=128,
    seq_len=64,
    new_tokens=4,
)
OURS = "mixtral_jax"
PEERS = ("transformers-eager", "transformers-grouped_mm")
CASES = ("train", "moe_forward", "moe_train", "prefill", "decode_1", "decode_8", "decode_32")


class Candidate:
    """A worker process."""

    def __init__(self, case: str, name: str, shape: dict, environment: dict[str, str] | None = None):
        command = [sys.executable, "-m", "benchmarks.worker", case, name, json.dumps(shape)]
        self.name, self.seconds, self.peak, self.about = name, [], 0, {}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ready(self) -> float | None:
        """Waits until it is warm; seconds from its imports to the end of the first run, None if it cannot run."""
        found = self._line()
        if found is None:
            return None
        self.about = found
        return found["first_seconds"]

    def measure(self) -> None:
        """Runs it once."""
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        found = self._line()
        if found is None:
            raise SystemExit(f"{self.name} ended while it was measured")
        self.seconds.append(found["seconds"])
        self.peak = found["peak_bytes"]

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _line(self) -> dict | None:
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        return None


def useful_flops(case: str, shape: dict) -> float:
    """Floating-point operations of the maths in one run of a case: nothing that is computed twice or for nothing.

    2 per multiply-add of every active weight and token, attention's scores on average over half the context; three times
    that with gradients.
    """
    d, f, k, layers = shape["d_model"], shape["d_ff"], shape["experts_per_token"], shape["num_layers"]
    n, g, h = shape["num_heads"], shape["num_kv_heads"], shape["head_dim"]
    tokens = shape["batch"] * shape["seq_len"]
    experts = 3 * d * f * k + d * shape["num_experts"]
    if case.startswith("moe"):
        return 2.0 * tokens * experts * (3 if case == "moe_train" else 1)
    attention = 2 * d * n * h + 2 * d * g * h

    def forward(tokens: int, context: float, heads: int) -> float:
        return (
            2.0 * tokens * layers * (experts + attention + 2 * n * h * context) + 2.0 * heads * d * shape["vocab_size"]
        )

    if case == "train":
        return 3 * forward(tokens, shape["seq_len"] / 2, tokens)
    if case == "prefill":
        return forward(tokens, shape["seq_len"] / 2, shape["batch"])
    made = int(case.rpartition("_")[2]) * shape["new_tokens"]
    return forward(made, shape["prompt"] + shape["new_tokens"] / 2, made)


def unit_tokens(case: str, shape: dict) -> int:
    """Tokens of one run."""
    if case.startswith("decode"):
        return int(case.rpartition("_")[2]) * shape["new_tokens"]
    return shape["batch"] * shape["seq_len"]


def machine_rates(rounds: int) -> dict[str, float]:
    """The rate of a large float32 matmul in FLOP/s, and of a copy in bytes read and written per second; medians."""
    import jax

    square = jax.numpy.asarray(np.random.default_rng(0).standard_normal((2048, 2048)), "float32")
    matmul, source = jax.jit(jax.numpy.matmul), np.ones(64 * 2**20, np.float32)
    target = np.empty_like(source)
    jax.block_until_ready(matmul(square, square))
    rates: dict[str, list[float]] = {"matmul_flops": [], "copy_bytes": []}
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(matmul(square, square))
        rates["matmul_flops"].append(2 * 2048**3 / (time.perf_counter() - start))
        start = time.perf_counter()
        np.copyto(target, source)
        rates["copy_bytes"].append(2 * source.nbytes / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def measure(case: str, names: list[str], shape: dict, rounds: int) -> dict[str, dict]:
    """Measures the candidates of one case in turns."""
    started = [Candidate(case, name, shape) for name in names]
    found = {}
    try:
        warm = []
        for each in started:
            first = each.ready()
            if first is None:
                print(f"  {case}, {each.name}: does not run here")
                continue
            found[each.name] = {"first_seconds": first}
            warm.append(each)
        for _ in range(rounds):
            for each in warm:
                each.measure()
        for each in warm:
            tokens, flops = unit_tokens(case, shape), useful_flops(case, shape)
            middle = statistics.median(each.seconds)
            found[each.name] |= {
                "seconds": middle,
                "lowest": min(each.seconds),
                "highest": max(each.seconds),
                "tokens_per_second": tokens / middle,
                "useful_flops_per_second": flops / middle,
                "peak_bytes": each.peak,
            }
    finally:
        for each in started:
            each.close()
    return found


def rows_of(results: dict[str, dict], rates: dict[str, float]) -> list[list]:
    """The table: one row for each case and candidate."""
    rows = []
    for case, found in results.items():
        best = min((each["seconds"] for name, each in found.items() if name != OURS), default=None)
        for name, each in found.items():
            ratio = f"{best / each['seconds']:.2f}" if best and name == OURS else ""
            share = each["useful_flops_per_second"] / rates["matmul_flops"]
            rows.append(
                [
                    case,
                    name,
                    f"{each['seconds'] * 1e3:,.1f}",
                    f"{each['lowest'] * 1e3:,.1f} to {each['highest'] * 1e3:,.1f}",
                    f"{each['tokens_per_second']:,.1f}",
                    ratio,
                    f"{share:.0%}",
                    f"{each['peak_bytes'] / 1e9:.2f}",
                ]
            )
    return rows


def draw(results: dict[str, dict], rates: dict[str, float]) -> Figure:
    """Bars of the useful work per second of each case, under the matmul's rate."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(name for found in results.values() for name in found))
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        at = [i + (k - (len(names) - 1) / 2) * width for i in range(len(results))]
        values = [found.get(name, {}).get("useful_flops_per_second", 0) / 1e9 for found in results.values()]
        axes.bar(at, values, 0.92 * width, label=name)
    axes.axhline(rates["matmul_flops"] / 1e9, color="black", linestyle="--", label="a plain matmul")
    axes.set_xticks(range(len(results)), list(results))
    axes.set_ylabel("useful GFLOP/s")
    axes.set_yscale("log")
    axes.legend(frameon=False)
    return figure


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument(
        "--peers", default=",".join(PEERS), help="also transformers-batched_mm and transformers-compile"
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each candidate (default 7)")
    parser.add_argument(
        "--small", action="store_true", help="a tiny shape, to see that all candidates run; writes nothing"
    )
    arguments = parser.parse_args()
    unknown = set(arguments.cases.split(",")) - set(CASES)
    if unknown:
        parser.error(f"--cases: there is no {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    there = importlib.util.find_spec("transformers") and importlib.util.find_spec("torch")
    peers = [name for name in arguments.peers.split(",") if name] if there else []
    if not there:
        print("transformers and torch are not installed here: ours is measured alone (requirements-parity.txt)")
    shape = SMALL if arguments.small else SHAPE
    before = machine_rates(5)
    results = {}
    for case in arguments.cases.split(","):
        print(f"{case} ...", flush=True)
        results[case] = measure(case, [OURS, *peers], shape, arguments.rounds)
    after = machine_rates(5)
    rates = {name: max(before[name], after[name]) for name in before}
    columns = ["case", "what", "median ms", "range", "tokens/s", "times the best peer", "of the matmul rate", "peak GB"]
    table = rows_of(results, rates)
    if arguments.small:
        for row in (columns, *table):
            print(" | ".join(row))
        return
    versions = {name: version(name) for name in ("torch", "transformers") if importlib.util.find_spec(name)}
    about = {"results": results, "rates": rates, "load": os.getloadavg(), "shape": shape, "peers": versions}
    title = f"CPU, 214M parameters, float32; matmul {rates['matmul_flops'] / 1e9:.0f} GFLOP/s, copy {rates['copy_bytes'] / 1e9:.1f} GB/s"
    write("cpu", title, columns, table, about)
    newest = max(RESULTS.glob("*-cpu.json"))
    draw(results, rates).savefig(newest.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
