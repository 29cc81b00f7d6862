"""What the benchmarks share: interleaved timing, medians with spread, and dated results with machine and versions."""

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax

RESULTS = Path(__file__).parent / "results"


def interleaved(cases: dict[str, Callable], rounds: int, warm: bool = False) -> dict[str, dict[str, float]]:
    """Times functions in turn, A B C A B C ..., so that a noisy machine is noisy for all of them.

    Args:
        cases: name -> function that returns JAX arrays; each is called once before, to compile and warm up.
        rounds: how often each is timed.
        warm: run each once more before it is timed, in every round: what it freed in the round before has gone back to the system.

    Returns:
        name -> median, lowest and highest seconds.
    """
    for run in cases.values():
        jax.block_until_ready(run())
    seconds = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            if warm:
                jax.block_until_ready(run())
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    return {name: {"median": statistics.median(s), "min": min(s), "max": max(s)} for name, s in seconds.items()}


def today() -> str:
    """The date of results."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def device_slug(device: str) -> str:
    """A short name of a GPU for files: "NVIDIA H100 80GB HBM3" -> "h100"."""
    words = device.lower().replace("-", " ").split()
    return next((word for word in words if word[0] in "abhlv" and word[1:].isdigit()), "other")


def machine(device: str | None = None) -> dict[str, str | int]:
    """The machine and the versions that a result depends on; `device` where this process is not the one that used it."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    device = device or jax.devices()[0].device_kind
    versions = {name: version(name) for name in ("jax", "jaxlib", "numpy")}
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "device": device,
        "python": platform.python_version(),
    } | versions


def write(name: str, title: str, columns: list[str], rows: list[list], extra: dict, device: str | None = None) -> None:
    """Prints a table and writes results/DATE-NAME.json and .md; for `device` see machine."""
    date, here = today(), machine(device)
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    about = ", ".join(f"{key} {value}" for key, value in here.items())
    RESULTS.mkdir(exist_ok=True)
    text = f"# {title}\n\n{date}; {about}.\n\n" + "\n".join(lines) + "\n"
    (RESULTS / f"{date}-{name}.md").write_text(text)
    record = {"date": date, "machine": here, "columns": columns, "rows": rows, **extra}
    (RESULTS / f"{date}-{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(text)
