"""The reader of compiled modules: every way in which XLA writes groups, loops and collectives, and a real module."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mixtral_jax.config import MeshConfig
from mixtral_jax.plan import amounts, hlo
from mixtral_jax.sharding import make_mesh

AXES = ("data", "fsdp", "expert", "context", "tensor")
MODULE = """HloModule jit_step, is_scheduled=true

%add.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%cond.3 (p: (s32[], f32[8,4])) -> pred[] {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %limit = s32[] constant(5)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body.2 (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%p.1), index=1
  %gathered = f32[16,4]{1,0} all-gather(%x), channel_id=1, GROUPS, dimensions={0}, use_global_device_ids=true, metadata={op_name="jit(step)/while/body/gather"}
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i.1, %x)
}

%all-reduce-scatter.1 (q: bf16[64]) -> bf16[32] {
  %q = bf16[64]{0} parameter(0)
  %r = bf16[64]{0} all-reduce(%q), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add.1
  ROOT %s = bf16[32]{0} slice(%r), slice={[0:32]}
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x.2 = f32[8,4]{1,0} parameter(0)
  %w = (s32[], f32[8,4]{1,0}) while(%x.2), condition=%cond.3, body=%body.2
  %f = bf16[32]{0} fusion(%x.2), kind=kCustom, calls=%all-reduce-scatter.1
  %ag = (f32[4]{0}, f32[16]{0}) all-gather-start(%x.2), channel_id=3, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
  %done = f32[16]{0} all-gather-done(%ag)
  %alone = f32[8,4]{1,0} all-reduce(%x.2), channel_id=4, replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add.1
  %rs = f32[4]{0} reduce-scatter(%x.2), channel_id=7, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}, to_apply=%add.1
  %ar = f32[4]{0} all-reduce(%x.2), channel_id=8, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add.1
  %p.9 = f32[8,4]{1,0} collective-permute(%x.2), channel_id=5, source_target_pairs={{0,4},{4,0},{1,5},{5,1}}
  %rows = bf16[100,2]{1,0} copy(%x.2)
  %room = bf16[400,2]{1,0} broadcast(%x.2)
  ROOT %rag = bf16[400,2]{1,0} ragged-all-to-all(%rows, %room, %o, %o, %o, %o), channel_id=6, replica_groups={{0,2,4,6},{1,3,5,7}}
}
"""
GROUPS = {
    "list": "replica_groups={{0,1},{2,3},{4,5},{6,7}}",
    "iota": "replica_groups=[4,2]<=[8]",
    "iota, transposed": "replica_groups=[4,2]<=[2,4]T(1,0)",
    "mesh": "replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}",
    "mesh, transposed": "replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([2,2,2]T(1,0,2)) {'axis_0'}",
    "part of an axis of a mesh": "replica_groups=mesh['axis_0'=8] {'axis_0':(1)2}",
}
FSDP2_EXPERT4 = (1, 2, 4, 1, 1)


@pytest.mark.parametrize(
    ("groups", "shape", "axes"),
    [
        ("list", (4, 1, 1, 1, 2), ("tensor",)),
        ("list", (1, 4, 1, 2, 1), ("context",)),
        ("list", (2, 2, 2, 1, 1), ("expert",)),
        ("iota", (2, 2, 2, 1, 1), ("expert",)),
        ("iota, transposed", FSDP2_EXPERT4, ("fsdp",)),
        ("mesh", (2, 2, 2, 1, 1), ("expert",)),
        ("mesh, transposed", (2, 2, 2, 1, 1), ("fsdp",)),
        ("part of an axis of a mesh", (2, 2, 2, 1, 1), ("data",)),
    ],
)
def test_groups_are_read_as_axes(groups, shape, axes):
    found = hlo.collectives(MODULE.replace("GROUPS", GROUPS[groups]), shape, AXES)
    loop = next(one for one in found if "while/body" in one.name)
    assert loop.axes == axes
    assert (loop.times, loop.size, loop.bytes) == (5, 2, 16 * 4 * 4 / 2)


def test_each_kind_counts_what_a_device_receives():
    found = hlo.collectives(MODULE.replace("GROUPS", GROUPS["list"]), (4, 1, 1, 1, 2), AXES)
    got = {(one.kind, one.axes): (one.bytes, one.times) for one in found}
    assert got == {
        ("all-gather", ("tensor",)): (128.0, 5),
        ("reduce-scatter", ("tensor",)): (64.0, 1),  # an all-reduce that is sliced at once
        ("all-gather", ("data",)): (16 * 4 * 3 / 4, 1),  # of an asynchronous one only the result
        ("reduce-scatter", ("data",)): (4 * 4 * 3.0, 1),
        ("all-reduce", ("data",)): (4 * 4 * 2 * 3 / 4, 1),
        ("collective-permute", ("data",)): (128.0, 1),
        ("ragged-all-to-all", ("data",)): (400 * 3 / 4, 1),  # the rows there are, not the room for more
    }


def test_bytes_over_several_axes_are_divided_and_not_lost():
    sizes = dict(zip(AXES, (1, 2, 4, 1, 1)))
    parts = amounts.split(("fsdp", "expert"), 700.0, sizes)
    assert parts == {"expert": 600.0, "fsdp": 100.0}
    assert amounts.split(("expert",), 300.0, sizes) == {"expert": 300.0}


def test_a_real_module_in_a_loop():
    """A gather over one axis and a sum over two, three times: known bytes."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, expert=2, context=1, tensor=2))

    def shard(x):
        def body(x, _):
            whole = jax.lax.all_gather(x, "tensor", axis=0, tiled=True)
            return x + jax.lax.psum(whole[: x.shape[0]], ("data", "expert")), None

        return jax.lax.scan(body, x, None, length=3)[0]

    spec = PartitionSpec("tensor")
    step = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    text = (
        step.lower(jax.ShapeDtypeStruct((64, 8), jnp.float32, sharding=NamedSharding(mesh, spec))).compile().as_text()
    )
    found = hlo.collectives(text, tuple(mesh.shape.values()), mesh.axis_names)
    assert {(one.kind, one.axes, one.times) for one in found} == {
        ("all-gather", ("tensor",), 3),
        ("all-reduce", ("data", "expert"), 3),
    }
    got = amounts.by_axis(found, dict(mesh.shape))
    part = 32 * 8 * 4
    assert got == pytest.approx({"tensor": 3 * part, "expert": 3 * 2 * part / 2, "data": 3 * 2 * part / 4})
    assert np.isclose(sum(got.values()), 3 * part + 3 * 2 * part * 3 / 4)
