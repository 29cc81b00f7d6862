"""The expert layer, a training step, prefill and decoding on a GPU at Mixtral's width, beside transformers, bfloat16.

    python -m benchmarks.gpu --cases=moe_train,moe_forward
    python -m benchmarks.gpu --cases=train --candidates=mixtral_jax,mixtral_jax-remat_outputs --flags=latency_hiding
    JAX_PLATFORMS=cpu python -m benchmarks.gpu --small

A candidate is a process of its own and has the GPU to itself: models of this width do not fit beside each other. They take
turns (A B A B ...) for --passes; the rate of a matmul (8192^3) and the bandwidth of a copy are measured before and after. Each call
adds what it measured to results/DATE-gpu-DEVICE.json, .md and .png, so that a long comparison can be made in short calls; docs/gpu.md
says what the figures mean. --small runs every case with a tiny shape in this process, on a CPU too, and writes nothing.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import version

from matplotlib.figure import Figure

from benchmarks import ours
from benchmarks.common import RESULTS, device_slug, today, write
from benchmarks.cpu import OURS, Candidate, unit_tokens, useful_flops
from benchmarks.worker import build
from mixtral_jax.xla_flags import GPU_SETS, added

WIDTH = dict(
    vocab_size=32000,
    num_layers=1,
    d_model=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    d_ff=14336,
    num_experts=8,
    experts_per_token=2,
    batch=2,
    seq_len=4096,
    prompt=128,
    new_tokens=64,
    dtype="bfloat16",
    moments="bfloat16",
    remat="full",
    device="cuda",
    square=8192,
    copied=2**31,
)
NARROW = dict(
    vocab_size=256,
    d_model=64,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    d_ff=96,
    seq_len=64,
    prompt=8,
    new_tokens=2,
    square=64,
    copied=2**12,
)
# What a case changes of WIDTH.
CHANGES = {
    "moe_forward": {},
    "moe_train": {},
    "train": dict(num_layers=4, batch=4),
    "prefill": dict(num_layers=8),
    "decode_1": dict(num_layers=8),
    "decode_8": dict(num_layers=8),
    "decode_32": dict(num_layers=8),
}
PEERS = [f"transformers-{name}" for name in ("eager", "grouped_mm", "batched_mm", "compile")]
EXPERTS = [f"mixtral_jax-{name}" for name in ("tokamax_mosaic", "tokamax_triton", "ragged_dot", "blocks")]
FORMS = ["mixtral_jax", "mixtral_jax-loop", "mixtral_jax-picked", "mixtral_jax-picked-loop", "mixtral_jax-stacked"]


def defaults(case: str) -> list[str]:
    """What is measured in a case where the caller names nothing."""
    if case == "prefill":
        return ["mixtral_jax", "mixtral_jax-picked", "mixtral_jax-stacked", *PEERS]
    return (FORMS if case.startswith("decode") else EXPERTS) + PEERS


# Case -> the share that is asked for, the least and the aim: of the data sheet's matmul peak, or of the measured bandwidth.
GOALS = {
    "moe_train": ("of_peak", 0.60, 0.75),
    "train": ("of_peak", 0.45, 0.55),
    "decode_1": ("of_bandwidth", 0.60, 0.75),
}


class Here:
    """A candidate in this process, for --small; otherwise as cpu.Candidate."""

    def __init__(self, case: str, name: str, shape: dict, environment: dict[str, str] | None = None):
        self.name, self.seconds, self.peak, self.about = name, [], 0, {}
        self._arguments = (case, name, shape)

    def ready(self) -> float | None:
        """Builds and warms it; None where it cannot run."""
        begun = time.perf_counter()
        try:
            self._run, self._peak, self.about = build(*self._arguments)
            self._run()
        except Exception as error:  # whatever a peer raises, a worker's process would have ended with it
            print(f"    {type(error).__name__}: {str(error).splitlines()[0]}")
            return None
        return time.perf_counter() - begun

    def measure(self) -> None:
        """Runs it once."""
        begun = time.perf_counter()
        self._run()
        self.seconds.append(time.perf_counter() - begun)
        self.peak = self._peak()

    def close(self) -> None:
        """Drops what it holds."""
        self._run = None


def shape_of(case: str, small: bool, layers: int = 0, batch: int = 0) -> dict:
    """The shape of a case; layers and batch where the caller has others."""
    shape = WIDTH | CHANGES.get(case, {})
    shape |= {name: value for name, value in (("num_layers", layers), ("batch", batch)) if value and case in CHANGES}
    return shape | NARROW | dict(num_layers=min(shape["num_layers"], 2), device="cpu") if small else shape


def active_bytes(case: str, shape: dict) -> float:
    """Bytes that one run of decoding must read: the weights that some row needs, and the keys and values so far.

    How many experts B rows need together is counted for uniform routing, E (1 - (1 - K / E)^B); one row needs K.
    """
    rows = int(case.rpartition("_")[2])
    d, f, e, k = shape["d_model"], shape["d_ff"], shape["num_experts"], shape["experts_per_token"]
    n, g, h = shape["num_heads"], shape["num_kv_heads"], shape["head_dim"]
    used = e * (1 - (1 - k / e) ** rows)
    layer = 2 * (2 * d * n * h + 2 * d * g * h + 3 * d * f * used) + 4 * d * e  # the router is float32
    cached = 2 * 2 * rows * g * h * (shape["prompt"] + shape["new_tokens"] / 2)
    return shape["new_tokens"] * (shape["num_layers"] * (layer + cached) + 2 * d * shape["vocab_size"])


def environment_of(name: str, cache: str, platforms: str | None) -> dict[str, str]:
    """A candidate's environment: its set of flags, most of the memory, and programs compiled once for all passes."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    environment.pop("JAX_PLATFORMS", None)
    if platforms is not None:
        environment["JAX_PLATFORMS"] = platforms
    chosen = GPU_SETS[name.partition("@")[2] or "none"]
    return environment | {"XLA_FLAGS": added(environment.get("XLA_FLAGS", ""), chosen)}


def measure(case: str, names: list[str], shape: dict, passes: int, rounds: int, start) -> dict[str, dict]:
    """Measures candidates one after the other, `passes` times all of them.

    Args:
        start: (case, name, shape) -> a Candidate.

    Returns:
        name -> median, lowest and highest seconds of one run, seconds to the end of the first run of its process, peak bytes.
    """
    seconds, found = {}, {}
    for _ in range(passes):
        for name in names:
            if name in seconds and name not in found:
                continue  # it did not run in the first pass
            seconds.setdefault(name, [])
            candidate = start(case, name, shape)
            with contextlib.closing(candidate):
                first = candidate.ready()
                if first is None:
                    print(f"  {case}, {name}: does not run here", flush=True)
                    continue
                for _ in range(rounds):
                    candidate.measure()
                seconds[name] += candidate.seconds
                known = found.setdefault(name, {"first_seconds": first, "peak_bytes": 0, "about": candidate.about})
                known["peak_bytes"] = max(known["peak_bytes"], candidate.peak)
            middle = statistics.median(seconds[name])
            print(f"  {case}, {name}: {middle * 1e3:,.2f} ms, first run after {first:.1f} s", flush=True)
            found[name] |= {"seconds": middle, "lowest": min(seconds[name]), "highest": max(seconds[name])}
    return found


def rates_of(found: dict[str, dict], shape: dict) -> dict[str, float]:
    """The measured rates of the machine in FLOP/s and bytes/s; of runs before and after the better one."""
    return {
        "matmul_flops": 2 * shape["square"] ** 3 / found["matmul"]["seconds"],
        "copy_bytes": 2 * shape["copied"] / found["copy"]["seconds"],
    }


def judged(case: str, found: dict[str, dict], shape: dict, rates: dict[str, float]) -> dict[str, dict]:
    """Adds to each candidate its rates and their shares of the machine's."""
    for each in found.values():
        rate = useful_flops(case, shape) / each["seconds"]
        each |= {"tokens_per_second": unit_tokens(case, shape) / each["seconds"], "useful_flops_per_second": rate}
        each |= {
            "of_matmul": rate / rates["matmul_flops"],
            "of_peak": rate / rates["peak_flops"] if "peak_flops" in rates else None,
        }
        if case.startswith("decode"):
            each["of_bandwidth"] = active_bytes(case, shape) / each["seconds"] / rates["copy_bytes"]
        each |= {"shape": shape, "rates": rates}
    return found


COLUMNS = ["case", "what", "median ms", "range", "tokens/s", "times the best peer"]
COLUMNS += ["useful TFLOP/s", "of the peak", "of the matmul rate", "of the bandwidth", "peak GB"]


def rows_of(results: dict[str, dict]) -> list[list[str]]:
    """The table: one row for each case and candidate, the fastest first."""
    rows = []
    for case, found in results.items():
        peer = min((each["seconds"] for name, each in found.items() if name.startswith("transformers")), default=None)
        for name, each in sorted(found.items(), key=lambda item: item[1]["seconds"]):
            share = [each["of_peak"], each["of_matmul"], each.get("of_bandwidth")]
            rows.append(
                [
                    case,
                    name,
                    f"{each['seconds'] * 1e3:,.2f}",
                    f"{each['lowest'] * 1e3:,.2f} to {each['highest'] * 1e3:,.2f}",
                    f"{each['tokens_per_second']:,.0f}",
                    f"{peer / each['seconds']:.2f}" if peer and name.startswith(OURS) else "",
                    f"{each['useful_flops_per_second'] / 1e12:,.1f}",
                    *("" if part is None else f"{part:.1%}" for part in share),
                    f"{each['peak_bytes'] / 1e9:.1f}",
                ]
            )
    return rows


def verdicts(results: dict[str, dict]) -> list[str]:
    """For each goal whose case was measured: what our best candidate reached of it, and whether it is ahead of the peers."""
    lines = []
    for case, (share, least, aim) in GOALS.items():
        mine = {name: each for name, each in results.get(case, {}).items() if name.startswith(OURS)}
        mine = {name: each for name, each in mine.items() if each.get(share) is not None}
        if not mine:
            continue
        best = max(mine, key=lambda name: mine[name][share])
        peers = [each["seconds"] for name, each in results[case].items() if name.startswith("transformers")]
        ahead = "no peer measured" if not peers else "ahead of" if mine[best]["seconds"] < min(peers) else "behind"
        ahead += " every peer measured" if peers and ahead == "ahead of" else " a peer" if peers else ""
        reached = "reached" if mine[best][share] >= least else "NOT reached"
        words = "the data sheet's peak" if share == "of_peak" else "the measured bandwidth"
        lines.append(
            f"{case}: {best} at {mine[best][share]:.1%} of {words}; goal {least:.0%} {reached}, aim {aim:.0%}; {ahead}"
        )
    return lines


def merged(old: dict[str, dict], new: dict[str, dict]) -> dict[str, dict]:
    """Earlier results of the day with later ones in their place, in the order of CHANGES."""
    return {case: old.get(case, {}) | new.get(case, {}) for case in CHANGES if case in old or case in new}


def draw(results: dict[str, dict]) -> Figure:
    """Left the share of the machine's matmul rate of each case, right of its bandwidth in decoding."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    for axes, share, words in zip(
        figure.subplots(1, 2),
        ("of_matmul", "of_bandwidth"),
        ("useful work, of a plain matmul's rate", "active bytes, of a copy's bandwidth"),
        strict=True,
    ):
        bars = [
            (case, name, each[share])
            for case, found in results.items()
            for name, each in found.items()
            if share in each
        ]
        bars = [bar for bar in bars if share == "of_bandwidth" or not bar[0].startswith("decode")]
        labels = [f"{case}: {name}" for case, name, _ in bars]
        colours = ["tab:blue" if name.startswith(OURS) else "tab:orange" for _, name, _ in bars]
        axes.barh(range(len(bars)), [100 * value for *_, value in bars], color=colours)
        axes.set_yticks(range(len(bars)), labels, fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel(f"{words}, %")
    return figure


def save(results: dict[str, dict], device: str) -> None:
    """Merges with the day's file of this device and writes table, JSON and plot."""
    name = f"gpu-{device_slug(device)}"
    path = RESULTS / f"{today()}-{name}.json"
    results = merged(json.loads(path.read_text())["results"] if path.exists() else {}, results)
    versions = {each: version(each) for each in ("torch", "transformers", "tokamax") if importlib.util.find_spec(each)}
    about = {"results": results, "peers": versions, "verdicts": verdicts(results)}
    write(name, f"{device}, Mixtral's width, bfloat16", COLUMNS, rows_of(results), about, device)
    print("\n".join(verdicts(results)))
    draw(results).savefig(path.with_suffix(".png"), dpi=110)


def parsed(arguments: list[str] | None):
    """The flags; a mistake ends the program with what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CHANGES), help=f"of {', '.join(CHANGES)}")
    parser.add_argument(
        "--candidates",
        default="",
        help="instead of each case's own; mixtral_jax[-OPTION...][@FLAGS], transformers-NAME",
    )
    parser.add_argument("--flags", default="", help=f"also our first candidate with these sets: {', '.join(GPU_SETS)}")
    parser.add_argument("--passes", type=int, default=2, help="how often all candidates take turns (default 2)")
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of a candidate in each pass (default 7)")
    parser.add_argument("--layers", type=int, default=0, help="layers instead of the case's own")
    parser.add_argument("--batch", type=int, default=0, help="rows instead of the case's own (train, prefill, moe)")
    parser.add_argument("--small", action="store_true", help="a tiny shape in this process; writes nothing")
    found = parser.parse_args(arguments)
    known = {"cases": CHANGES, "flags": GPU_SETS}
    for key, there in known.items():
        wrong = sorted({name for name in getattr(found, key).split(",") if name} - set(there))
        if wrong:
            parser.error(f"--{key}: there is no {', '.join(wrong)}; there are {', '.join(there)}")
    for name in filter(None, found.candidates.split(",")):
        option = next((o for o in ours.options_of(name) if o not in ours.OPTIONS), None)
        if name.startswith(OURS) and option:
            parser.error(f"--candidates: {name} has no option {option}; there are {', '.join(ours.OPTIONS)}")
        if name.partition("@")[2] not in ("", *GPU_SETS):
            parser.error(f"--candidates: {name} names no set of flags; there are {', '.join(GPU_SETS)}")
        if not name.startswith((OURS, "transformers-")):
            parser.error(f"--candidates: {name} is neither {OURS}[-OPTION...][@FLAGS] nor transformers-NAME")
    if min(found.passes, found.rounds) < 1:
        parser.error(f"--passes={found.passes} --rounds={found.rounds}: both must be at least 1")
    return found


def candidates_of(case: str, found) -> list[str]:
    """The names to measure in a case: asked for or its own, our first with each set of flags, peers where they are installed."""
    names = [name for name in found.candidates.split(",") if name] or defaults(case)
    mine = [name for name in names if name.startswith(OURS)]
    names = names + [f"{mine[0]}@{chosen}" for chosen in found.flags.split(",") if chosen and mine]
    there = importlib.util.find_spec("transformers") and importlib.util.find_spec("torch")
    return [name for name in names if there or not name.startswith("transformers")]


def main(arguments: list[str] | None = None) -> None:
    """Measures and writes the results."""
    found = parsed(arguments)
    if not (importlib.util.find_spec("transformers") and importlib.util.find_spec("torch")):
        print("transformers and torch are not installed here: ours is measured alone (requirements-parity.txt)")
    platforms = os.environ.get("JAX_PLATFORMS")
    if not found.small:
        os.environ["JAX_PLATFORMS"] = "cpu"  # this process only waits: the GPU's memory is the candidates'
    with tempfile.TemporaryDirectory() as cache:

        def start(case, name, shape):
            return (Here if found.small else Candidate)(case, name, shape, environment_of(name, cache, platforms))

        def machine() -> tuple[dict[str, float], dict]:
            shape, one = shape_of("matmul", found.small), OURS
            both = {case: measure(case, [one], shape, 1, found.rounds, start).get(one) for case in ("matmul", "copy")}
            if None in both.values():
                raise SystemExit("jax does not run here; the messages above say why")
            return rates_of(both, shape), both["matmul"]["about"]

        before, about = machine()
        if not found.small and about["jax_platform"] != "gpu":
            raise SystemExit(f"jax finds no GPU here, it runs on {about['device']}; --small runs all cases on a CPU")
        results, shapes = {}, {}
        for case in found.cases.split(","):
            shapes[case] = shape_of(case, found.small, found.layers, found.batch)
            results[case] = measure(case, candidates_of(case, found), shapes[case], found.passes, found.rounds, start)
        after, _ = machine()
    rates = {name: max(before[name], after[name]) for name in before} | {
        k: v for k, v in about.items() if k == "peak_flops"
    }
    print(
        f"matmul {rates['matmul_flops'] / 1e12:,.2f} TFLOP/s, copy {rates['copy_bytes'] / 1e9:,.1f} GB/s on {about['device']}"
    )
    results = {case: judged(case, each, shapes[case], rates) for case, each in results.items()}
    if found.small:
        for row in (COLUMNS, *rows_of(results)):
            print(" | ".join(row))
        draw(results).canvas.draw()
        return
    save(results, about["device"])


if __name__ == "__main__":
    sys.exit(main())
