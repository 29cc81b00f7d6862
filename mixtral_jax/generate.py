"""A plain sampler: the whole forward pass for every token, no KV cache. Enough for samples during training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mixtral_jax.models.mixtral import Mixtral
from mixtral_jax.sharding import BATCH


@functools.partial(jax.jit, static_argnames=("new_tokens", "temperature"))
def _extend(model: Mixtral, tokens_BT, length, key, new_tokens: int, temperature: float):
    """Appends `new_tokens` samples to tokens_BT after its first `length` positions; later positions are free."""
    b, t = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(t)[None, :], (b, t))

    def one(i, tokens_BT):
        # A token sees only what is before it, so whatever stands in the free positions changes nothing.
        x_BTD, _ = model.hidden(tokens_BT, positions_BT, jnp.ones((b, t), jnp.int32))
        x_BD = lax.dynamic_slice_in_dim(x_BTD, length + i - 1, 1, axis=1)[:, 0]
        logits_BV = jnp.einsum("BD,DV->BV", x_BD, model.head_DV[...].astype(x_BD.dtype))
        logits_BV = logits_BV.astype(jnp.float32)
        if temperature == 0:
            token_B = jnp.argmax(logits_BV, axis=-1)
        else:
            token_B = jax.random.categorical(jax.random.fold_in(key, i), logits_BV / temperature)
        return lax.dynamic_update_slice(tokens_BT, token_B.astype(jnp.int32)[:, None], (0, length + i))

    return lax.fori_loop(0, new_tokens, one, tokens_BT)


def sample(model: Mixtral, tokenizer, prompt: str, *, max_tokens: int, temperature: float, seed: int) -> str:
    """Continues a prompt.

    Args:
        model: parameters on any mesh; the mesh, if any, is the current one (`jax.set_mesh`).
        tokenizer: the run's tokenizer.
        prompt: text; BOS is put before it.
        max_tokens: length of the continuation; it ends earlier at EOS.
        temperature: 0 takes the most likely token.
        seed: of the sampling.

    Returns:
        The continuation alone.
    """
    context = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    room = model.config.max_seq_len - max_tokens
    context = context[-max(room, 1) :]
    # One row per batch shard, all the same: a batch of one does not divide over a mesh.
    mesh = jax.sharding.get_abstract_mesh()
    rows = 1 if mesh.empty else int(np.prod([mesh.shape[axis] for axis in BATCH]))
    # Lengths in steps of 64, so that prompts of similar length share one compilation.
    width = -(-(len(context) + max_tokens) // 64) * 64
    tokens_BT = np.zeros((rows, width), np.int32)
    tokens_BT[:, : len(context)] = context
    with jax.transfer_guard("allow"):
        key = jax.random.key(seed)
        out_BT = _extend(model, tokens_BT, len(context), key, max_tokens, temperature)
        new = np.asarray(out_BT[0])[len(context) : len(context) + max_tokens].tolist()
    if tokenizer.eos_id in new:
        new = new[: new.index(tokenizer.eos_id)]
    return tokenizer.continuation(context, new)
