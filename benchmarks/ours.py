"""What benchmarks/cpu.py and gpu.py measure of mixtral_jax: a function for each case that does it once and waits for the end.

A candidate is mixtral_jax[-OPTION...][@FLAGS]. An option is one of grouped.GROUPED (how experts multiply), of FORMS (how
decoding has its weights), remat_ and one of model.remat, offload (Adam's moments in host memory), or
tuned (tokamax's tiles are those of benchmarks/tune.py); the flags are in the environment already.
"""

import atexit
import dataclasses
import functools
import itertools
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np

from benchmarks.grouped import GROUPED
from benchmarks.worker import Run, documents_of, tokens
from configs.common import base, shrink
from mixtral_jax.config import Config, from_config_dict, resolve_mesh
from mixtral_jax.data import Batches, TokenFile, pack
from mixtral_jax.generate.sampling import largest
from mixtral_jax.kernels import BACKENDS
from mixtral_jax.metrics import device_peak_flops
from mixtral_jax.models import mixtral
from mixtral_jax.models.decode import Cache, decode, prefill, prepare
from mixtral_jax.models.layers import FLOAT32
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


FORMS = ("prepared", "picked", "stacked", "loop")
REMAT = tuple(f"remat_{name}" for name in ("none", "outputs", "dots", "full"))
OPTIONS = (*GROUPED, *FORMS, *REMAT, "tuned", "offload")


def options_of(candidate: str) -> list[str]:
    """The options in a candidate's name."""
    return candidate.partition("@")[0].split("-")[1:]


def config_of(candidate: str, shape: dict) -> Config:
    """The configuration of a shape with a candidate's options: AdamW, the balance loss on."""
    c = shrink(base())
    c.model.update({name: shape[name] for name in MODEL})
    c.model.update(
        max_seq_len=max(2 * shape["seq_len"], 1024),
        dtype=shape["dtype"],
        remat=shape["remat"],
        expert_block=512 if jax.default_backend() == "cpu" else 256,
    )
    c.train.update(batch_size=shape["batch"], seq_len=shape["seq_len"], steps=100_000)
    c.loss.update(balance_weight=0.02, head_chunk=512)
    c.optim.update(warmup_steps=10, moment_dtype=shape["moments"])
    c.mesh.update(fsdp=1)
    config = resolve_mesh(from_config_dict(c), 1)
    model = config.model
    for option in options_of(candidate):
        if option in GROUPED:
            BACKENDS[option] = GROUPED[option]  # in this process, which measures nothing else
            model = dataclasses.replace(model, expert_backend=option)
        elif option in REMAT:
            model = dataclasses.replace(model, remat=option.removeprefix("remat_"))
        elif option == "offload":
            config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, offload=True))
        elif option == "tuned":
            _use_tiles()
        elif option not in FORMS:
            raise ValueError(f"{candidate}: there is no option {option}; there are {', '.join(OPTIONS)}")
    return dataclasses.replace(config, model=model)


def _use_tiles() -> None:
    """tokamax's calls in this process find the tiles that benchmarks/tune.py has found on this device."""
    from benchmarks import tune

    path = tune.path_of(jax.devices()[0].device_kind)
    found = tune.load(path)
    if found is None:
        raise ValueError(f"{path} is not there; python -m benchmarks.tune makes it")
    found.__enter__()  # until the process ends


def about(shape: dict) -> dict:
    """The device, and of a GPU the FLOP/s of its data sheet."""
    device = jax.devices()[0]
    known = {"device": device.device_kind, "jax_platform": device.platform}
    return known | ({"peak_flops": device_peak_flops(device, shape["dtype"])[0]} if device.platform == "gpu" else {})


def device_peak_bytes(shape: dict) -> int | None:
    """The most device memory in use so far; None where it is the host's."""
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else None


def _in_dtype(tree, dtype: str):
    """Matrices in the compute dtype, as a step has them after its casts and as decoding has them."""

    def cast(path, leaf):
        return leaf if any(name in jax.tree_util.keystr(path) for name in FLOAT32) else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, tree)


def matmul(_: str, shape: dict) -> Run:
    """The rate of the machine: a square matmul of shape["square"] in shape["dtype"]."""
    a = jax.numpy.asarray(np.random.default_rng(0).standard_normal((shape["square"],) * 2), shape["dtype"])
    multiply = jax.jit(jax.numpy.matmul)
    return lambda: jax.block_until_ready(multiply(a, a))


def copy(_: str, shape: dict) -> Run:
    """The bandwidth of the machine: an array of shape["copied"] bytes is read and written."""
    source = jax.numpy.arange(shape["copied"] // 4, dtype=jax.numpy.int32)
    negate = jax.jit(jax.numpy.negative)  # XLA would return the same buffer of a plain copy
    return lambda: jax.block_until_ready(negate(source))


def read(_: str, shape: dict) -> Run:
    """The bandwidth of reading: a matrix of shape["copied"] bytes, float32, times a vector."""
    matrix = jax.numpy.ones((4096, shape["copied"] // 4096 // 4), "float32")
    multiply, vector = jax.jit(jax.numpy.matmul), jax.numpy.ones((1, 4096))
    return lambda: jax.block_until_ready(multiply(vector, matrix))


def train(candidate: str, shape: dict) -> Run:
    """A training step: forward, backward, clipping and AdamW."""
    config = config_of(candidate, shape)
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


def _layer(candidate: str, shape: dict):
    config = config_of(candidate, shape).model

    def build(key):
        return _in_dtype(Block(config, mixtral.nnx.Rngs(params=key)), config.dtype)

    x_BTD = jax.random.normal(jax.random.key(1), (shape["batch"], shape["seq_len"], shape["d_model"])).astype(
        config.dtype
    )
    return jax.jit(build)(jax.random.key(0)), x_BTD, np.ones(x_BTD.shape[:2], bool)


def moe_forward(candidate: str, shape: dict) -> Run:
    """One layer of experts, router and permutes included."""
    block, x_BTD, valid_BT = _layer(candidate, shape)
    forward = jax.jit(lambda block, x: block.experts(x, valid_BT)[0])
    return lambda: jax.block_until_ready(forward(block, x_BTD))


def moe_train(candidate: str, shape: dict) -> Run:
    """The same with the gradients of its input and of all its weights."""
    block, x_BTD, valid_BT = _layer(candidate, shape)

    def both(block, x):
        out, pull = jax.vjp(lambda block, x: block.experts(x, valid_BT)[0], block, x)
        return pull(out)

    both = jax.jit(both)
    return lambda: jax.block_until_ready(both(block, x_BTD))


def _weights(candidate: str, shape: dict):
    config = config_of(candidate, shape).model
    model = jax.jit(lambda key: _in_dtype(mixtral.init(config, key), config.dtype))(jax.random.key(0))
    return model if "stacked" in options_of(candidate) else prepare(model, "picked" in options_of(candidate))


def prefill_case(candidate: str, shape: dict) -> Run:
    """A batch of prompts up to the logits of their next tokens."""
    weights, ids = _weights(candidate, shape), tokens(shape, shape["batch"], shape["seq_len"])
    lengths = np.full(len(ids), ids.shape[1], np.int32)
    return lambda: jax.block_until_ready(prefill(weights, ids, lengths, ids.shape[1])[0])


_greedy = jax.jit(largest)


@functools.partial(jax.jit, static_argnames="steps")
def _loop(weights, cache: Cache, token_B, active_B, steps: int):
    """Greedy decoding in one program: the host waits for the last token only."""

    def one(carry, _):
        cache, token_B = carry
        logits_BV, cache = decode(weights, cache, token_B, active_B)
        token_B = largest(logits_BV)
        return (cache, token_B), token_B

    return jax.lax.scan(one, (cache, token_B), length=steps)[1]


def decoding(rows: int):
    """Greedy decoding of some tokens for several rows, each step's tokens fetched; with `loop` all at the end."""

    def build(candidate: str, shape: dict) -> Run:
        weights, ids = _weights(candidate, shape), tokens(shape, rows, shape["prompt"])
        room = shape["prompt"] + shape["new_tokens"] + 1
        active = np.ones(rows, bool)
        logits_BV, cache = prefill(weights, ids, np.full(rows, shape["prompt"], np.int32), room)
        first = np.asarray(logits_BV.argmax(-1)).astype(np.int32)
        start = jax.device_get(cache)

        def loop() -> np.ndarray:
            return np.asarray(_loop(weights, jax.device_put(start), first, active, shape["new_tokens"]))

        def run() -> np.ndarray:
            token_B, held, made = first, jax.device_put(start), []
            for _ in range(shape["new_tokens"]):
                logits_BV, held = decode(weights, held, token_B, active)
                # As generate/engine.py: a token is fetched when the next step has been dispatched.
                before_B, token_B = token_B, _greedy(logits_BV)
                made.append(np.asarray(before_B))
            return np.stack([*made[1:], np.asarray(token_B)])

        return loop if "loop" in options_of(candidate) else run

    return build


def data_case(_: str, shape: dict) -> Run:
    """Shuffled batches of packed rows out of a stored token file, as the loop gets them: targets, weights, positions, documents."""
    lengths = documents_of(shape)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder, "tokens.npy")
    np.save(path, tokens(shape, 1, offsets[-1])[0].astype(np.uint16))
    names = [str(i) for i in range(len(lengths))]
    file = TokenFile(np.load(path, mmap_mode="r"), offsets, lengths, names)
    t = shape["seq_len"]
    batches = Batches(file, pack(lengths, t), batch_size=shape["batch"], seq_len=t, seed=0)
    next_ = itertools.count()

    def run() -> None:
        for _ in range(shape["batches"]):
            batches.batch(next(next_))

    return run


CASES = {
    "matmul": matmul,
    "copy": copy,
    "read": read,
    "train": train,
    "moe_forward": moe_forward,
    "moe_train": moe_train,
    "prefill": prefill_case,
    "decode_1": decoding(1),
    "decode_8": decoding(8),
    "decode_32": decoding(32),
    "data": data_case,
}
