"""Heads, ffn and vocabulary stay split over `tensor`: read from the compiled module of the loss and its gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from mixtral_jax.losses import Totals
from mixtral_jax.models import mixtral, moe
from mixtral_jax.sharding import act_spec, place
from mixtral_jax.stages import STAGES
from tests.helpers import on_mesh, random_batch, shard, tiny

# Sizes that occur nowhere else, whole or halved.
N, F, V = 22, 104, 1040


@functools.cache
def compiled(**axes) -> list[str]:
    """The lines of the compiled module that say what an instruction makes."""
    sizes = dict(model__num_heads=N, model__num_kv_heads=2, model__d_ff=F, model__vocab_size=V, model__num_layers=1)
    config, mesh = on_mesh(tiny(train__batch_size=4, loss__head_chunk=8, **sizes), **axes)

    def loss(params, batch):
        return STAGES["pretrain"].loss(params, batch, Totals.of(batch), config)[0]

    params, batch = mixtral.init(config.model, jax.random.key(0)), random_batch(config)
    with jax.set_mesh(mesh):
        arguments = shard(params, mesh), place(batch, mesh)
        text = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile().as_text()
    return [line for line in text.splitlines() if " = " in line]


def with_dimension(lines: list[str], size: int) -> list[str]:
    return [line for line in lines if re.search(rf"\[(\d+,)*{size}(,\d+)*\]", line.split(" = ")[1].split("(")[0])]


@pytest.mark.parametrize("axes", [dict(tensor=2, fsdp=2), dict(tensor=2, context=2)], ids=str)
def test_no_device_has_all_heads_all_of_ffn_or_all_logits(axes):
    lines = compiled(**axes)
    for size in (N, F, V):
        assert not with_dimension(lines, size), f"whole dimension {size}: {with_dimension(lines, size)[0][:200]}"
        assert with_dimension(lines, size // 2), (
            f"nothing of size {size // 2} says that the test reads the module wrongly"
        )


def test_the_heads_gradient_is_reduced_once_and_not_with_every_chunk():
    lines = with_dimension(compiled(tensor=2, fsdp=2), V // 2)
    reduced = [line for line in lines if re.search(r" (all-reduce|reduce-scatter)\(", line)]
    assert reduced, "the gradient of the head must be summed over fsdp somewhere"
    assert not [line for line in reduced if "/while/" in line]
    collectives = [line for line in lines if re.search(r" (all-gather|all-to-all|collective-permute)\(", line)]
    assert len(collectives) == 2, "the head and the embedding are gathered over fsdp, the logits never"


def test_the_routers_choice_gathers_nobody_elses_tokens():
    config, mesh = on_mesh(tiny(), fsdp=2, expert=2, context=2)
    shape = (config.train.batch_size, config.train.seq_len, config.model.num_experts)
    with jax.set_mesh(mesh):
        scores = jax.device_put(jnp.ones(shape), jax.NamedSharding(mesh, act_spec("BTE")))
        text = jax.jit(lambda x_BTE: moe.top_k(x_BTE, 2)).lower(scores).compile().as_text()
    assert "all-gather" not in text
