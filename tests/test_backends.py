"""Which implementation runs on which platform, and that it is chosen for the platform a program is lowered for."""

import dataclasses

import jax
import pytest

from mixtral_jax import backends
from mixtral_jax.config import UserError
from mixtral_jax.models import dispatch, moe
from tests.helpers import tiny
from tests.models.test_dispatch import WIDTH, B, K, T, layer_config, layer_inputs, mesh_of


def lowered(platform, **changes):
    """The text of forward and backward through a scan of checkpointed layers, lowered for a platform that is not here."""
    x, gates, index, weights = layer_inputs("random")
    config = layer_config(**changes)

    def loss(x, gates, weights):
        def body(x, _):
            return x + moe.experts(x, gates, index, *weights, config)[0], None

        return jax.lax.scan(jax.checkpoint(body), x, None, length=2)[0].sum()

    with jax.set_mesh(mesh_of(expert=2, fsdp=2)):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(x, gates, weights)
        return traced.lower(lowering_platforms=(platform,)).as_text()


def test_a_tpu_gets_the_real_exchange_and_the_real_kernels_and_a_cpu_the_emulations():
    """Chosen when lowering, so that a machine without TPUs can compile for them."""
    rows = B // 4 * T * K
    gathered_rows = f"tensor<2x{rows}x{WIDTH}xf32>"
    tpu = lowered("tpu", dispatch="ragged", expert_backend="megablox")
    # Forward, forward again for the backward pass, and backward: there and back each.
    assert tpu.count("custom_call @ragged_all_to_all(") == 6
    assert "@tpu_custom_call" in tpu
    assert gathered_rows not in tpu, "the emulation's all-gather of rows"
    cpu = lowered("cpu", dispatch="ragged", expert_backend="blocks")
    assert "ragged_all_to_all" not in cpu
    assert gathered_rows in cpu


def test_the_receive_buffer_is_no_residual_of_zeros():
    """Differentiating the scan must not keep the exchange's empty output [R, D] for its layers."""
    text = lowered("tpu", dispatch="ragged", expert_backend="blocks", buffer_factor=1.75)
    rows = dispatch.buffer_rows(B // 4 * T, K, 2, 4, 1.75, 4)
    wide = f"tensor<{rows}x{WIDTH}xf32>"
    assert wide in text
    assert not [line for line in text.splitlines() if "stablehlo.constant dense<0" in line and wide in line]
    outer = [line for line in text.splitlines() if "stablehlo.broadcast_in_dim %cst" in line and line.endswith(wide)]
    assert not outer


def test_backends_by_platform():
    config = dataclasses.replace(tiny().model, dispatch="auto", expert_backend="auto", dtype="bfloat16")
    named = backends.resolve(config, "tpu")
    assert (named.dispatch, named.expert_backend) == ("ragged", "megablox")
    assert backends.resolve(config, "cpu").dispatch == "ring"
    assert backends.resolve(config, "gpu").dispatch == "ring"
    assert backends.resolve(config, "gpu").expert_backend in ("tokamax", "blocks")
    kept = backends.resolve(dataclasses.replace(config, dispatch="ragged", expert_backend="dense"), "gpu")
    assert (kept.dispatch, kept.expert_backend) == ("ragged", "dense")


@pytest.mark.parametrize(
    ("key", "name", "platform", "instead"),
    [
        ("expert_backend", "megablox", "gpu", "tokamax, blocks"),
        ("expert_backend", "tokamax", "tpu", "megablox, blocks"),
        ("attention", "splash", "gpu", "cudnn, chunked"),
        ("attention", "cudnn", "tpu", "splash, chunked"),
    ],
)
def test_kernels_of_another_platform_are_refused(key, name, platform, instead):
    config = dataclasses.replace(tiny().model, **{key: name})
    with pytest.raises(UserError, match=rf"model.{key}={name}.*{instead}"):
        backends.resolve(config, platform)
