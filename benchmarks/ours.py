"""What benchmarks/cpu.py measures of mixtral_jax: a function for each case that does it once and waits for the end."""

import jax
import numpy as np

from benchmarks.worker import Run, tokens
from configs.common import base, shrink
from mixtral_jax.config import Config, from_config_dict, resolve_mesh
from mixtral_jax.models import mixtral
from mixtral_jax.models.decode import decode, prefill, prepare
from mixtral_jax.models.mixtral import Block
from mixtral_jax.optim import make_optimizer
from mixtral_jax.sharding import make_mesh, place, replicated
from mixtral_jax.stages import STAGES
from mixtral_jax.step import CompiledFirst, init_state, make_train_step

MODEL = (
    "vocab_size",
    "num_layers",
    "d_model",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "d_ff",
    "num_experts",
    "experts_per_token",
)


def config_of(shape: dict) -> Config:
    """The configuration of a shape: float32, AdamW, the balance loss on, nothing recomputed."""
    c = shrink(base())
    c.model.update({name: shape[name] for name in MODEL})
    c.model.update(max_seq_len=max(2 * shape["seq_len"], 1024), dtype="float32", remat="none", expert_block=512)
    c.train.update(batch_size=shape["batch"], seq_len=shape["seq_len"], steps=100_000)
    c.loss.update(balance_weight=0.02, head_chunk=shape["seq_len"])
    c.optim.update(warmup_steps=10)
    c.mesh.update(fsdp=1)
    return resolve_mesh(from_config_dict(c), 1)


def train(_: str, shape: dict) -> Run:
    """A training step: forward, backward, clipping and AdamW."""
    config = config_of(shape)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    optimizer = make_optimizer(config.optim, config.train.steps)
    state, shardings = init_state(config, optimizer, mesh)
    jitted = jax.jit(
        make_train_step(config, optimizer, STAGES["pretrain"].loss),
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
    )
    step = CompiledFirst(jitted)
    ids = tokens(shape, shape["batch"], shape["seq_len"] + 1)
    b, t = ids.shape[0], ids.shape[1] - 1
    host = {
        "tokens_BT": ids[:, :-1],
        "targets_BT": ids[:, 1:],
        "loss_weights_BT": np.ones((b, t), np.float32),
        "positions_BT": np.broadcast_to(np.arange(t, dtype=np.int32), (b, t)).copy(),
        "segment_ids_BT": np.ones((b, t), np.int32),
    }
    held = [state]

    def run() -> None:
        with jax.set_mesh(mesh):
            held[0], metrics = step(held[0], place(host, mesh), None)
            float(metrics["loss"])

    return run


def _layer(shape: dict):
    config = config_of(shape).model
    block = jax.jit(lambda key: Block(config, mixtral.nnx.Rngs(params=key)))(jax.random.key(0))
    rng = np.random.default_rng(0)
    x_BTD = rng.standard_normal((shape["batch"], shape["seq_len"], shape["d_model"])).astype(np.float32)
    valid_BT = np.ones(x_BTD.shape[:2], bool)
    return block, x_BTD, valid_BT


def moe_forward(_: str, shape: dict) -> Run:
    """One layer of experts, router and permutes included."""
    block, x_BTD, valid_BT = _layer(shape)
    forward = jax.jit(lambda block, x: block.experts(x, valid_BT)[0])
    return lambda: jax.block_until_ready(forward(block, x_BTD))


def moe_train(_: str, shape: dict) -> Run:
    """The same with the gradients of its input and of all its weights."""
    block, x_BTD, valid_BT = _layer(shape)

    def both(block, x):
        out, pull = jax.vjp(lambda block, x: block.experts(x, valid_BT)[0], block, x)
        return pull(out)

    both = jax.jit(both)
    return lambda: jax.block_until_ready(both(block, x_BTD))


def _weights(shape: dict):
    return prepare(jax.jit(mixtral.init, static_argnums=0)(config_of(shape).model, jax.random.key(0)))


def prefill_case(_: str, shape: dict) -> Run:
    """A batch of prompts up to the logits of their next tokens."""
    weights, ids = _weights(shape), tokens(shape, shape["batch"], shape["seq_len"])
    lengths = np.full(len(ids), ids.shape[1], np.int32)
    return lambda: jax.block_until_ready(prefill(weights, ids, lengths, ids.shape[1])[0])


def decoding(rows: int):
    """Greedy decoding of some tokens for several rows, each step's tokens fetched."""

    def build(_: str, shape: dict) -> Run:
        weights, ids = _weights(shape), tokens(shape, rows, shape["prompt"])
        room = shape["prompt"] + shape["new_tokens"] + 1
        active = np.ones(rows, bool)
        logits_BV, cache = prefill(weights, ids, np.full(rows, shape["prompt"], np.int32), room)
        first = np.asarray(logits_BV.argmax(-1)).astype(np.int32)
        start = jax.device_get(cache)

        def run() -> None:
            token_B, held = first, jax.device_put(start)
            for _ in range(shape["new_tokens"]):
                logits_BV, held = decode(weights, held, token_B, active)
                token_B = np.asarray(logits_BV.argmax(-1)).astype(np.int32)

        return run

    return build


CASES = {
    "train": train,
    "moe_forward": moe_forward,
    "moe_train": moe_train,
    "prefill": prefill_case,
    "decode_1": decoding(1),
    "decode_8": decoding(8),
    "decode_32": decoding(32),
}
