"""Low-rank adapters (LoRA, arXiv 2106.09685) beside a frozen base: y = x W + scale (x A) B, with scale = alpha / rank.

The delta is computed from the activations and never added to W in training: in bfloat16 most of it would be rounded away.
A is random and B zero, so that at the start the model is the base. Factors are float32 parameters; their products take
operands in the compute dtype and are summed in float32.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mixtral_jax.config import LoraConfig, ModelConfig
from mixtral_jax.kernels.adapters import ExpertAdapters
from mixtral_jax.models.layers import FLOAT32, normal
from mixtral_jax.sharding import constrain, named_leaves, param_spec, path_names, suffix

# target -> matrix -> its parameter, A and B. The names say the shapes, and the shapes the products.
TARGETS = {
    "attention": {
        "q": ("w_q_DNH", "lora_q_a_DR", "lora_q_b_RNH"),
        "k": ("w_k_DGH", "lora_k_a_DR", "lora_k_b_RGH"),
        "v": ("w_v_DGH", "lora_v_a_DR", "lora_v_b_RGH"),
        "o": ("w_o_NHD", "lora_o_a_NHR", "lora_o_b_RD"),
    },
    "experts": {
        "gate": ("w_gate_EDF", "lora_gate_a_EDR", "lora_gate_b_ERF"),
        "up": ("w_up_EDF", "lora_up_a_EDR", "lora_up_b_ERF"),
        "down": ("w_down_EFD", "lora_down_a_EFR", "lora_down_b_ERD"),
    },
    "router": {"router": ("w_router_DE", "lora_router_a_DR", "lora_router_b_RE")},
}


def scale(config: LoraConfig) -> float:
    """What the product of the factors is multiplied by."""
    return config.alpha / config.rank


def factors(config: LoraConfig) -> dict[str, tuple[str, str]]:
    """The adapted parameters: name of W -> names of A and B."""
    return {w: (a, b) for target in config.targets for w, a, b in TARGETS[target].values()}


class LayerAdapters(nnx.Module):
    """The adapters of one layer. A is normal with std 1 / sqrt(fan in), so that x A is as large as x; B is zero."""

    def __init__(self, model: ModelConfig, config: LoraConfig, rngs: nnx.Rngs):
        size = dict(
            D=model.d_model,
            N=model.num_heads,
            G=model.num_kv_heads,
            H=model.head_dim,
            F=model.d_ff,
            E=model.num_experts,
            R=config.rank,
        )
        self.config = config
        for a, b in factors(config).values():
            shape_a, shape_b = (tuple(size[letter] for letter in suffix(name)) for name in (a, b))
            fan_in = 1
            for letter in suffix(a).removeprefix("E").removesuffix("R"):
                fan_in *= size[letter]
            setattr(self, a, nnx.Param(normal(rngs.params(), shape_a, fan_in**-0.5)))
            setattr(self, b, nnx.Param(jnp.zeros(shape_b)))

    def attention(self, matrix: str, x, y):
        """Adds the delta of the projection `matrix` (q, k, v or o) of x to y = x W; returns it in y's dtype."""
        if "attention" not in self.config.targets:
            return y
        _, a, b = TARGETS["attention"][matrix]
        a, b = (getattr(self, name)[...].astype(x.dtype) for name in (a, b))
        into, out = {
            "q": ("BTD,DR->BTR", "BTR,RNH->BTNH"),
            "k": ("BTD,DR->BTR", "BTR,RGH->BTGH"),
            "v": ("BTD,DR->BTR", "BTR,RGH->BTGH"),
            "o": ("BTNH,NHR->BTR", "BTR,RD->BTD"),
        }[matrix]
        low_BTR = constrain(jnp.einsum(into, x, a, preferred_element_type=jnp.float32), "BTR").astype(x.dtype)
        delta = jnp.einsum(out, low_BTR, b, preferred_element_type=jnp.float32)
        return (y.astype(jnp.float32) + scale(self.config) * delta).astype(y.dtype)

    def router(self, x_BTD, logits_BTE):
        """Adds the router's delta; all float32 and at HIGHEST precision, as the logits themselves."""
        if "router" not in self.config.targets:
            return logits_BTE
        exact = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
        low_BTR = constrain(exact("BTD,DR->BTR", x_BTD, self.lora_router_a_DR[...]), "BTR")
        return logits_BTE + scale(self.config) * exact("BTR,RE->BTE", low_BTR, self.lora_router_b_RE[...])

    def experts(self) -> ExpertAdapters | None:
        """The factors of the experts, float32; None where the experts have none."""
        if "experts" not in self.config.targets:
            return None
        return ExpertAdapters(*(getattr(self, name)[...] for _, *ab in TARGETS["experts"].values() for name in ab))


class Adapters(nnx.Module):
    """The adapters of all layers, stacked: all that a LoRA run trains and stores."""

    def __init__(self, model: ModelConfig, config: LoraConfig, rngs: nnx.Rngs):
        self.config = config
        stack = nnx.vmap(lambda rngs: LayerAdapters(model, config, rngs), graph=False)
        self.layers = stack(rngs.split(model.num_layers))


def init(model: ModelConfig, config: LoraConfig, key) -> Adapters:
    """Adapters that change nothing yet, float32. Trace it under jit for large shapes."""
    return Adapters(model, config, nnx.Rngs(params=key))


def abstract(model: ModelConfig, config: LoraConfig) -> Adapters:
    """The adapters with ShapeDtypeStructs: any size, no memory."""
    return jax.eval_shape(lambda key: init(model, config, key), jax.random.key(0))


def parameter_counts(model: ModelConfig, config: LoraConfig) -> tuple[int, int]:
    """Counts the adapters' parameters from abstract shapes.

    Returns:
        total, active: active counts the adapters of K of the E experts.
    """
    total = active = 0
    for name, leaf in named_leaves(abstract(model, config)).items():
        total += leaf.size
        is_expert = suffix(name)[0] == "E"
        active += leaf.size * model.experts_per_token // model.num_experts if is_expert else leaf.size
    return total, active


def attach(base, adapters: Adapters):
    """The base with the adapters at its layers: `hidden`, the losses and decoding from stacked weights take it as it is.

    Args:
        base: a Mixtral, its weights in float32 or as `freeze` leaves them. It stays as it was.
        adapters: of the same model.

    Returns:
        a new Mixtral of the same arrays; it has the leaves of both.
    """
    model = jax.tree.unflatten(jax.tree.structure(base), jax.tree.leaves(base))
    model.layers.lora = adapters.layers
    return model


def freeze(model):
    """A Mixtral as a frozen base is held: in the compute dtype, and float32 what is used in float32 (layers.FLOAT32)."""

    def cast(path, leaf):
        return leaf if path_names(path)[-1] in FLOAT32 else leaf.astype(model.config.dtype)

    return jax.tree_util.tree_map_with_path(cast, model)


def merge(base, adapters: Adapters, like=None, donate: bool = False):
    """Plain weights W + scale A B, the sum in float32 and then cast, one layer's after another's.

    Args:
        base: a Mixtral.
        adapters: of the same model.
        like: a Mixtral whose dtypes the result has; default: the base's own.
        donate: the base is given up, so that no second copy exists of the adapted weights whose dtype stays.

    Returns:
        a Mixtral on the base's shardings, without adapters.
    """
    pairs, deltas, old = factors(adapters.config), named_leaves(adapters), named_leaves(base)
    wanted = {name: jnp.dtype(leaf.dtype) for name, leaf in named_leaves(base if like is None else like).items()}
    adapted = {name: pairs[name.rpartition(".")[2]] for name in old if name.rpartition(".")[2] in pairs}
    low = {name: [deltas[f"layers.{factor}"] for factor in ab] for name, ab in adapted.items()}
    given = {name: old[name] for name in low if donate and old[name].dtype == wanted[name]}
    kept = {name: old[name] for name in low if name not in given}
    dtypes = tuple((name, wanted[name].name) for name in low)
    merged = _merge(given, kept, low, scale(adapters.config), dtypes)
    leaves = [merged[name] if name in merged else leaf.astype(wanted[name]) for name, leaf in old.items()]
    return jax.tree.unflatten(jax.tree.structure(base), leaves)


def merge_layer(block):
    """Merges one layer of an attached model into plain weights, in place; used within jit, where a block is a copy."""
    config = block.lora.config
    for name, (a, b) in factors(config).items():
        w, *ab = (getattr(owner, n)[...] for owner, n in ((block, name), (block.lora, a), (block.lora, b)))
        setattr(block, name, nnx.Param(_merged(w, *ab, name, scale(config)).astype(w.dtype)))
    del block.lora


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _merge(given: dict, kept: dict, low: dict, scale: float, dtypes: tuple[tuple[str, str], ...]) -> dict:
    """The stacked weights `given` (donated) and `kept` with their factors `low`. The float32 temporaries are one layer's."""

    def stack(name: str, dtype: str):
        letters = name.rpartition(".")[2]
        inputs = ((given | kept)[name], *low[name])
        merged = lax.map(lambda one: _merged(*one, letters, scale).astype(dtype), inputs)
        if jax.sharding.get_abstract_mesh().empty:
            return merged
        return lax.with_sharding_constraint(merged, param_spec(letters, merged.ndim))

    return {name: stack(name, dtype) for name, dtype in dtypes}


def _merged(w, a, b, name: str, scale: float):
    """W + scale A B of one layer, float32."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    delta = jnp.einsum(merge_equation(name), a, b, precision=lax.Precision.HIGHEST)
    return w.astype(jnp.float32) + scale * delta


def merge_equation(name: str) -> str:
    """The einsum of a parameter's factors: of w_gate_EDF it is EDR,ERF->EDF."""
    _, a, b = next(entry for matrices in TARGETS.values() for entry in matrices.values() if entry[0] == name)
    return f"{suffix(a)},{suffix(b)}->{suffix(name)}"
