"""FLOPs and peaks, the header, router health, numbers for people."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import common
from mixtral_jax import metrics
from mixtral_jax.config import from_config_dict

MIXTRAL = from_config_dict(common.base())


@pytest.mark.parametrize(("seq_len", "giga"), [(4096, 79.7), (8192, 82.9), (32768, 102.3)])
def test_flops_of_8x7b(seq_len, giga):
    assert round(metrics.flops_per_token(MIXTRAL.model, seq_len) / 1e9, 1) == giga


def test_flops_by_hand():
    model = dataclasses.replace(
        MIXTRAL.model, num_layers=2, d_model=3, num_heads=4, num_kv_heads=2, head_dim=2, d_ff=5, num_experts=4
    )
    model = dataclasses.replace(model, experts_per_token=1, vocab_size=7)
    attention = 3 * 8 + 8 * 3 + 2 * 3 * 4  # q, o, k and v
    assert metrics.flops_per_token(model, 10) == 6 * (2 * (attention + 3 * 3 * 5 + 3 * 4) + 7 * 3) + 6 * 2 * 8 * 10


def test_window_counts_the_mean_visible_keys():
    """Against a count over all queries; the convention S/2 leaves out the half key of the diagonal."""
    for seq_len, window in [(64, 16), (64, 1), (1000, 999), (64, 64), (64, 100), (64, 0)]:
        visible = np.mean([min(t + 1, window or seq_len) for t in range(seq_len)])
        assert metrics.mean_visible_keys(seq_len, window) == pytest.approx(visible, abs=0.51)
    windowed = dataclasses.replace(MIXTRAL.model, sliding_window=1024)
    less = metrics.flops_per_token(MIXTRAL.model, 4096) - metrics.flops_per_token(windowed, 4096)
    assert less == 12 * 32 * 4096 * (2048 - (1024 - 128))


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        ("TPU v4", "bfloat16", 275e12),
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5", "bfloat16", 459e12),
        ("TPU v5p", "float32", 459e12),
        ("TPU v6 lite", "bfloat16", 918e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 80GB HBM3", "float32", 494.5e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "float32", 156e12),
    ],
)
def test_peaks_by_device_kind(kind, dtype, peak):
    device = SimpleNamespace(device_kind=kind, platform="x", process_index=0)
    assert metrics.device_peak_flops(device, dtype)[0] == peak
    assert metrics.mesh_peak_flops(np.array([[device, device]]), dtype)[0] == 2 * peak
    assert "data sheet" in metrics.device_peak_flops(device, dtype)[1]


def test_cpu_peak_is_measured_and_counts_once(monkeypatch):
    peak, source = metrics.device_peak_flops(jax.devices()[0], "float32")
    assert 1e8 < peak < 1e15
    assert "measured matmul rate" in source
    monkeypatch.setattr(metrics, "_matmul_rate", lambda device, dtype: 7.0)
    peak, source = metrics.mesh_peak_flops(jax.devices(), "float32")
    assert peak == 7.0
    assert "8 CPU devices share one CPU" in source


def test_numbers_for_people():
    assert [metrics.human(x) for x in (0, 7, 999, 41234, 999_999, 46.7e9)] == [
        "0",
        "7",
        "999",
        "41.2k",
        "1.00M",
        "46.7B",
    ]
    assert metrics.human(46_702_792_704, 4) == "46.70B"
    assert metrics.human(1000e6, 4) == "1.000B"
    assert [metrics.short_float(x) for x in (3e-4, 2.97e-5, 0.04, 0, 1234.0)] == [
        "3e-4",
        "2.97e-5",
        "0.04",
        "0",
        "1.23e3",
    ]


def make_header(loss=None, model=MIXTRAL.model, **changes):
    config = dataclasses.replace(MIXTRAL, model=model, loss=dataclasses.replace(MIXTRAL.loss, **(loss or {})))
    values = {
        "total_params": 46_702_792_704,
        "active_params": 12_879_925_248,
        "mesh_shape": {"data": 1, "fsdp": 8, "expert": 4, "context": 1, "tensor": 1},
        "tokenizer_name": "mistral-v1",
        "num_train_tokens": 500_000_000,
        "device_kind": "TPU v5",
        "num_devices": 32,
        "peak": 32 * 459e12,
        "peak_source": "data sheet",
    }
    return metrics.header(config, **(values | changes))


def test_header_says_what_matters():
    text = make_header()
    for part in (
        *(
            "46.70B parameters",
            "12.88B active",
            "1,048,576 tokens per step",
            "1,000 steps",
            "1.05B tokens",
            "2.1 epochs",
        ),
        *("32 x TPU v5", "fsdp 8, expert 4", "bfloat16", "8, top 2", "blocks", "per_layer, weight 0.04", "weight 1e-3"),
        *("adamw", "warmup_cosine", "3e-4", "3e-5", "79.7 GF", "causal", "14.7 PFLOP/s", "data sheet", "mistral-v1"),
    ):
        assert part in text
    assert "logit z    OFF" in text
    # Aligned: every text starts in the same column.
    assert {line[12] == " " and line[13] != " " for line in text.split("\n")} == {True}


def test_header_says_where_a_bound_on_buffers_means_nothing():
    """dispatch=auto is the ring on CPUs and GPUs, which drops nothing whatever the factor."""
    bounded = dataclasses.replace(MIXTRAL.model, buffer_factor=1.5)
    text = make_header(model=bounded)
    assert "dispatch ring, which has no use for model.buffer_factor" in text
    assert "at most 1.5 times" not in text
    assert "dispatch ragged, at most 1.5 times" in make_header(model=dataclasses.replace(bounded, dispatch="ragged"))


def test_header_says_off_loudly_and_does_without_epochs():
    text = make_header(loss={"balance_weight": 0.0, "router_z_weight": 0.0, "z_weight": 1e-4}, num_train_tokens=0)
    assert "balance    OFF (weight 0)" in text
    assert "router z   OFF" in text
    assert "logit z    weight 1e-4" in text
    assert "epoch" not in text


def test_router_health_by_hand():
    health = metrics.router_health([[2, 2, 2, 2], [8, 0, 4, 4]], [math.log(4), math.log(2)], [0.0, 0.25])
    assert health["max_over_mean_L"] == [1.0, 2.0]
    assert health["min_share_L"] == [0.25, 0.0]
    assert health["entropy_relative_L"] == pytest.approx([1.0, 0.5])
    assert (health["max_over_mean"], health["min_share"], health["dropped"]) == (2.0, 0.0, 0.125)
    shares = metrics.router_health(np.array([[0.25] * 4, [0.5, 0, 0.25, 0.25]]), health["entropy_L"], [0.0, 0.25])
    assert shares == health
    with pytest.raises(ValueError, match=r"\(4,\)"):
        metrics.router_health([1, 1, 1, 1], [1.0], [0.0])


def test_router_table():
    lines = metrics.router_table([[2, 2, 2, 2], [8, 0, 4, 4]], [math.log(4), math.log(2)], [0.0, 0.25]).split("\n")
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1
    assert "▄ 25.0  ▄ 25.0" in lines[1]
    assert "█ 50.0     0.0" in lines[2]
    assert "2.00" in lines[2]
    assert "( 50% of max)" in lines[2]
    assert "25.00%" in lines[2]
    many = metrics.router_table(np.ones((2, 64)), [1.0, 1.0], [0, 0]).split("\n")
    assert many[1].count("▄") == 64
    assert len({len(line) for line in many}) == 1
