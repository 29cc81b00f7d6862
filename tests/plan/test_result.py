"""The plan as a whole: fields of the JSON, tables, the picture, bounds, the search, and mistakes explained."""

import dataclasses
import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from configs import mixtral_8x7b, mixtral_8x22b
from mixtral_jax import metrics
from mixtral_jax.config import UserError, from_config_dict
from mixtral_jax.plan import amounts, aot, bounds, chips, plot, result, search, table, traffic
from tests.helpers import tiny
from tests.plan import NODE

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def plan():
    config = tiny(mesh__fsdp=2, mesh__expert=-1, model__num_layers=1)
    return result.make(config, NODE, jax.devices(), quiet=True)


def test_the_json_has_what_the_design_promises(plan):
    read = json.loads(json.dumps(plan))
    assert read["fits"] is True
    assert read["estimated"] is True, "a GPU's plan is compiled for a CPU"
    assert read["mesh"] == {"data": 1, "fsdp": 2, "expert": 4, "context": 1, "tensor": 1}
    assert read["parameters"] > read["active_parameters"] > 0
    assert set(read["hbm_bytes_per_device"]) == set(plot.COLOURS)
    assert read["hbm_bytes_needed"] == sum(read["hbm_bytes_per_device"].values())
    assert 0 < read["mfu_predicted"] <= read["mfu_ceiling"] <= 1
    assert read["traffic_bytes_per_device"]["compiled"].keys() == {"fsdp", "expert"}
    assert read["memory_from"] == "the compiler"
    assert read["dropless"]["price_bytes"] >= 0
    assert read["config"]["mesh"]["expert"] == 4


def test_tables_and_the_picture(plan, tmp_path):
    text = table.plan(plan)
    for word in (
        "fsdp 2 x expert 4",
        "parameters",
        "optimizer",
        "fits",
        "MFU ceiling",
        "estimated",
        "staying dropless",
    ):
        assert word in text
    plot.draw([plan, plan | {"fits": False}], tmp_path / "plan.png")
    head = (tmp_path / "plan.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", head[16:24])) > 200


def test_what_does_not_fit_says_what_is_large_and_what_would_help():
    config = from_config_dict(mixtral_8x7b.get_config())
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=1, fsdp=1, expert=8))
    plan = result.make(config, NODE, jax.devices(), compiled=False)
    assert plan["fits"] is False
    assert plan["largest_buffers"][0]["bytes"] > 2**30
    assert plan["knobs"]
    text = table.plan(plan)
    assert "DOES NOT FIT" in text
    assert plan["knobs"][0] in text
    assert plan["memory_from"] == "formulas"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v9:4x4x4", ["v9:4x4x4", "v5p:4x4x4", "h100:8x8"]),
        ("v5p", ["CHIP:SHAPE"]),
        ("v5p:4x4", ["torus of 3", "2 numbers"]),
        ("v6e:4x4x4", ["torus of 2", "3 numbers"]),
        ("h100:4x16", ["8 GPUs", "16"]),
        ("v5p:0x4x4", ["torus of 3"]),
    ],
)
def test_unknown_topologies_are_explained(name, words):
    with pytest.raises(UserError) as error:
        chips.parse_topology(name)
    for word in words:
        assert word in str(error.value)


def test_a_mesh_that_does_not_fit_names_both_numbers():
    with pytest.raises(UserError, match=r"v5p:4x4x4 has 64 chips.*needs 6 devices and there are 64"):
        result.resolve(tiny(mesh__fsdp=6), chips.parse_topology("v5p:4x4x4"))


def test_a_gpus_own_kernels_are_planned_with_the_cpus_and_a_tpus_are_refused():
    named = tiny(mesh__fsdp=8, model__dtype="bfloat16", model__attention="cudnn", model__expert_backend="tokamax")
    model = result.resolve(named, NODE).model
    assert (model.attention, model.expert_backend) == ("chunked", "blocks")
    with pytest.raises(UserError, match=r"model\.expert_backend=megablox.*gpu"):
        result.resolve(tiny(mesh__fsdp=8, model__expert_backend="megablox"), NODE)


def test_libtpu_missing_says_what_to_install(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -r requirements-tpu\.txt"):
        aot.topology_devices(chips.parse_topology("v5p:4x4x4"))


def test_too_few_fake_devices_are_explained():
    with pytest.raises(UserError, match=r"needs 64 fake CPU devices and there are 8"):
        aot.topology_devices(chips.parse_topology("h100:8x8"))


def test_wires_of_a_torus_and_of_nodes():
    v5p, v6e, h100 = (chips.parse_topology(name) for name in ("v5p:4x4x8", "v6e:8x16", "h100:2x8"))
    assert chips.wire(v5p, [4, 1, 1]).bandwidth == 2 * 90e9, "a ring: both directions"
    assert chips.wire(v5p, [2, 1, 1]).bandwidth == 90e9, "half a dimension has no way round"
    assert chips.wire(v5p, [4, 4, 1]).bandwidth == 4 * 90e9
    assert chips.wire(v6e, [8, 1]).bandwidth == 90e9, "v6e wraps from 16 on"
    assert chips.wire(v6e, [1, 16]).bandwidth == 2 * 90e9
    # A ring of 4 with S bytes each: S * 4 / 8 over one link; of these S bytes 3/4 move.
    assert chips.wire(v5p, [4, 1, 1]).all_to_all == pytest.approx(90e9 * 8 / 4 * 3 / 4)
    assert chips.wire(h100, [1, 8]).bandwidth == 450e9
    assert chips.wire(h100, [2, 8]).bandwidth == 50e9


def test_extents_follow_the_coordinates():
    topology = chips.parse_topology("h100:2x8")
    places = chips.gpu_coordinates(topology, (1, 2, 8, 1, 1))
    assert chips.axis_extents(topology, places) == {0: [1, 1], 1: [2, 1], 2: [1, 8], 3: [1, 1], 4: [1, 1]}


def test_flops_and_bounds_by_hand():
    config = result.resolve(tiny(mesh__fsdp=8, mesh__expert=1), NODE)
    per_token = metrics.flops_per_token(config.model, 32)
    again = {"none": 0, "full": per_token / 3 - 2 * 128 * 32}
    for remat, extra in again.items():
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
        always = 2 * 128 * 32 + 2 * 2 * 4 * 32 * 48  # the head's logits; gate and up of two layers and two experts
        assert bounds.executed_flops(changed) == pytest.approx((per_token + extra + always) * 8 * 32 / 8)
    wires = {"fsdp": chips.Wire(1e3, 1e3, "slow")}
    times = bounds.seconds(config, NODE, wires, traffic.transfers(config), 10**5)
    moved = amounts.by_axis(traffic.transfers(config), {"fsdp": 8})["fsdp"]
    assert times["bound_by"] == "interconnect, fsdp"
    assert times["bound"] == times["interconnect"]["fsdp"] == pytest.approx(moved / 1e3)
    ideal = per_token * 8 * 32 / 8 / NODE.chip.peak_flops
    assert times["mfu_ceiling"] == pytest.approx(ideal / times["bound"])


def test_the_search_ranks_what_fits_and_compiles_the_best():
    config = tiny(model__num_layers=1, train__batch_size=16)
    found = search.search(config, NODE, jax.devices(), compile_best=1, quiet=True)
    meshes = {tuple(one.mesh.__dict__.values()) for one in search.candidates(config, NODE)}
    assert found["tried"] > len(meshes) > 20
    assert all(math.prod(mesh) == 8 for mesh in meshes)
    times = [float(f"{one['seconds_per_step']['predicted']:.3g}") for one in found["estimates"]]
    assert times == sorted(times)
    assert found["plans"][0]["memory_from"] == "the compiler"
    assert found["plans"][0]["mesh"] == found["estimates"][0]["mesh"]
    assert "s/step" in table.ranking(found["plans"])


def test_offload_is_planned_by_formula():
    """The moments lie on the host; what does not fit the devices does not crash the plan."""
    here = result.make(tiny(mesh__fsdp=8), NODE, jax.devices(), compiled=False)
    there = result.make(
        tiny(mesh__fsdp=8, optim__offload=True, model__remat="offload"), NODE, jax.devices(), compiled=False
    )
    assert there["hbm_bytes_per_device"]["optimizer"] == 0
    assert there["host_bytes_per_device"] == here["hbm_bytes_per_device"]["optimizer"] > 0
    assert "on its host" in table.plan(there)
    assert "on its host" not in table.plan(here)


def test_of_equally_fast_plans_the_one_with_more_room_is_first(monkeypatch):
    made = []

    def make(config, *rest, **more):
        made.append(
            {"fits": True, "hbm_bytes_needed": 10 - len(made), "seconds_per_step": {"predicted": 1 + len(made) / 1e6}}
        )
        return made[-1]

    monkeypatch.setattr(search.plan, "make", make)
    found = search.search(
        tiny(model__num_layers=1, train__batch_size=16), NODE, jax.devices(), compile_best=3, quiet=True
    )
    assert [one["hbm_bytes_needed"] for one in found["plans"]] == [8, 9, 10]


def test_the_search_says_when_nothing_fits():
    with pytest.raises(UserError, match=r"train\.batch_size=1"):
        search.search(tiny(train__batch_size=1, train__seq_len=1), NODE, jax.devices(), quiet=True)


@pytest.mark.parametrize(("config", "chips_"), [(mixtral_8x7b, 64), (mixtral_8x22b, 512)])
def test_the_shipped_meshes_suit_their_pods(config, chips_):
    topology = chips.parse_topology({64: "v5p:4x4x4", 512: "v5p:8x8x8"}[chips_])
    resolved = result.resolve(from_config_dict(config.get_config()), topology)
    assert resolved.model.dispatch == "ragged"
    assert topology.name in config.__doc__


def test_the_command_explains_itself(tmp_path):
    def run(*flags):
        return subprocess.run(
            [sys.executable, "-m", "mixtral_jax.plan", *flags], cwd=ROOT, capture_output=True, text=True, timeout=120
        )

    shown = run("--help")
    assert shown.returncode == 0
    assert all(word in shown.stdout for word in ("--topology", "--search", "requirements-tpu.txt", "h100:8x8"))
    wrong = run("--config=configs/tiny.py", "--topology=x:1")
    assert wrong.returncode == 2
    assert "--topology='x:1' is not known" in wrong.stderr
    out = tmp_path / "plan.json"
    done = run(
        "--config=configs/tiny.py:tiny",
        "--topology=h100:2x8",
        "--nocompile",
        f"--out={out}",
        "--config.train.batch_size=16",
        "--config.model.dtype=bfloat16",
        "--config.model.attention=cudnn",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["devices"] == 16
