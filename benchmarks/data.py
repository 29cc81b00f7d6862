"""The token cache: how fast it is built, beside the tokenizer alone, and how fast batches are read from it.

    python -m benchmarks.data

Text: the standard library's source six times, each copy with a line of its own, as JSON lines (75 MB); tokenizer:
mistral-v1. The parts of a round follow each other at once: the tokenizer alone encodes one copy, text after text in
one thread, into arrays as a build does and into lists, and as a batch with a thread for each core; and `python -m mixtral_jax.data build` makes a fresh cache,
starting and ending of its processes included. A build's rate per core is over the cores it may use (wall time) or over
the CPU time of all its processes. On a machine that others use too, wall time compares with the tokenizer on all cores
only, which has to share them as a build has; CPU time compares with both. The best of the rounds counts.
"""

import argparse
import functools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import write
from mixtral_jax.config import DataConfig
from mixtral_jax.data import Batches, Tokenizer, build_cache, documents, load_tokenizer, pack, prefetch

COPIES, T, B, WORKERS, N_BATCHES = 6, 2048, 8, 2, 400


def measured(run: Callable[[], int]) -> tuple[float, float]:
    """Runs a function that returns its tokens; returns tokens per second of wall time and of CPU time, ours and our
    finished processes'.
    """

    def cpu() -> float:
        usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    cpu_start, start = cpu(), time.perf_counter()
    tokens = run()
    return tokens / (time.perf_counter() - start), tokens / (cpu() - cpu_start)


def encode(tokenizer: Tokenizer, texts: list[str]) -> int:
    """The tokenizer alone, by the call that a build makes."""
    return sum(len(tokenizer.encode_array(text)) for text in texts)


def encode_lists(tokenizer: Tokenizer, texts: list[str]) -> int:
    """The tokenizer alone, with a Python integer for every token."""
    return sum(len(tokenizer.encode(text)) for text in texts)


def encode_on_all_cores(tokenizer: Tokenizer, texts: list[str]) -> int:
    """The tokenizer alone, with threads of its own."""
    return sum(map(len, tokenizer.encode_many(texts)))


def build(data: DataConfig, tokens: int) -> int:
    """A fresh cache, by the command."""
    shutil.rmtree(data.cache_dir, ignore_errors=True)
    keys = ("source", "path", "tokenizer", "cache_dir", "heldout_fraction")
    flags = [f"--{key}={getattr(data, key)}" for key in keys]
    command = [sys.executable, "-m", "mixtral_jax.data", "build", *flags]
    subprocess.run(command, check=True, capture_output=True)
    return tokens


def read_batches(batches: Batches, rounds: int) -> dict[str, float]:
    """Tokens per second through Batches.batch and through prefetch, shuffled; the best round."""

    def alone() -> int:
        return sum(int((batches.batch(k)["segment_ids_BT"] > 0).sum()) for k in range(N_BATCHES))

    def ahead() -> int:
        read = prefetch(batches, 0, N_BATCHES, WORKERS)
        return sum(int((item[1]["segment_ids_BT"] > 0).sum()) for item in read)

    cases = {"Batches.batch": alone, f"prefetch, {WORKERS} workers": ahead}
    found = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            found[name].append(measured(run)[0])
    return {name: max(rates) for name, rates in found.items()}


def write_corpus(path: Path, texts: list[str]) -> None:
    """JSON lines: COPIES of every text, each with another first line."""
    with open(path, "w") as file:
        for copy in range(COPIES):
            file.writelines(json.dumps({"text": f"# copy {copy}\n{text}"}) + "\n" for text in texts)


def main() -> None:
    """Measures and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the best counts (default 3)")
    rounds = parser.parse_args().rounds
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "corpus.jsonl")
        keys = dict(
            mixture=(), streaming=False, max_bad_rows=0, heldout_fraction=0.02, workers=WORKERS, packing=True, path=""
        )
        keys |= dict(text_key="text", tokenizer="mistral-v1", cache_dir=str(Path(folder, "cache")))
        texts = [document.text for document in documents(DataConfig(source="stdlib", **keys))]
        write_corpus(path, texts)
        data = DataConfig(source="jsonl", **keys | {"path": str(path)})
        tokenizer = load_tokenizer(data.tokenizer, data.cache_dir)
        corpus = build_cache(data, tokenizer)
        tokens = len(corpus.train.tokens) + len(corpus.heldout.tokens)
        cases = {
            "tokenizer": functools.partial(encode, tokenizer, texts),
            "tokenizer, lists": functools.partial(encode_lists, tokenizer, texts),
            "tokenizer on all cores": functools.partial(encode_on_all_cores, tokenizer, texts),
            "build": functools.partial(build, data, tokens),
        }
        rates = {name: [] for name in cases}
        for _ in range(rounds):
            for name, run in cases.items():
                rates[name].append(measured(run))
                print(
                    f"{name}: {rates[name][-1][0]:,.0f} tokens/s, {rates[name][-1][1]:,.0f} per CPU second", flush=True
                )
        train = build_cache(data, tokenizer).train
        batches = Batches(train, pack(train.lengths, T), batch_size=B, seq_len=T, seed=0)
        reads = read_batches(batches, rounds)
        size = path.stat().st_size
    report(size, tokens, cores, rates, reads)


def report(size: int, tokens: int, cores: int, rates: dict, reads: dict[str, float]) -> None:
    """Writes the table and the JSON."""
    alone, lists, threads, built = ([max(rate) for rate in zip(*rates[name])] for name in rates)
    rows = [
        ["tokenizer alone, one thread, wall time", f"{alone[0]:,.0f}", "100%"],
        ["tokenizer alone, one thread, lists, wall time", f"{lists[0]:,.0f}", f"{lists[0] / alone[0]:.0%}"],
        [
            f"tokenizer alone, {cores} threads, per core, wall time",
            f"{threads[0] / cores:,.0f}",
            f"{threads[0] / cores / alone[0]:.0%}",
        ],
        [
            f"data build, {cores} processes, per core, wall time",
            f"{built[0] / cores:,.0f}",
            f"{built[0] / cores / alone[0]:.0%}",
        ],
        ["tokenizer alone, one thread, per CPU second", f"{alone[1]:,.0f}", "100%"],
        ["tokenizer alone, one thread, lists, per CPU second", f"{lists[1]:,.0f}", f"{lists[1] / alone[1]:.0%}"],
        [f"tokenizer alone, {cores} threads, per CPU second", f"{threads[1]:,.0f}", f"{threads[1] / alone[1]:.0%}"],
        [f"data build, {cores} processes, per CPU second", f"{built[1]:,.0f}", f"{built[1] / alone[1]:.0%}"],
        *([f"{name}, T {T}, B {B}, shuffled, wall time", f"{rate:,.0f}", ""] for name, rate in reads.items()),
    ]
    title = f"Token cache: {size / 1e6:.0f} MB of JSON lines, {tokens:,} tokens, mistral-v1, best of {len(rates['build'])} rounds"
    title += f"; load average {os.getloadavg()[1]:.1f} on {cores} cores"
    extra = {"tokens_per_second_wall_cpu": rates, "read_tokens_per_second": reads, "load": os.getloadavg()}
    write("data", title, ["case", "tokens/s", "of the tokenizer"], rows, extra)


if __name__ == "__main__":
    main()
