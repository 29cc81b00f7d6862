"""Real training processes: what a signal, a kill or a full disk does can only be seen from outside."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from configs.tiny import get_config
from mixtral_jax.checkpoint import Checkpoints
from mixtral_jax.config import Config, from_config_dict, resolve_mesh
from mixtral_jax.jsonl import read_jsonl
from mixtral_jax.optim import make_optimizer
from mixtral_jax.sharding import make_mesh, named_leaves
from mixtral_jax.step import abstract_state
from mixtral_jax.timing import CATEGORIES, OTHER

ROOT = Path(__file__).parent.parent
# A step of a few milliseconds, every step logged, and nothing between the steps but checkpoints.
SMALL = {
    "model.num_layers": 1,
    "model.d_model": 32,
    "model.d_ff": 48,
    "model.head_dim": 8,
    "data.heldout_fraction": 0.2,
    "optim.warmup_steps": 2,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.sample_every": 0,
}
# What may differ between two runs of the same steps.
CLOCK = {"time", "tokens_per_second", "mfu", "goodput"} | {f"{name}_seconds" for name in (*CATEGORIES, OTHER)}


def write_corpus(folder: Path, count: int = 40, word: str = "fox") -> Path:
    """Makes a folder of text files of different lengths."""
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"{i}.txt").write_text(
            f"document {i}: " + f"the quick brown {word} jumps over the lazy dog. " * (3 + i % 7)
        )
    return folder


def values(**changes) -> dict:
    """The small run's values with changes, `group__key=value`."""
    return SMALL | {name.replace("__", "."): value for name, value in changes.items()}


def typed(**changes) -> Config:
    """The configuration that a process started with these changes has."""
    config = get_config("tiny")
    config.update_from_flattened_dict(values(**changes))
    return from_config_dict(config)


def command(workdir: Path, **changes) -> list[str]:
    """The command line of a small run."""
    flags = [f"--config.{name}={value}" for name, value in values(**changes).items()]
    return [sys.executable, "train.py", "--config=configs/tiny.py:tiny", f"--workdir={workdir}", *flags]


def group(workdir: Path, count: int, devices: int = 1, **changes) -> list[str]:
    """The command line of a small run of so many processes, each with so many devices."""
    launcher = [sys.executable, "-m", "mixtral_jax.launch", f"--processes={count}", f"--devices_per_process={devices}"]
    return [*launcher, "--", *command(workdir, **changes)[1:]]


def members(launcher: subprocess.Popen) -> list[int]:
    """The processes that a launcher has started, by their numbers in the group."""
    children = [
        pid for task in Path(f"/proc/{launcher.pid}/task").iterdir() for pid in (task / "children").read_text().split()
    ]
    numbers = {}
    for pid in map(int, children):
        with contextlib.suppress(OSError):  # it ended in the meantime
            given = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")  # empty of one that ended
            for line in given:
                if line.startswith("MIXTRAL_JAX_PROCESS_ID="):
                    numbers[int(line.partition("=")[2])] = pid
    return [numbers[i] for i in sorted(numbers)]


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """The environment of a process that sees so many devices."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", **more}


class Process(subprocess.Popen):
    """A process whose output can be read while it runs."""

    def __init__(self, line: list[str], devices: int = 1, **more: str):
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed by stop
        super().__init__(line, cwd=ROOT, env=environment(devices, **more), stdout=self._log, stderr=subprocess.STDOUT)

    def output(self) -> str:
        """What it printed so far."""
        self._log.seek(0)
        return self._log.read()

    def end(self, status: int) -> str:
        """Waits until it ends, with this status and without a stack trace; returns what it printed."""
        self.wait(timeout=400)
        out = self.output()
        assert self.returncode == status, f"status {self.returncode} instead of {status}:\n{out}"
        assert "Traceback" not in out, out
        return out

    def stop(self) -> None:
        """Kills it if it still runs."""
        self.kill()
        self.wait()
        self._log.close()


def run(line: list[str], devices: int = 1, expect: int = 0, **more: str) -> str:
    """Runs a process to its end and returns what it printed; another status than expected fails with all of it."""
    process = Process(line, devices, **more)
    try:
        return process.end(expect)
    finally:
        process.stop()


def wait_for(condition, process: Process, seconds: float = 120.0) -> None:
    """Waits until a condition holds; it is a failure if the process ends before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the process ended before:\n{process.output()}"
        assert time.monotonic() < end, f"the process did not come so far:\n{process.output()}"
        time.sleep(0.002)


def logged(workdir: Path, kind: str = "train") -> list[dict]:
    """The metrics of a run's steps without what depends on the clock."""
    path = workdir / "metrics.jsonl"
    lines = read_jsonl(path) if path.exists() else []
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines if line["kind"] == kind]


def steps_logged(workdir: Path) -> list[int]:
    """The steps of the metrics' lines, in their order."""
    return [line["step"] for line in logged(workdir)]


def stored(workdir: Path, step: int, **changes) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, parameters and optimizer state, as it is on disk."""
    config = resolve_mesh(typed(**changes | {"mesh__fsdp": 1}), 1)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    like, _ = abstract_state(config, make_optimizer(config.optim, config.train.steps), mesh)
    checkpoints = Checkpoints(workdir)
    params, opt_state = jax.device_get(checkpoints.restore(step, like.params, like.opt_state))
    checkpoints.close()
    return {
        f"{item}.{name}": leaf
        for item, tree in (("params", params), ("opt_state", opt_state))
        for name, leaf in named_leaves(tree).items()
    }


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """Bitwise equality, by name."""
    assert one.keys() == other.keys()
    for name, leaf in one.items():
        assert leaf.dtype == other[name].dtype
        np.testing.assert_array_equal(
            leaf.view(np.uint8) if leaf.ndim else leaf,
            other[name].view(np.uint8) if leaf.ndim else other[name],
            err_msg=name,
        )


def fill(path: Path) -> None:
    """Writes zeros until the disk is full."""
    with open(path, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
