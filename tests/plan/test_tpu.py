"""Ahead of time for TPUs, without one: needs libtpu (pip install -r requirements-tpu.txt) and is skipped without it."""

import dataclasses
import importlib.util

import pytest

from configs import mixtral_8x7b
from mixtral_jax.config import from_config_dict
from mixtral_jax.plan import aot, chips, result, table

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]


def small():
    """The 8x7B's proportions at a size that compiles in seconds, with heads as wide as the kernels need."""
    c = mixtral_8x7b.get_config()
    c.model.update(num_layers=2, d_model=512, num_heads=4, num_kv_heads=2, d_ff=1024, vocab_size=2048, remat="full")
    c.mesh.update(data=1, fsdp=2, expert=4)
    c.train.update(batch_size=16, seq_len=512, accumulation_steps=2)
    return from_config_dict(c)


def test_a_step_compiles_with_the_pod_s_own_paths_and_moves_what_the_formula_says():
    topology = chips.parse_topology("v5p:2x2x2")
    plan = result.make(small(), topology, aot.topology_devices(topology), quiet=True)
    assert plan["fits"] is True
    assert plan["backends"] == {"attention": "splash", "dispatch": "ragged", "expert_backend": "megablox"}
    assert {"ragged_all_to_all", "megablox gmm", "megablox tgmm", "splash attention"} <= plan["paths"].keys()
    assert plan["traffic_bytes_per_device"]["collectives"]["ragged-all-to-all"] == 6
    for axis, formula in plan["traffic_bytes_per_device"]["formula"].items():
        assert plan["traffic_bytes_per_device"]["compiled"][axis] == pytest.approx(formula, rel=0.05), axis
    assert plan["largest_buffers"]
    assert plan["hbm_bytes_needed"] > sum(plan["hbm_bytes_per_device"][name] for name in ("parameters", "optimizer"))


def test_what_does_not_fit_is_an_answer():
    topology = chips.parse_topology("v6e:4x4")
    config = from_config_dict(mixtral_8x7b.get_config())
    config = dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, data=1, fsdp=2, expert=8),
        train=dataclasses.replace(config.train, batch_size=16, accumulation_steps=1),
    )
    plan = result.make(config, topology, aot.topology_devices(topology), quiet=True)
    assert plan["fits"] is False
    assert plan["memory_from"] == "the compiler"
    assert plan["hbm_bytes_needed"] > plan["hbm_bytes_available"] == pytest.approx(31.25 * 2**30, rel=1e-3)
    assert plan["largest_buffers"]
    assert plan["knobs"]
    assert "DOES NOT FIT" in table.plan(plan)
