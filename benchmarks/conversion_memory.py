"""Peak memory and time of import, export, verify and hf: loading on synthetic Mixtrals of several GB, every bit compared.

python -m benchmarks.conversion_memory [--sizes=6,12] [--load=4] [--trained=2,5] [--folder=/tmp]

Sizes are GB of weights: bfloat16 files for --sizes, float32 for --load and for --trained, a training checkpoint that is
exported. One size needs three times its bytes on disk, which are given back. Memory is RssAnon, the peak of a process
of its own: mapped files are not memory that anyone misses.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open

from benchmarks.common import write
from mixtral_jax.convert import layout
from mixtral_jax.convert.shards import Planned, plan_shards, write_index, write_shard

# One layer of it is 90.7M parameters, embedding and head 65.5M.
SHAPE = dict(vocab_size=32000, d_model=1024, num_heads=16, num_kv_heads=4, head_dim=64, d_ff=3584, num_experts=8)
LAYER, ENDS = 90_744_832, 65_537_024
# Watches the process that it is the beginning of.
WATCH = """
import re, sys, threading, time
peak = 0
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
"""
CONVERT = (
    WATCH
    + """
from mixtral_jax.convert.__main__ import main
status = main(sys.argv[1:])
print("peak", peak, 0)
sys.exit(status)
"""
)
LOAD = (
    WATCH
    + """
import jax
from mixtral_jax.load import load
config, model, mesh = load(sys.argv[1])
held = sum(shard.data.nbytes for leaf in jax.tree.leaves(model) for shard in leaf.addressable_shards)
print("peak", peak, held)
"""
)
TRAINED = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from mixtral_jax.checkpoint import Checkpoints
from mixtral_jax.workdir import store_run
from mixtral_jax.load import load
config, model, mesh = load(sys.argv[1])
folder = Path(sys.argv[2])
folder.mkdir()
store_run(folder, config.to_dict())
checkpoints = Checkpoints(folder)
checkpoints.save(1, model, {"count": jnp.zeros(())}, {})
checkpoints.close()
"""


def synthetic(folder: Path, gigabytes: float, dtype: str) -> int:
    """Writes a random Mixtral as a Hugging Face directory, tensor by tensor; returns its bytes."""
    kind = np.dtype({"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[dtype])
    shape = SHAPE | dict(num_layers=max(1, round((gigabytes * 1e9 / kind.itemsize - ENDS) / LAYER)))
    s = shape
    size = dict(L=s["num_layers"], D=s["d_model"], N=s["num_heads"], G=s["num_kv_heads"], H=s["head_dim"])
    size |= dict(F=s["d_ff"], E=s["num_experts"], V=s["vocab_size"])
    rng, plan = np.random.default_rng(0), []

    def values(shape):
        yield (0.02 * rng.standard_normal(shape, np.float32)).astype(kind)

    for name, entry in layout.entries("huggingface").items():
        layers, experts = layout.stacks(name, size)
        for i in layers:
            for e in experts:
                tensor = layout.tensor_name(entry, layout.Block(i, e, 0, 0))
                dims = layout.tensor_shape(entry, size)
                plan.append(Planned(tensor, dims, kind, lambda dims=dims: values(dims)))
    files = plan_shards(plan, 2_000_000_000)
    folder.mkdir(parents=True)
    for file, group in files.items():
        write_shard(folder / file, group, lambda n: None)
    write_index(folder, files)
    (folder / "config.json").write_text(json.dumps(hugging_face_config(shape)))
    return sum(math.prod(t.shape) for t in plan) * kind.itemsize


def hugging_face_config(shape: dict) -> dict:
    """A config.json of SHAPE with its layers."""
    s = shape
    return dict(
        model_type="mixtral",
        vocab_size=s["vocab_size"],
        num_hidden_layers=s["num_layers"],
        hidden_size=s["d_model"],
        num_attention_heads=s["num_heads"],
        num_key_value_heads=s["num_kv_heads"],
        head_dim=s["head_dim"],
        intermediate_size=s["d_ff"],
        num_local_experts=s["num_experts"],
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        rope_theta=1e6,
        rms_norm_eps=1e-5,
    )


def watched(program: str, *arguments, devices: int = 1) -> tuple[int, int, float]:
    """Runs a program of its own and returns its peak of anonymous memory, the bytes of arrays it held, and seconds.

    Raises:
        RuntimeError: it failed; its stderr is in the message.
    """
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    begun = time.perf_counter()
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr)
    peak, held = map(int, done.stdout.split()[-2:]) if "peak" in done.stdout else (0, 0)
    return peak, held, time.perf_counter() - begun


def same_bits(first: Path, second: Path) -> bool:
    """Whether two directories hold the same tensors, by safetensors' own reader."""

    def tensors(folder: Path) -> dict:
        opened = [safe_open(path, "numpy") for path in sorted(folder.glob("*.safetensors"))]
        return {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (not a dict)

    a, b = tensors(first), tensors(second)
    return a.keys() == b.keys() and all(
        a[name].get_tensor(name).tobytes() == b[name].get_tensor(name).tobytes() for name in a
    )


def round_trip(folder: Path, gigabytes: float) -> Iterator[list]:
    """Files -> checkpoint -> files, and the comparison of the command line."""
    total = synthetic(folder / "hf", gigabytes, "bfloat16")
    for command, source, target in (("import", "hf", "run"), ("export", "run", "back"), ("verify", "hf", "run")):
        peak, _, seconds = watched(CONVERT, command, f"--from={folder / source}", f"--to={folder / target}")
        equal = {"export": lambda: same_bits(folder / "hf", folder / "back"), "verify": lambda: True}
        yield row(command, total, "bfloat16", peak, seconds, equal.get(command, lambda: "")())
        if command == "export":
            shutil.rmtree(folder / "back")


def trained(folder: Path, gigabytes: float) -> Iterator[list]:
    """A checkpoint as training writes it, in chunks of its own: exported, and loaded by Orbax."""
    total = synthetic(folder / "hf", gigabytes, "float32")
    watched(TRAINED, f"hf:{folder / 'hf'}", folder / "run")
    peak, _, seconds = watched(CONVERT, "export", f"--from={folder / 'run'}", f"--to={folder / 'back'}")
    equal = same_bits(folder / "hf", folder / "back")
    yield row("export of a training checkpoint", total, "float32", peak, seconds, equal)
    shutil.rmtree(folder / "back")
    peak, held, seconds = watched(LOAD, folder / "run")
    title = f"loading a training checkpoint, beside {held / 1e9:.2f} GB of arrays"
    yield row(title, total, "float32", peak - held, seconds, "")


def loaded(folder: Path, gigabytes: float) -> Iterator[list]:
    """hf: loading, on one device and on a mesh of eight; what counts is the memory beside the arrays."""
    total = synthetic(folder / "hf", gigabytes, "float32")
    for devices in (1, 8):
        peak, held, seconds = watched(LOAD, f"hf:{folder / 'hf'}", devices=devices)
        title = f"hf: loading on {devices} device{'s' * (devices > 1)}, beside {held / 1e9:.2f} GB of arrays"
        yield row(title, total, "float32", peak - held, seconds, "")


def row(what: str, total: int, dtype: str, peak: int, seconds: float, equal) -> list:
    """A line of the table; printed at once, because the next one may take minutes."""
    line = [what, f"{total / 1e9:.2f}", dtype, f"{peak / 1e6:,.0f}", f"{seconds:.0f}", str(equal)]
    print("  ".join(line), flush=True)
    return line


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser("python -m benchmarks.conversion_memory")
    for name, default in (("sizes", "6,12"), ("load", "4"), ("trained", "2,5")):
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    arguments = parser.parse_args()
    table = []
    for kind, sizes in ((round_trip, arguments.sizes), (loaded, arguments.load), (trained, arguments.trained)):
        for gigabytes in map(float, filter(None, sizes.split(","))):
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                table += kind(Path(folder), gigabytes)
    columns = ["what", "GB", "dtype", "peak RssAnon, MB", "seconds", "bit-exact"]
    write("conversion_memory", "Memory of conversion and loading", columns, table, {"load": os.getloadavg()})


if __name__ == "__main__":
    main()
