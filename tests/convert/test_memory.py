"""Conversion's memory does not grow with the model: a checkpoint of 1.5 GB, in a process of its own."""

import json
import math
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from mixtral_jax.convert import layout
from mixtral_jax.convert.shards import Planned, plan_shards, write_index, write_shard
from tests.convert import sources

SHAPE = dict(
    vocab_size=32000,
    d_model=1024,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
    d_ff=3584,
    num_experts=8,
    experts_per_token=2,
    rope_theta=1e6,
    sliding_window=0,
    num_layers=8,
)
LIMIT = 700_000_000  # bytes of anonymous memory; the interpreter with its libraries takes 100 MB of them
# Runs the command line and prints the peak of its anonymous memory: mapped files are not memory that anyone misses.
WATCH = """
import re, sys, threading, time
from mixtral_jax.convert.__main__ import main
peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
status = main(sys.argv[1:])
print("peak", peak)
sys.exit(status)
"""


def write_synthetic(folder) -> int:
    """Writes a random Mixtral in bfloat16, tensor by tensor; returns its bytes."""
    folder.mkdir()
    d, dtype = SHAPE, np.dtype(ml_dtypes.bfloat16)
    size = dict(L=d["num_layers"], D=d["d_model"], N=d["num_heads"], G=d["num_kv_heads"], H=d["head_dim"])
    size |= dict(F=d["d_ff"], E=d["num_experts"], V=d["vocab_size"])
    rng = np.random.default_rng(0)
    plan = []
    for name, entry in layout.entries("huggingface").items():
        layers, experts = layout.stacks(name, size)
        shape = layout.tensor_shape(entry, size)
        for i in layers:
            for e in experts:
                tensor = layout.tensor_name(entry, layout.Block(i, e, 0, 0))
                plan.append(
                    Planned(
                        tensor, shape, dtype, lambda s=shape: iter([rng.standard_normal(s, np.float32).astype(dtype)])
                    )
                )
    files = plan_shards(plan, 500_000_000)
    for file, group in files.items():
        write_shard(folder / file, group, lambda n: None)
    write_index(folder, files)
    (folder / "config.json").write_text(json.dumps(sources.config_json(SHAPE)))
    return sum(math.prod(t.shape) * 2 for t in plan)


@pytest.mark.slow
def test_memory_stays_below_a_share_of_the_model(tmp_path):
    total = write_synthetic(tmp_path / "hf")
    assert total > 1_500_000_000
    for command, source, target in (("import", "hf", "run"), ("export", "run", "back"), ("verify", "hf", "back")):
        done = subprocess.run(
            [sys.executable, "-c", WATCH, command, f"--from={tmp_path / source}", f"--to={tmp_path / target}"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        peak = int(done.stdout.split()[-1])
        print(f"{command}: {total / 1e9:.2f} GB, peak {peak / 1e6:.0f} MB")
        assert peak < LIMIT, f"{command} took {peak / 1e6:.0f} MB"
