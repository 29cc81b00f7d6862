"""The state of training and the one step that changes it, for every stage."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from mixtral_jax import host_memory
from mixtral_jax.config import Config, UserError
from mixtral_jax.losses import Totals
from mixtral_jax.models import lora, mixtral
from mixtral_jax.models.moe import RouterStats
from mixtral_jax.optim import clip_by_norm, is_router, learning_rate_schedule
from mixtral_jax.preference import runs_reference
from mixtral_jax.sharding import constrain_params, path_names, tree_shardings

HOST = "pinned_host"  # jax's name of the host memory that an accelerator reaches by itself


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes."""

    step: jax.Array  # int32, optimizer steps taken
    params: mixtral.Mixtral | lora.Adapters  # float32; with LoRA the adapters alone
    opt_state: optax.OptState
    skipped: jax.Array  # int32, steps whose update was not made because the loss or the gradient was not finite


def _require_host_memory(config: Config, mesh) -> None:
    device = mesh.devices.flat[0]
    try:
        kinds = [memory.kind for memory in device.addressable_memories()]
    except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):
        return  # a description of a device that is not here, which has no memories to ask for
    if HOST not in kinds:
        raise UserError(
            f"optim.offload={config.optim.offload} and model.remat={config.model.remat} need memory of the kind {HOST}, and "
            f"{device.device_kind} has {len(kinds)}: {', '.join(kinds)}; set optim.offload=False and model.remat=outputs"
        )


def _builder(config: Config, optimizer: optax.GradientTransformation) -> Callable:
    def build(key, params=None):
        if params is None and config.lora.rank:
            params = lora.init(config.model, config.lora, key)
        elif params is None:
            params = mixtral.init(config.model, key)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jnp.zeros((), jnp.int32))

    return build


def model_of(config: Config, params, frozen=None):
    """The model that computes: the parameters themselves, or with LoRA the frozen base with them as its adapters."""
    return lora.attach(frozen, params) if config.lora.rank else params


def abstract_state(config: Config, optimizer: optax.GradientTransformation, mesh):
    """The state as ShapeDtypeStructs with shardings: what a checkpoint is restored onto, without any memory of its own.

    Returns:
        the abstract TrainState, and its NamedShardings; with optim.offload those of the moments are in host memory.

    Raises:
        UserError: optim.offload or model.remat=offload, and the devices have no host memory.
    """
    shapes = jax.eval_shape(_builder(config, optimizer), jax.random.key(config.train.seed))
    shardings = tree_shardings(shapes, mesh, shapes.params)
    if config.optim.offload or config.model.remat == "offload":
        _require_host_memory(config, mesh)
    if config.optim.offload:
        moments = jax.tree.map(
            lambda x, s: s.with_memory_kind(HOST) if x.ndim else s, shapes.opt_state, shardings.opt_state
        )
        shardings = dataclasses.replace(shardings, opt_state=moments)
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return like, shardings


def init_state(config: Config, optimizer: optax.GradientTransformation, mesh, params=None):
    """Creates the state of step 0, sharded: each device makes only its own part.

    Args:
        config, optimizer, mesh: of the run.
        params: the weights to start from, which the state takes over; None makes random ones.

    Returns:
        state, and its NamedShardings (the out_shardings of the train step: without them XLA replicates the moments).
    """
    _, shardings = abstract_state(config, optimizer, mesh)
    build = jax.jit(_builder(config, optimizer), out_shardings=shardings, donate_argnums=1)
    return build(jax.random.key(config.train.seed), params), shardings


def _accumulate(loss_fn: Callable, params, batch: dict, totals: Totals, steps: int):
    """Sums loss, terms, RouterStats and gradients over `steps` micro-batches in a scan."""
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if steps == 1:
        (loss, aux), grads = grad_fn(params, batch, totals)
        return loss, aux, constrain_params(grads)

    def split(a_BT):
        # Micro-batch j takes rows j, j + steps, ...: every device keeps the rows it has.
        return a_BT.reshape(-1, steps, *a_BT.shape[1:]).swapaxes(0, 1)

    def one(total, micro):
        (loss, aux), grads = grad_fn(params, micro, totals)
        total = jax.tree.map(jnp.add, total, (loss, aux, grads))
        return (*total[:2], constrain_params(total[2])), None

    micros = jax.tree.map(split, batch)
    shapes = jax.eval_shape(grad_fn, params, jax.tree.map(lambda a: a[0], micros), totals)
    (loss, aux), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (loss, aux, grads), _ = jax.lax.scan(one, (loss, aux, constrain_params(grads)), micros)
    return loss, aux, grads


def _update_router_bias(params, stats_L: RouterStats, rate: float):
    """Moves each expert's bias towards an equal share: bias += rate * sign(mean count - count) (arXiv 2408.15664)."""
    step_LE = rate * jnp.sign(stats_L.count_E.mean(-1, keepdims=True) - stats_L.count_E)

    def move(path, leaf):
        return leaf + step_LE if path_names(path)[-1] == "router_bias_E" else leaf

    return jax.tree_util.tree_map_with_path(move, params)


def _without_router(grads):
    """Gradients with zeros for the routers: they neither move nor count in the norm."""

    def keep(path, leaf):
        return jnp.zeros_like(leaf) if is_router(path_names(path)[-1]) else leaf

    return jax.tree_util.tree_map_with_path(keep, grads)


class CompiledFirst:
    """A jitted function that is always called with the same shapes, compiled by itself before it runs for the first time.

    What compiling took of the host's memory, hundreds of MB, is given back before the first step takes its own.
    """

    def __init__(self, jitted: Callable):
        self._jitted, self._compiled = jitted, None

    def __call__(self, *arguments):
        if self._compiled is None:
            self._compiled = self._jitted.lower(*arguments).compile()
            host_memory.give_back()
        return self._compiled(*arguments)


def make_train_step(config: Config, optimizer: optax.GradientTransformation, loss_fn: Callable) -> Callable:
    """Builds the pure function (state, batch, frozen) -> (state, metrics), to be jitted with the state donated.

    The metrics are float32 device arrays: scalars, and per layer load_LE, entropy_L, dropped_L.

    Args:
        config: of the run.
        optimizer: of optim.make_optimizer, whose `update` takes `ok`.
        loss_fn: of the stage, see stages.Stage.

    `frozen` are weights that do not move: LoRA's base, or the weights that a full DPO started from and compares with, or
    with LoRA on the fly both at once; None where there are none (frozen.stays).
    """
    schedule = learning_rate_schedule(config.optim, config.train.steps)
    limit = config.train.skip_nonfinite

    def train_step(state: TrainState, batch: dict, frozen=None):
        # LoRA's base is there in any case; it is run as DPO's reference only where the batches do not carry its answers.
        reference = frozen if runs_reference(config) else None

        def micro_loss(params, batch, totals):
            return loss_fn(model_of(config, params, frozen), batch, totals, config, reference)

        totals = Totals.of(batch)
        steps = config.train.accumulation_steps
        loss, (terms, stats_L), grads = _accumulate(micro_loss, state.params, batch, totals, steps)
        if config.optim.freeze_router:
            grads = _without_router(grads)
        norm = optax.tree.norm(grads)
        grads = clip_by_norm(grads, norm, config.optim.clip_norm)
        if config.optim.offload:
            # Leaf by leaf, so that XLA can bring one while it updates another; out_shardings send them back.
            state = dataclasses.replace(state, opt_state=jax.device_put(state.opt_state, jax.memory.Space.Device))
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        skipped = state.skipped + (~finite).astype(jnp.int32)
        # Once there are more than the run allows, nothing moves any more: the host learns of it a step late.
        halted = (skipped > limit) | (state.skipped > limit)
        ok = finite & ~halted
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, ok=ok)
        params = optax.apply_updates(state.params, updates)
        if config.loss.bias_update_rate:
            params = _update_router_bias(params, stats_L, config.loss.bias_update_rate)
        params = jax.tree.map(lambda new, old: jnp.where(ok, new, old), params, state.params)
        new = TrainState(state.step + ~halted, params, opt_state, skipped)
        assignments_L = jnp.maximum(stats_L.count_E.sum(-1), 1.0)
        return new, {
            "loss": loss,
            **terms,
            "gradient_norm": norm,
            "learning_rate": schedule(state.step - state.skipped),  # the optimizer counts its updates only
            "trained_tokens": totals.weight,
            "tokens": totals.tokens,
            "load_LE": stats_L.count_E / assignments_L[:, None],
            "entropy_L": stats_L.entropy / jnp.maximum(stats_L.tokens, 1.0),
            "dropped_L": stats_L.dropped / assignments_L,
            "skipped": skipped,
            "halted": halted,
        }

    return train_step
