"""What a train step moves between devices, by formula from the shardings; tests hold it to compiled modules.

n is the number of tokens of a device in a micro-batch, `item` the bytes of an element in the compute type. A layer runs
forward, again for its backward pass where `model.remat` says so, and backward. Weights are gathered over `fsdp` where they
are used and their gradients scattered back; what several devices computed of one parameter is summed.
"""

import dataclasses

from mixtral_jax.config import Config
from mixtral_jax.models import dispatch
from mixtral_jax.plan.amounts import moved


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One kind of collective in a step."""

    name: str
    kind: str
    axes: tuple[str, ...]
    bytes: float  # that a device receives each time
    times: int
    hidden: bool  # whether it can run beside a layer's arithmetic: weights and gradients can, tokens are waited for


def transfers(config: Config) -> list[Transfer]:
    """Lists a step's transfers; the mesh must be resolved and the backends named."""
    model, mesh, train = config.model, config.mesh, config.train
    sizes = dataclasses.asdict(mesh)
    item = 2 if model.dtype == "bfloat16" else 4
    layers = model.num_layers * train.accumulation_steps
    found: list[Transfer] = []

    def add(name, kind, axes, result, times, hidden=False):
        axes = tuple(axis for axis in axes if sizes[axis] > 1)
        n = 1
        for axis in axes:
            n *= sizes[axis]
        if n > 1 and result:
            found.append(Transfer(name, kind, axes, moved(kind, int(result), n), times, hidden))

    _weights(config, add, item, layers)
    _tokens(config, add, item, layers)
    _ends(config, add, item, train.accumulation_steps)
    return found


def tokens_of_device(config: Config) -> int:
    """Tokens of a device in a micro-batch."""
    train, mesh = config.train, config.mesh
    return train.batch_size // train.accumulation_steps // mesh.batch_shards * (train.seq_len // mesh.context)


def _weights(config: Config, add, item: int, layers: int) -> None:
    model, mesh = config.model, config.mesh
    heads = 2 * model.d_model * (model.num_heads + model.num_kv_heads) * model.head_dim // mesh.tensor * item
    experts = 3 * (model.num_experts // mesh.expert) * model.d_model * (model.d_ff // mesh.tensor) * item
    again = model.remat != "none"
    # Attention's weights are gathered in each of the passes; a layer's experts once for recomputing and the backward pass.
    add("attention weights", "all-gather", ("fsdp",), heads, layers * (3 if again else 2), True)
    add("expert weights", "all-gather", ("fsdp",), experts, layers * (2 if again else 1), True)
    add("gradients of attention", "reduce-scatter", ("fsdp",), heads // mesh.fsdp, layers, True)
    add("gradients of attention", "all-reduce", ("data", "expert", "context"), heads // mesh.fsdp, layers, True)
    add("gradients of experts", "reduce-scatter", ("fsdp",), experts // mesh.fsdp, layers, True)
    add("gradients of experts", "all-reduce", ("data", "context"), experts // mesh.fsdp, layers, True)


def _tokens(config: Config, add, item: int, layers: int) -> None:
    model, mesh = config.model, config.mesh
    rows = tokens_of_device(config) * model.d_model * item
    again = int(model.remat != "none")
    if model.dispatch == "ragged":
        sent = rows * model.experts_per_token
        add("tokens to experts and back", "ragged-all-to-all", ("expert",), sent, layers * (4 + 2 * again))
    else:
        add("tokens to experts", "all-gather", ("expert",), rows * mesh.expert, layers * (2 + again))
        add("tokens from experts", "reduce-scatter", ("expert",), rows, layers * 2)
        choices = tokens_of_device(config) * model.experts_per_token * 4
        add("gates and choices", "all-gather", ("expert",), choices * mesh.expert, layers * 2 * (1 + again))
        add("gradients of gates", "reduce-scatter", ("expert",), choices, layers)
    # Forward the outputs of attention and of the experts; backward both ends of the experts, and q, k and v each.
    add("sums over parts of heads and of F", "all-reduce", ("tensor",), rows, layers * (7 + again))
    add("sums over parts of the vocabulary", "all-reduce", ("tensor",), rows, 2 * config.train.accumulation_steps)
    keys = 2 * tokens_of_device(config) * mesh.context * model.num_kv_heads // mesh.tensor * model.head_dim * item
    add("keys and values", "all-gather", ("context",), keys, layers * (1 + again))
    add("gradients of keys and values", "reduce-scatter", ("context",), keys // mesh.context, layers)


def _ends(config: Config, add, item: int, times: int) -> None:
    model, mesh = config.model, config.mesh
    table = model.vocab_size * model.d_model // mesh.tensor
    for name in ("embedding", "head"):
        add(name, "all-gather", ("fsdp",), table * item, times, True)
        add(f"gradient of the {name}", "reduce-scatter", ("fsdp",), table * item // mesh.fsdp, times, True)
        # The program sums after its cast to float32; XLA:TPU moves the cast behind the sum.
        add(
            f"gradient of the {name}",
            "all-reduce",
            ("data", "expert", "context"),
            table * item // mesh.fsdp,
            times,
            True,
        )


def receive_buffers(config: Config) -> dict[str, int]:
    """Bytes of one buffer of rows that a device receives for its experts, as configured and with nothing ever dropped.

    Dropless must have room for every assignment of all devices of the `expert` axis; a bounded buffer holds
    `model.buffer_factor` times a device's even share. The ring holds the rows of all devices, here or not, and knows no bound.
    """
    model, mesh = config.model, config.mesh
    item = 2 if model.dtype == "bfloat16" else 4
    row, k = model.d_model * item, model.experts_per_token
    share = tokens_of_device(config) * k * row
    if mesh.expert == 1 or model.dispatch == "ring":
        held = share * mesh.expert
        return {"even_share": share, "configured": held, "dropless": held}
    sizes = tokens_of_device(config), k, mesh.expert, model.num_experts // mesh.expert
    rows, worst = (dispatch.buffer_rows(*sizes, factor, model.expert_block) for factor in (model.buffer_factor, 0))
    return {"even_share": share, "configured": rows * row, "dropless": worst * row}
