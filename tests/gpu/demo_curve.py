"""The loss of the demo's pretraining, to compare machines: reads a run's metrics and writes tests/gpu/demo_cpu.json.

    JAX_PLATFORMS=cpu python train.py --config=configs/tiny.py:steps=300 --workdir=runs/curve --config.train.log_every=1
    python -m tests.gpu.demo_curve runs/curve

The corpus is the running Python's own standard library, so another Python has a slightly other corpus and tokenizer.
"""

import json
import platform
import statistics
import sys
from pathlib import Path

import jax

REFERENCE = Path(__file__).with_name("demo_cpu.json")
WINDOW = 25  # steps that are averaged: single batches differ


def curve(workdir: Path) -> dict:
    """The token loss averaged over each WINDOW steps, and the held-out bits per byte at the end."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["token_loss"] for line in lines if line["kind"] == "train"]
    final = [line for line in lines if line["kind"] == "final"][-1]
    return {
        "steps": len(losses),
        "token_loss": [round(statistics.mean(losses[i : i + WINDOW]), 4) for i in range(0, len(losses), WINDOW)],
        "bits_per_byte": final["bits_per_byte"],
        "bigram_bits_per_byte": final["bigram_bits_per_byte"],
    }


def assert_learns_alike(got: dict, want: dict, tolerance: float) -> None:
    """Fails where a window's loss or the final bits per byte is farther from the reference than this part of it."""
    assert got["steps"] == want["steps"], f"{got['steps']} steps were logged, {want['steps']} in the reference"
    pairs = {
        f"steps {i * WINDOW + 1} to {(i + 1) * WINDOW}": pair
        for i, pair in enumerate(zip(got["token_loss"], want["token_loss"], strict=True))
    }
    pairs["held-out bits per byte"] = (got["bits_per_byte"], want["bits_per_byte"])
    for name, (a, b) in pairs.items():
        assert abs(a - b) <= tolerance * b, (
            f"{name}: {a} here and {b} in the reference, more than {tolerance:.0%} apart"
        )
    assert got["bits_per_byte"] < got["bigram_bits_per_byte"], "a model that has learned beats the bigram model"


def reference() -> dict:
    """The committed curve."""
    return json.loads(REFERENCE.read_text())


def main() -> None:
    """Writes the reference."""
    about = {"python": platform.python_version(), "jax": jax.__version__}
    found = curve(Path(sys.argv[1])) | about
    REFERENCE.write_text(json.dumps(found, indent=2) + "\n")
    print(f"{REFERENCE}: {found['steps']} steps, {found['bits_per_byte']} bits per byte")


if __name__ == "__main__":
    main()
