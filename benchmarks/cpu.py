"""Training, prefill, decoding and the expert layer on a CPU, beside transformers: same shape, batch and precision, in one run.

    .venv-parity/bin/python -m benchmarks.cpu [--cases=train,decode_1] [--peers=transformers-grouped_mm] [--rounds=7]

Every candidate is a process of its own (benchmarks/worker.py): they are warm, run one after the other in turns (A B A B ...), twice
in each turn, of which the second run counts, for in a run's own use nothing pauses before a step; and
their peak memory is their own. Training is measured beside one peer at a time, for the sake of the machine's memory. In the same turns run a plain matmul, 2048^3 in XLA, and a matrix of 256 MB times a vector, which are the roof.
All have the huge pages that train.py asks for (mixtral_jax/host_memory.py). A candidate that does not run here is named with
its reason. Writes results/DATE-cpu-CPU.json, .md and .png; cases that are measured later on the same day are added.

The case `startup` is another kind: seconds from the start of a process to the end of its first step of configs/tiny.py, with an
empty cache of compiled programs and with a full one, beside a script with torch and transformers.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.common import RESULTS, stem, write
from mixtral_jax import host_memory

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
    batches=256,  # of the case `data`, in one run
    rows=8192,  # that its file fills
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
    batches=4,
    rows=64,
)
OURS = "mixtral_jax"
PEERS = ("transformers-eager", "transformers-grouped_mm", "transformers-batched_mm", "transformers-compile")
CASES = ("train", "moe_forward", "moe_train", "prefill", "decode_1", "decode_8", "decode_32", "data")
READERS = ("transformers-dataloader",)  # the case `data` has peers of its own
# Cases whose candidates take 5 GB each: more than two of them at a time leave the kernel no huge pages to give.
PAIRED = ("train",)
ROOF = ("matmul", "read")
SQUARE, READ = 2048, 2**28
MOST_BYTES = 8e9  # that a candidate may copy in a layer
WAIT_SECONDS = 240  # for a candidate to be warm


class Candidate:
    """A worker process."""

    def __init__(self, case: str, name: str, shape: dict, environment: dict[str, str] | None = None):
        command = [sys.executable, "-m", "benchmarks.worker", case, name, json.dumps(shape)]
        self.name, self.seconds, self.peak, self.about = name, [], 0, {}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- closed with the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment
        )

    def ready(self) -> float | None:
        """Waits until it is warm; seconds from its imports to the end of the first run, None if it cannot run."""
        found = self._line()
        if found is None:
            return None
        self.about = found
        return found["first_seconds"]

    def reason(self) -> str:
        """The last line of what it said before it ended."""
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it ended without a word"

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
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

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
    if case == "data":
        return 0.0
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
    return shape["batch"] * shape["seq_len"] * (shape["batches"] if case == "data" else 1)


def least_bytes(case: str, shape: dict) -> float:
    """Bytes that must move between memory and the processor in one run of a case: weights, and what is read or written of them.

    Forward: every weight that is used once; with gradients they are read once more and written as gradients, and AdamW
    reads and writes the parameters and both moments and reads the gradients (7 passes). Decoding reads the weights of the
    experts that uniform routing hits on average, and the head, for every token. Activations are left out: at these shapes
    they are a small part, and how much of them stays in caches is the implementation's affair. float32.
    """
    d, f, k, layers = shape["d_model"], shape["d_ff"], shape["experts_per_token"], shape["num_layers"]
    n, g, h, e = shape["num_heads"], shape["num_kv_heads"], shape["head_dim"], shape["num_experts"]
    expert, attention, head = 3 * d * f, 2 * d * n * h + 2 * d * g * h, d * shape["vocab_size"]
    if case.startswith("moe"):
        return 4.0 * e * expert * (3 if case == "moe_train" else 1)
    if case == "train":
        return 4.0 * (layers * (e * expert + attention) * 10 + head * 10 + head * 7)
    rows = int(case.rpartition("_")[2]) if case.startswith("decode") else shape["batch"] * shape["seq_len"]
    hit = e * (1 - (1 - k / e) ** rows)
    steps = shape["new_tokens"] if case.startswith("decode") else 1
    return 4.0 * steps * (layers * (hit * expert + attention) + head)


def measure(case: str, names: list[str], shape: dict, rounds: int) -> dict[str, dict]:
    """Measures the candidates of one case in turns, and the roof with them.

    Returns:
        name -> seconds, quartiles, tokens and useful FLOPs per second, the peak memory; or why it does not run. And
        "roof" -> the matmul's FLOP/s and the bytes per second that a matrix-vector product reads.
    """
    environment = {**os.environ, host_memory.VARIABLE: host_memory.HUGE_PAGES}
    found: dict[str, dict] = {name: {"reason": too_large(name, case, shape)} for name in names}
    found = {name: each for name, each in found.items() if each["reason"]}
    started = [Candidate(case, name, shape, environment) for name in names if name not in found]
    roof = {name: Candidate(name, OURS, shape | {"square": SQUARE, "copied": READ}, environment) for name in ROOF}
    try:
        warm = []
        for each in (*started, *roof.values()):
            first = each.ready()
            if first is None:
                found[each.name] = {"reason": each.reason()}
                print(f"  {case}, {each.name} does not run here: {each.reason()}")
            else:
                warm.append((each, first))
        for _ in range(rounds):
            for each, _ in warm:
                each.measure()
        for each, first in warm:
            if each in started:
                found[each.name] = _figures(each, first, case, shape)
        found["roof"] = {
            "matmul_flops": 2 * SQUARE**3 / statistics.median(roof["matmul"].seconds),
            "read_bytes": READ / statistics.median(roof["read"].seconds),
        }
    finally:
        for each in (*started, *roof.values()):
            each.close()
    return found


def measure_in_pairs(case: str, names: list[str], shape: dict, rounds: int) -> dict[str, dict]:
    """As `measure`, ours beside one peer after the other; ours and the roof are of the pair with the smallest ratio."""
    if len(names) == 1:
        return measure(case, names, shape, rounds)
    pairs = {peer: measure(case, [names[0], peer], shape, rounds) for peer in names[1:]}
    ratios = {peer: pair[peer]["seconds"] / pair[OURS]["seconds"] for peer, pair in pairs.items() if peer in ran(pair)}
    chosen = pairs[min(ratios, key=ratios.get) if ratios else names[1]]
    found = {OURS: chosen[OURS], "roof": chosen["roof"]}
    for peer, pair in pairs.items():
        found[peer] = pair[peer] | ({"ours_beside_it_seconds": pair[OURS]["seconds"]} if peer in ratios else {})
    return found


def too_large(name: str, case: str, shape: dict) -> str:
    """Why a candidate is not even started, or nothing: batched_mm copies an expert's weights for every token and choice.

    One that runs out of memory would also spoil the figures of those beside it: what the kernel takes from their libraries'
    pages then no longer counts with their memory.
    """
    tokens = unit_tokens(case, shape)
    if case.startswith("decode"):
        tokens = tokens // shape["new_tokens"] * shape["prompt"]  # the prompts are read at once
    copied = 12.0 * tokens * shape["experts_per_token"] * shape["d_model"] * shape["d_ff"]
    if not name.endswith("batched_mm") or copied < MOST_BYTES:
        return ""
    return (
        f"it would copy weights for every token, {copied / 1e9:.0f} GB a layer, and {MOST_BYTES / 1e9:.0f} are allowed"
    )


def _figures(each: Candidate, first: float, case: str, shape: dict) -> dict[str, float]:
    middle = statistics.median(each.seconds)
    low, _, high = (
        statistics.quantiles(each.seconds, n=4, method="inclusive") if len(each.seconds) > 1 else [middle] * 3
    )
    return {
        "first_seconds": first,
        "seconds": middle,
        "quartiles": [low, high],
        "rounds": len(each.seconds),
        "tokens_per_second": unit_tokens(case, shape) / middle,
        "useful_flops_per_second": useful_flops(case, shape) / middle,
        "peak_bytes": each.peak,
        "peak_bytes_with_start": max(each.peak, each.about["start_peak_bytes"]),
    }


def ran(found: dict[str, dict]) -> dict[str, dict]:
    """The candidates of a case that ran."""
    return {name: each for name, each in found.items() if "seconds" in each}


def rows_of(results: dict[str, dict], shape: dict = SHAPE) -> list[list]:
    """The table: one row for each case and candidate."""
    rows = []
    for case, found in results.items():
        here = ran(found)
        peers = [each for name, each in here.items() if name != OURS]
        mine = here.get(OURS, {}).get("seconds")
        best = min((each["seconds"] / each.get("ours_beside_it_seconds", mine) for each in peers), default=None)
        for name, each in found.items():
            if name == "roof":
                continue
            if "reason" in each:
                rows.append([case, name, f"does not run: {each['reason'][:90]}", *[""] * 7])
                continue
            ratio = f"{best:.2f}" if best and name == OURS else ""
            share = each["useful_flops_per_second"] / found["roof"]["matmul_flops"]
            reads = least_bytes(case, shape) / each["seconds"] / found["roof"]["read_bytes"]
            low, high = each["quartiles"]
            rows.append(
                [
                    case,
                    name,
                    f"{each['seconds'] * 1e3:,.1f}",
                    f"{low * 1e3:,.1f} to {high * 1e3:,.1f}",
                    f"{each['tokens_per_second']:,.1f}",
                    ratio,
                    f"{share:.0%}" if share else "",
                    f"{reads:.0%}" if case.startswith("decode") else "",
                    f"{each['peak_bytes'] / 1e9:.2f}",
                    f"{each['peak_bytes_with_start'] / 1e9:.2f}",
                ]
            )
    return rows


COLUMNS = [
    *("case", "what", "median ms", "quartiles", "tokens/s", "times the best peer", "of the matmul rate"),
    "weights read, of the bandwidth",
    *("peak GB", "peak GB with the start"),
]


def draw(results: dict[str, dict], shape: dict) -> Figure:
    """The roofline: useful FLOP/s of each case over its FLOPs per byte that must move; ours and the best peer."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    flops = statistics.median(found["roof"]["matmul_flops"] for found in results.values())
    read = statistics.median(found["roof"]["read_bytes"] for found in results.values())
    x = np.geomspace(0.2, 2000, 200)
    axes.plot(
        x,
        np.minimum(flops, read * x) / 1e9,
        color="black",
        label=f"matmul {flops / 1e9:.0f} GFLOP/s, reading {read / 1e9:.0f} GB/s",
    )
    for i, (case, found) in enumerate(results.items()):
        if not useful_flops(case, shape):
            continue
        at = useful_flops(case, shape) / least_bytes(case, shape)
        here = ran(found)
        peers = [each for name, each in here.items() if name != OURS]
        if OURS in here:
            axes.plot(at, here[OURS]["useful_flops_per_second"] / 1e9, "o", color="tab:blue")
            side = (8, -14 if i % 4 == 3 else -4) if i % 2 else (-8, -4)  # neighbours do not cover each other
            place = (at, here[OURS]["useful_flops_per_second"] / 1e9)
            axes.annotate(case, place, side, textcoords="offset points", ha="left" if i % 2 else "right")
        if peers:
            axes.plot(at, max(each["useful_flops_per_second"] for each in peers) / 1e9, "x", color="tab:red")
    axes.plot([], [], "o", color="tab:blue", label=OURS)
    axes.plot([], [], "x", color="tab:red", label="the best of transformers")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="useful FLOPs for each byte of weights that must move",
        ylabel="useful GFLOP/s",
    )
    axes.legend(frameon=False, loc="lower right")
    return figure


def earlier(path: Path, shape: dict) -> dict[str, dict]:
    """The cases that were measured before on the same day, of the same shape."""
    if not path.exists():
        return {}
    record = json.loads(path.read_text())
    return record.get("results", {}) if record.get("shape") == shape else {}


def startup(rounds: int) -> dict[str, dict]:
    """Seconds from a process's start to the end of its first step: ours with an empty and a full cache, and the peer."""
    found: dict[str, list[float]] = {
        "train.py, nothing compiled before": [],
        "train.py, compiled before": [],
        "transformers": [],
    }
    peer = importlib.util.find_spec("transformers") and importlib.util.find_spec("torch")
    with tempfile.TemporaryDirectory() as folder:
        caches = [Path(folder) / f"cache{i}" for i in range(rounds)]
        _first_step(Path(folder) / "warm", caches[0] / "other")  # the corpus and the tokenizer are there from here on
        for i, cache in enumerate(caches):
            found["train.py, nothing compiled before"].append(_first_step(Path(folder) / f"cold{i}", cache))
            found["train.py, compiled before"].append(_first_step(Path(folder) / f"warm{i}", cache))
            if peer:
                found["transformers"].append(_first_peer_step())
    return {name: {"startup_seconds": statistics.median(s), "all": s} for name, s in found.items() if s}


def _first_step(workdir: Path, cache: Path) -> float:
    """Starts train.py on the tiny configuration and stops it when the first step's metrics are written."""
    command = [
        sys.executable,
        "train.py",
        "--config=configs/tiny.py",
        f"--workdir={workdir}",
        "--config.train.log_every=1",
    ]
    environment = {key: value for key, value in os.environ.items() if key != host_memory.VARIABLE}
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, env=environment | {"JAX_COMPILATION_CACHE_DIR": str(cache)}, stdout=output, stderr=output
        )
        try:
            while process.poll() is None and time.perf_counter() - begun < WAIT_SECONDS:
                time.sleep(0.02)
                with contextlib.suppress(OSError):
                    if '"train"' in (workdir / "metrics.jsonl").read_text():
                        return time.perf_counter() - begun
            output.seek(0)
            raise SystemExit(f"train.py made no step:\n{output.read()[-2000:]}")
        finally:
            process.kill()
            process.wait()


def _first_peer_step() -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "benchmarks.startup_peer"], check=True, capture_output=True)
    return time.perf_counter() - begun


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join((*CASES, "startup")), help=f"of {', '.join(CASES)}, startup")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"of {', '.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each candidate (default 7)")
    parser.add_argument(
        "--small", action="store_true", help="a tiny shape, to see that all candidates run; writes nothing"
    )
    arguments = parser.parse_args()
    cases = arguments.cases.split(",")
    unknown = set(cases) - {*CASES, "startup"}
    if unknown:
        parser.error(f"--cases: there is no {', '.join(sorted(unknown))}; there are {', '.join(CASES)}, startup")
    there = importlib.util.find_spec("transformers") and importlib.util.find_spec("torch")
    peers = [name for name in arguments.peers.split(",") if name] if there else []
    if not there:
        print("transformers and torch are not installed here: ours is measured alone (requirements-parity.txt)")
    shape = SMALL if arguments.small else SHAPE
    path = RESULTS / f"{stem('cpu', 'cpu')}.json"
    results = {} if arguments.small else earlier(path, shape)
    starts = json.loads(path.read_text()).get("startup", {}) if results else {}
    for case in cases:
        print(f"{case} ...", flush=True)
        if case == "startup":
            starts = startup(1 if arguments.small else 3)
        else:
            run = measure_in_pairs if case in PAIRED else measure
            results[case] = run(
                case, [OURS, *(READERS if case == "data" and peers else peers)], shape, arguments.rounds
            )
    results = {case: results[case] for case in CASES if case in results}
    table = rows_of(results, shape)
    table += [["startup", name, f"{each['startup_seconds'] * 1e3:,.0f}", *[""] * 7] for name, each in starts.items()]
    if arguments.small:
        for row in (COLUMNS, *table):
            print(" | ".join(row))
        return
    versions = {name: version(name) for name in ("torch", "transformers") if importlib.util.find_spec(name)}
    about = {"results": results, "startup": starts, "load": os.getloadavg(), "shape": shape, "peers": versions}
    title = f"CPU, 214,213,120 parameters, float32, beside {', '.join(f'{name} {v}' for name, v in versions.items()) or 'nobody'}"
    write("cpu", title, COLUMNS, table, about, "cpu")
    if results:
        draw(results, shape).savefig(path.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
