"""The kernels and the model on a GPU at Mixtral's width: `pytest -m gpu` (and `-m "gpu and slow"`: the demo). docs/gpu.md says how.

Each check's code is in checks.py and runs at a small width on the CPU too (test_small.py).
"""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks.grouped import GROUPED
from mixtral_jax import backends
from mixtral_jax.models.attention import chunked, cudnn
from tests.gpu import checks, demo_curve
from tests.helpers import tiny

ROOT = Path(__file__).parent.parent.parent
# What the kernels' package warns of is not ours to mend.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default:::tokamax")]
REAL = checks.Width(d=4096, f=14336, rows=1024, block=256)
MIXTRAL = dict(d_model=4096, d_ff=14336, num_heads=32, num_kv_heads=8, head_dim=128, vocab_size=32000, num_experts=8)


def grouped(backend: str):
    """The kernel; skips where tokamax is missing, or has no such kernel for this GPU."""
    if backend.startswith("tokamax") and importlib.util.find_spec("tokamax") is None:
        pytest.skip("tokamax is not installed: pip install -r requirements-gpu.txt")
    if backend == "tokamax_mosaic" and backends._capability() < (9, 0):
        pytest.skip("Mosaic's kernels need Hopper (compute capability 9.0) or later")
    return GROUPED[backend]


@pytest.mark.parametrize("shares", checks.SPLITS.values(), ids=checks.SPLITS.keys())
@pytest.mark.parametrize("backend", GROUPED)
def test_experts_equal_dense(backend, shares):
    checks.check_experts(grouped(backend), REAL, shares)


@pytest.mark.parametrize("backend", ["tokamax", "tokamax_triton", "ragged_dot"])
def test_experts_in_chunks_equal_dense(backend):
    """One expert of 4096 wide rows takes 4096 rows in one pass; these 4608 are cut into chunks of 1024."""
    width = dataclasses.replace(REAL, rows=4608, block=64, e=1)
    checks.check_experts(grouped(backend), width, [0.9])


@pytest.mark.parametrize("backend", ["tokamax", "tokamax_triton"])
def test_experts_in_float32_equal_dense(backend):
    """tf32 or bf16 products: as near as bfloat16. Mosaic's kernel refuses float32, and Triton's takes over."""
    width = checks.Width(d=512, f=1024, rows=512, block=128)
    checks.check_experts(grouped(backend), width, checks.SPLITS["empty_experts"], dtype=jnp.float32)


def test_permutes_equal_loops():
    checks.check_permutes(tokens=4096, d=4096)


@pytest.mark.parametrize("backend", ["tokamax", "blocks"])
def test_the_layer_equals_dense(backend):
    grouped(backend)
    checks.check_layer(REAL, backend)


def needs_cudnn():
    if backends._capability() < (9, 0):
        pytest.skip("cuDNN packs documents on Hopper (compute capability 9.0) and later")


@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize("t", [1024, 4096])
def test_cudnn_equals_plain(t, window):
    needs_cudnn()
    checks.check_attention(cudnn.attend, t, 32, 8, 128, window)


@pytest.mark.parametrize("window", [0, 300])
def test_chunked_equals_plain(window):
    checks.check_attention(chunked.attend, 2048, 32, 8, 128, window)


def test_cudnn_with_more_documents_than_it_takes_equals_plain():
    """T 1024 has room for 8 documents; 20 take the other branch."""
    needs_cudnn()
    assert cudnn.most_documents(1024) < 20
    checks.check_attention(cudnn.attend, 1024, 32, 8, 128, 0, documents=20)


@pytest.mark.parametrize(
    ("form", "rows"), [(form, rows) for form in ("stacked", "prepared", "picked") for rows in (1, 8)]
)
def test_decode_equals_prefill(form, rows):
    checks.check_decode(form, rows, **MIXTRAL)


def test_train_step_is_near_float32():
    shape = dict(d_model=1024, d_ff=3584, num_heads=8, num_kv_heads=2, head_dim=128, vocab_size=4096, num_experts=8)
    checks.check_train_step(**shape, num_layers=2, max_seq_len=1024)


def test_auto_chooses_what_runs_here():
    model = dataclasses.replace(tiny().model, attention="auto", expert_backend="auto", dispatch="auto")
    half = backends.resolve(dataclasses.replace(model, dtype="bfloat16"))
    assert half.attention == ("cudnn" if backends._capability() >= (9, 0) else "chunked")
    assert half.expert_backend == ("tokamax" if importlib.util.find_spec("tokamax") else "blocks")
    assert backends.resolve(dataclasses.replace(model, dtype="float32")).attention == "chunked"


@pytest.mark.slow
def test_the_demo_learns_as_on_a_cpu(tmp_path):
    """300 steps beside the reference of demo_curve.py. 5%: another Python is another corpus; on a GPU float32 products are tf32."""
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, "train.py", "--config=configs/tiny.py:steps=300", f"--workdir={tmp_path}/run"]
    subprocess.run([*command, "--config.train.log_every=1"], cwd=ROOT, env=environment, check=True, timeout=900)
    assert jax.default_backend() == "gpu", "the command above has chosen alike"
    demo_curve.assert_learns_alike(demo_curve.curve(tmp_path / "run"), demo_curve.reference(), 0.05)
