"""What the benchmarks share: interleaved timing, medians with spread, and dated results with machine and versions."""

import contextlib
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


def _cpuinfo() -> dict[str, str]:
    """What /proc/cpuinfo says of the first core; nothing where there is none."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {}


def cpu_slug() -> str:
    """A short name of the CPU for files: "amd-25-17" is AMD's family 25, model 17. Virtual machines hide the model's name."""
    here = _cpuinfo()
    if not {"vendor_id", "cpu family", "model"} <= here.keys():
        return platform.machine()
    vendor = here["vendor_id"].removeprefix("Authentic").removeprefix("Genuine").lower()
    return f"{vendor}-{here['cpu family']}-{here['model']}"


def stem(name: str, device: str | None = None) -> str:
    """The name of today's results of this machine, without a suffix: on a CPU with its kind, for machines differ by twice."""
    device = device or jax.devices()[0].device_kind
    return f"{today()}-{name}" + (f"-{cpu_slug()}" if device == "cpu" else "")


def machine(device: str | None = None) -> dict[str, str | int]:
    """The machine and the versions that a result depends on; `device` where this process is not the one that used it."""
    model = f"{_cpuinfo().get('model name', platform.machine())} ({cpu_slug()})"
    device = device or jax.devices()[0].device_kind
    versions = {name: version(name) for name in ("jax", "jaxlib", "numpy")}
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "device": device,
        "python": platform.python_version(),
    } | versions


def write(name: str, title: str, columns: list[str], rows: list[list], extra: dict, device: str | None = None) -> None:
    """Prints a table and writes results/STEM.json and .md: see `stem`, and `machine` for device."""
    date, here, at = today(), machine(device), stem(name, device)
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    about = ", ".join(f"{key} {value}" for key, value in here.items())
    RESULTS.mkdir(exist_ok=True)
    text = f"# {title}\n\n{date}; {about}.\n\n" + "\n".join(lines) + "\n"
    (RESULTS / f"{at}.md").write_text(text)
    record = {"date": date, "machine": here, "columns": columns, "rows": rows, **extra}
    (RESULTS / f"{at}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(text)
