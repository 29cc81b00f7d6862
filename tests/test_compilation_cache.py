"""The second process compiles nothing, computes the same bits, and the user's own settings win."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jaxlib
import pytest

from mixtral_jax import compilation_cache
from mixtral_jax.compilation_cache import cpu_fingerprint, enable, folder

SCRIPT = """
import collections, hashlib, json, sys
import jax, jax.numpy as jnp, numpy as np
from mixtral_jax import compilation_cache

events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.rpartition("/")[2]]))

@jax.jit
def program(x):
    loss = lambda x: jax.lax.scan(lambda c, _: (jnp.tanh(c @ c.T @ x), None), x, length=5)[0].sum()
    return jax.value_and_grad(loss)(x)

def run():
    jax.clear_caches()
    before = events.copy()
    out = program(np.linspace(-1, 1, 4096, dtype=np.float32).reshape(64, 64))
    bits = hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in out)).hexdigest()
    counts = events - before
    return bits, counts["cache_hits"], counts["cache_misses"]

found = {}
if "without" in sys.argv:
    found["without"] = run()
found["folder"] = str(compilation_cache.enable(sys.argv[1]))
found["with"] = run()
if "torn" in sys.argv:
    (entry,) = (path for path in compilation_cache.folder(sys.argv[1]).glob("jit_program*"))
    entry.write_bytes(entry.read_bytes()[:1000])
    found["torn"] = run()
print(json.dumps(found))
"""


def process(root, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(root), *arguments],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout), done.stderr


def test_a_second_process_reads_what_the_first_compiled(tmp_path):
    first, _ = process(tmp_path, "without")
    assert first["folder"] == str(folder(tmp_path))
    bits, hits, misses = first["with"]
    assert first["without"] == [bits, 0, 0], "the cache is not on yet, and changes no bit"
    assert hits == 0
    assert misses >= 1
    assert [path.name for path in folder(tmp_path).glob("jit_program*-cache")]
    second, stderr = process(tmp_path, "torn")
    assert second["with"] == [bits, misses, 0]
    assert "machine" not in stderr, "XLA complains about features of another machine"
    assert second["torn"][0] == bits, "half a file is compiled again"


@pytest.fixture
def settings(monkeypatch):
    """jax as a user would find it, and put back: the suite has a cache of its own (conftest.py)."""
    names = (
        "jax_compilation_cache_dir",
        "jax_enable_compilation_cache",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    for name in names:
        monkeypatch.delenv(name.upper(), raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    yield monkeypatch
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_folder_is_made_for_this_jaxlib_and_cpu(tmp_path, settings):
    settings.setenv("HOME", str(tmp_path))
    path = enable()
    assert path == tmp_path / ".cache/mixtral_jax/xla" / f"jaxlib-{jaxlib.__version__}-{cpu_fingerprint()}"
    assert path.stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_compilation_cache_dir == str(path)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.5


def test_what_the_user_has_set_stays(tmp_path, settings):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert enable(tmp_path / "ours") == tmp_path / "mine"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    jax.config.update("jax_compilation_cache_dir", None)
    settings.setenv("JAX_COMPILATION_CACHE_DIR", "")
    assert enable(tmp_path / "ours") is None
    settings.delenv("JAX_COMPILATION_CACHE_DIR")
    jax.config.update("jax_enable_compilation_cache", False)
    assert enable(tmp_path / "ours") is None
    jax.config.update("jax_enable_compilation_cache", True)
    settings.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "7")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 7)
    enable(tmp_path / "ours")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 7
    assert not (tmp_path / "mine").exists()


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, settings, caplog):
    (tmp_path / "file").write_text("")
    assert enable(tmp_path / "file") is None
    assert "no compilation cache" in caplog.text
    assert jax.config.jax_compilation_cache_dir is None
    settings.setattr(compilation_cache.os, "access", lambda *_: False)  # root may write anywhere
    assert enable(tmp_path / "read_only") is None
    assert "Permission denied" in caplog.records[-1].getMessage()


def test_other_instruction_sets_get_another_folder(tmp_path):
    def fingerprint(text):
        (tmp_path / "cpuinfo").write_text(text)
        return cpu_fingerprint(str(tmp_path / "cpuinfo"))

    cpu = "processor\t: {n}\nmodel name\t: CPU\ncpu MHz\t\t: {mhz}\nflags\t\t: sse avx2{more}\n\nprocessor\t: 1\n"
    same = fingerprint(cpu.format(n=0, mhz=1000, more=""))
    assert fingerprint(cpu.format(n=3, mhz=2000, more="")) == same, "not what changes from moment to moment"
    assert fingerprint(cpu.format(n=0, mhz=1000, more=" avx512f")) != same
    assert cpu_fingerprint("nowhere") == cpu_fingerprint("nowhere"), "not Linux"
