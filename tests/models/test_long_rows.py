"""Memory of a forward and backward pass over long rows, as the compiler lays it out: linear in T."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from mixtral_jax.losses import Totals
from mixtral_jax.models import mixtral
from mixtral_jax.stages import STAGES
from tests.helpers import on_mesh, random_batch, tiny, train


def temporaries(t: int, attention: str) -> int:
    """Bytes of the compiled loss and gradient of one row of T, beside parameters and gradients; nothing is run."""
    long = dict(model__max_seq_len=32768, train__seq_len=t, train__batch_size=1, model__expert_block=256)
    config = tiny(model__attention=attention, model__remat="full", loss__head_chunk=512, **long)

    def loss(params, batch):
        return STAGES["pretrain"].loss(params, batch, Totals.of(batch), config)[0]

    names = ("tokens_BT", "targets_BT", "positions_BT", "segment_ids_BT")
    batch = {name: jax.ShapeDtypeStruct((1, t), jnp.int32) for name in names}
    batch["loss_weights_BT"] = jax.ShapeDtypeStruct((1, t), jnp.float32)
    compiled = jax.jit(jax.grad(loss)).lower(mixtral.abstract(config.model), batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_is_linear_up_to_32k_tokens():
    sizes = [temporaries(t, "chunked") for t in (8192, 16384, 32768)]
    for small, large in itertools.pairwise(sizes):
        assert large / small <= 2.2, f"{sizes} bytes at 8k, 16k and 32k"
    assert sizes[0] < 4 * 8192**2, "a single head's scores at 8k would be more than all of this"


@pytest.mark.slow
def test_plain_is_quadratic():
    """What the test above would see if something were."""
    assert temporaries(8192, "plain") / temporaries(4096, "plain") > 3.5


@pytest.mark.slow
def test_a_step_of_32k_tokens_runs():
    config = tiny(
        model__max_seq_len=32768,
        train__seq_len=32768,
        train__batch_size=1,
        model__num_layers=1,
        model__expert_block=256,
        model__remat="full",
        loss__head_chunk=512,
    )
    _, log = train(*on_mesh(config), [random_batch(config)])
    assert log[0]["tokens"] > 32000
    assert log[0]["loss"] > 0
    assert not log[0]["halted"]
