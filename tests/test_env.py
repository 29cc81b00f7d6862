"""The environment report: complete, without secrets, and never in the way of a bug report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mixtral_jax import env
from tests.helpers import tiny

ROOT = Path(__file__).parent.parent


def command(home, *arguments):
    environment = os.environ | {
        "HOME": str(home),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "SECRET_TOKEN": "hush",
    }
    return subprocess.run(
        [sys.executable, "-m", "mixtral_jax.env", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_command_prints_all_as_text(tmp_path):
    done = command(tmp_path, "--config=configs/mixtral_8x7b.py", "--config.mesh.data=1", "--config.mesh.fsdp=-1")
    assert done.returncode == 0, done.stderr
    for words in (
        *(f"jax               {jax.__version__}", f"numpy             {np.__version__}", "orbax-checkpoint"),
        *("python", "cpus", "GiB", "count         8", "processes     1"),
        *("mesh\n  fsdp    2\n  expert  4\n", "force_host_platform_device_count=8", "programs  0"),
    ):
        assert words in done.stdout, words
    assert "hush" not in done.stdout
    assert "SECRET" not in done.stdout
    assert not (tmp_path / ".cache").exists(), "looking makes nothing"


def test_the_command_prints_json_and_the_error_of_a_mesh(tmp_path):
    done = command(tmp_path, "--json", "--config=configs/tiny.py", "--config.mesh.expert=3")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "needs a multiple of 3 devices and there are 8" in found["mesh"]["error"]
    assert found["devices"]["count"] == 8
    assert found["packages"]["jax"] == jax.__version__
    assert found["compilation_cache"]["folder"].startswith(str(tmp_path))


def test_only_settings_of_xla_and_jax_are_told():
    told = {
        "XLA_FLAGS": "1",
        "JAX_PLATFORMS": "2",
        "LIBTPU_INIT_ARGS": "3",
        "TPU_NAME": "4",
        "CUDA_VISIBLE_DEVICES": "",
    }
    kept_back = {"WANDB_API_KEY": "k", "HF_TOKEN": "t", "MY_JAX_KEY": "m", "CUDA_HOME": "c", "PATH": "p"}
    assert env.variables(told | kept_back) == told


def test_what_fails_is_told_and_stops_nothing(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("no libtpu")

    monkeypatch.setattr(env.jax, "local_devices", broken)
    monkeypatch.setattr(env.jax, "device_count", broken)
    found = env.collect(tiny())
    assert found["devices"] == {"error": "no libtpu"}
    assert found["mesh"] == {"error": "no libtpu"}
    assert "error  no libtpu" in env.text(found)
    monkeypatch.setattr(env.compilation_cache, "location", lambda: None)
    assert env.cache() == {"folder": None}
    assert "folder  none" in env.text({"compilation_cache": env.cache()})


def test_the_commit_of_a_checkout(tmp_path):
    assert env.commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b"]
    (tmp_path / "file").write_text("1")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "c"]):
        subprocess.run([*git, *arguments], check=True)
    clean = env.commit(tmp_path)
    assert len(clean) == 40
    (tmp_path / "file").write_text("2")
    assert env.commit(tmp_path) == clean + "+changes"
    (tmp_path / ".git" / "HEAD").write_text("nonsense")
    assert env.commit(tmp_path) is None


@pytest.mark.parametrize(("value", "shown"), [(None, "none"), (25 * 2**30, "25.0 GiB"), (3 * 2**20, "3.0 MiB")])
def test_sizes_for_people(value, shown):
    assert env.text({"host_memory_bytes": value}).endswith(f"  {shown}")
