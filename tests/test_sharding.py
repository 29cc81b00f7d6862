"""Shardings read off names, and the errors of names that say nothing."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mixtral_jax.config import MeshConfig
from mixtral_jax.sharding import act_spec, batch_sharding, make_mesh, named_leaves, param_spec, place


def test_specs_follow_the_letters():
    assert param_spec("w_gate_EDF", 3) == P("expert", "fsdp", "tensor")
    assert param_spec("w_gate_EDF", 4) == P(None, "expert", "fsdp", "tensor")
    assert param_spec("w_o_NHD", 3) == P("tensor", None, "fsdp")
    assert param_spec("embedding_VD", 2) == P(("tensor", "fsdp"), None)
    assert act_spec("BTD") == P(("data", "fsdp", "expert"), "context", None)


@pytest.mark.parametrize(
    ("name", "ndim"), [("w_gate", 2), ("w_gate_EDF", 2), ("w_gate_EDF", 5), ("w_DQ", 2), ("bias", 1)]
)
def test_a_name_that_does_not_fit_raises(name, ndim):
    with pytest.raises(ValueError, match=name):
        param_spec(name, ndim)


def test_every_parameter_of_the_model_has_a_spec():
    from mixtral_jax.models import mixtral
    from tests.helpers import tiny

    for name, leaf in named_leaves(mixtral.abstract(tiny(model__router_bias=True).model)).items():
        assert len(param_spec(name.rpartition(".")[2], leaf.ndim)) == leaf.ndim, name


def test_place_puts_rows_where_the_batch_axes_are():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2, context=1, tensor=1))
    rows = np.arange(8 * 4, dtype=np.int32).reshape(8, 4)
    placed = place({"tokens_BT": rows, "documents": [["a"]] * 8}, mesh)
    assert placed.keys() == {"tokens_BT"}
    assert placed["tokens_BT"].sharding == batch_sharding(mesh)
    assert placed["tokens_BT"].addressable_shards[3].data.shape == (1, 4)
    np.testing.assert_array_equal(jax.device_get(placed["tokens_BT"]), rows)
