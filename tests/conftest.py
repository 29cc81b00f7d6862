"""The whole suite runs on 8 fake CPU devices, with rank promotion an error (pyproject.toml makes warnings errors)."""

import dataclasses
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

# Nearly all of the suite's time is compilation, so LLVM optimises nothing here; the programs stay the same.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 " + os.environ.get("XLA_FLAGS", "")
)
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("PJRT_NPROC", "64")  # cli.py says why

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

FOLDER = "MIXTRAL_JAX_TEST_PROGRAMS"


def pytest_configure(config):
    """What one worker has compiled no worker compiles again: a quarter of the suite's time.

    The folder ends with the run, so that each run compiles everything once. Processes that tests start do not use it. jax writes
    entries in place: a worker that reads one half-written says so and compiles.
    """
    if not hasattr(config, "workerinput"):
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="programs-")
    jax.config.update("jax_compilation_cache_dir", os.environ[FOLDER])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache entry")


def pytest_unconfigure(config):
    """Removes the folder of programs."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ[FOLDER], ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks the tests of modules that start processes: they wait with deadlines, and the slow ones run with nothing beside them."""
    for item in items:
        used = vars(item.module).values()
        homes = {getattr(v, "__name__", "") for v in used} | {getattr(v, "__module__", "") for v in used}
        if homes & {"subprocess", "tests.processes"}:
            item.add_marker("processes")


def pytest_runtest_setup(item):
    """What needs a GPU says so where there is none; by default it is not collected at all."""
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip(f"needs a GPU, and jax {jax.__version__} runs on {jax.devices()[0].device_kind} here")


MAPPINGS = 20_000  # of the 65,530 that Linux allows a process


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Drops what was compiled when there is much of it: each program maps memory of its own, and a failed mapping crashes XLA."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > MAPPINGS:
        jax.clear_caches()


@pytest.fixture
def fit(tmp_path):
    """Returns a function that trains a tiny run in tmp_path, in this process."""
    # Here, because the flags above must be set before anything of ours starts jax.
    from mixtral_jax import evals, trainer
    from mixtral_jax.evals import during
    from tests.helpers import tiny
    from tests.processes import write_corpus

    write_corpus(tmp_path / "corpus", 20)

    def run(name, **changes):
        defaults = dict(
            data__source="text",
            data__path=str(tmp_path / "corpus"),
            data__cache_dir=str(tmp_path / "cache"),
            data__heldout_fraction=0.3,
            model__num_layers=1,
            model__vocab_size=320,
            train__steps=4,
            train__checkpoint_every=2,
            train__eval_every=0,
            train__sample_every=0,
            train__log_every=1,
            optim__warmup_steps=1,
        )
        config = tiny(**defaults | changes)
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, fsdp=-1))
        return trainer.fit(config, tmp_path / name, evals.heldout, evals.baselines, measure=during.measure)

    return run


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 3 MB; mounting needs root, so without it the test is skipped."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
