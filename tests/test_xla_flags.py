"""XLA's flags for GPUs: known to the jaxlib that is here, added where there is a GPU, and never over the user's."""

import os
import subprocess
import sys

import pytest

from mixtral_jax import xla_flags


def test_jaxlib_knows_every_flag():
    """It ends the process for one that it does not know. Flags that several sets have are given once."""
    flags = ""
    for chosen in xla_flags.GPU_SETS.values():
        flags = xla_flags.added(flags, chosen)
    command = [sys.executable, "-c", "import jax; print(jax.devices())"]
    for given, status in ((flags, 0), (flags + " --xla_gpu_no_such_flag=true", 1)):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": given}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert bool(done.returncode) == bool(status), done.stderr


def test_what_the_user_has_set_stays():
    chosen = ("--xla_gpu_enable_triton_gemm=false", "--xla_gpu_autotune_level=0")
    got = xla_flags.added("--xla_gpu_autotune_level=4 --xla_dump_to=/x", chosen)
    assert got == "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=4 --xla_dump_to=/x"


@pytest.mark.parametrize(
    ("here", "chosen", "want"),
    [
        (True, "latency_hiding", "--xla_gpu_enable_latency_hiding_scheduler=true --mine=1"),
        (False, "latency_hiding", "--mine=1"),
        (True, "none", "--mine=1"),
    ],
)
def test_the_chosen_set_is_applied_on_a_gpu(monkeypatch, here, chosen, want):
    monkeypatch.setattr(xla_flags, "gpu_here", lambda: here)
    monkeypatch.setattr(xla_flags, "GPU_CHOSEN", chosen)
    environment = {"XLA_FLAGS": "--mine=1"}
    xla_flags.apply(environment)
    assert environment == {"XLA_FLAGS": want}


@pytest.mark.parametrize(
    ("platforms", "there", "want"), [("", True, True), ("cuda", True, True), ("cpu", True, False), ("", False, False)]
)
def test_a_gpu_is_here_where_its_device_is_and_jax_may_use_it(monkeypatch, platforms, there, want):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(xla_flags.Path, "exists", lambda path: there)
    assert xla_flags.gpu_here() is want
