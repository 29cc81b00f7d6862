"""How long a step must take: FLOPs over the peak, bytes over the memory's and the wires' bandwidth."""

import dataclasses
import math
from typing import Any

from mixtral_jax import metrics
from mixtral_jax.config import Config
from mixtral_jax.plan.amounts import split
from mixtral_jax.plan.chips import Topology, Wire
from mixtral_jax.plan.traffic import Transfer, tokens_of_device


def executed_flops(config: Config) -> float:
    """FLOPs a device of the mesh executes in a step: the model's, and what the backward pass computes again.

    The head's logits are computed again on more than one device; the layers where model.remat is not "none" ("outputs" and
    "offload" keep the two results of a layer and still need what led to them); the experts' gate and up by the backward
    pass of the kernels, which keep them in no plan (`blocks` does, with model.remat=none and one shard of `expert`).
    """
    model, train = config.model, config.train
    tokens = train.batch_size * train.seq_len
    head = 2 * model.vocab_size * model.d_model
    forward = metrics.flops_per_token(model, train.seq_len) / 3 - head
    gate_up = model.num_layers * model.experts_per_token * 4 * model.d_model * model.d_ff
    again = (
        (head if _devices(config) > 1 else 0)
        + gate_up
        + (forward if model.remat in ("full", "outputs", "offload") else 0)
    )
    return (metrics.flops_per_token(model, train.seq_len) + again) * tokens / _devices(config)


def memory_traffic(config: Config, parameters: int) -> float:
    """Bytes a device reads and writes in its main memory in a step, roughly: what cannot stay in the chip's caches.

    Optimizer: weights and two moments read and written, the gradient written and read twice. Weights: read and cast, written
    gathered, and read, in each pass. Activations: a layer's inputs and outputs of its matmuls, written and read.
    """
    model, mesh, train = config.model, config.mesh, config.train
    item = 2 if model.dtype == "bfloat16" else 4
    moments = 2 * (2 if config.optim.moment_dtype == "bfloat16" else 4)
    mine = parameters / (mesh.fsdp * mesh.expert * mesh.tensor)
    steps, passes = train.accumulation_steps, 3 if model.remat != "none" else 2
    state = mine * (2 * (4 + moments) + 4 * 3 + (8 * steps if steps > 1 else 0))
    gathered = parameters / (mesh.expert * mesh.tensor) * item
    weights = steps * passes * (mine * (4 + item) + 2 * gathered) + steps * 2 * gathered
    n = tokens_of_device(config)
    wide = 12 * model.d_model + 3 * (model.num_heads + 2 * model.num_kv_heads) * model.head_dim / mesh.tensor
    wide += model.experts_per_token * (4 * model.d_model + 6 * model.d_ff / mesh.tensor)
    layers = steps * model.num_layers * (passes + 1) * n * wide * item
    logits = steps * n * model.vocab_size / mesh.tensor * 4 * 6
    return state + weights + layers + logits


def seconds(
    config: Config, topology: Topology, wires: dict[str, Wire], found: list[Transfer], parameters: int
) -> dict[str, Any]:
    """Bounds on a step's time.

    Returns:
        compute, hbm, interconnect (axis -> seconds); bound: the largest of them, everything else perfectly hidden, and
        bound_by; predicted: weights and gradients hidden behind the arithmetic, transfers of tokens waited for;
        mfu_ceiling and mfu_predicted: the model's FLOPs at the chips' peak over those times.
    """
    chip = topology.chip
    sizes = dataclasses.asdict(config.mesh)
    hidden, waited = dict.fromkeys(wires, 0.0), dict.fromkeys(wires, 0.0)
    for one in found:
        for axis, amount in split(one.axes, one.bytes * one.times, sizes).items():
            speed = wires[axis].all_to_all if "all-to-all" in one.kind else wires[axis].bandwidth
            (hidden if one.hidden else waited)[axis] += amount / speed
    interconnect = {axis: hidden[axis] + waited[axis] for axis in wires}
    compute = executed_flops(config) / chip.peak_flops
    hbm = memory_traffic(config, parameters) / chip.hbm_bandwidth
    bounds = {"compute": compute, "hbm": hbm} | {f"interconnect, {axis}": s for axis, s in interconnect.items()}
    bound_by = max(bounds, key=bounds.get)
    predicted = max(compute, hbm, *hidden.values(), 0.0) + sum(waited.values())
    tokens = config.train.batch_size * config.train.seq_len
    ideal = metrics.flops_per_token(config.model, config.train.seq_len) * tokens / (_devices(config) * chip.peak_flops)
    return {
        "compute": compute,
        "hbm": hbm,
        "interconnect": interconnect,
        "bound": bounds[bound_by],
        "bound_by": bound_by,
        "predicted": predicted,
        "mfu_ceiling": ideal / bounds[bound_by],
        "mfu_predicted": ideal / predicted,
    }


def _devices(config: Config) -> int:
    return math.prod(dataclasses.asdict(config.mesh).values())
