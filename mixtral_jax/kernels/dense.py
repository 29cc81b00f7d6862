"""The oracle: every expert multiplies every row, and a mask keeps the right one. E times the work, obviously correct."""

import jax
import jax.numpy as jnp


def grouped_swiglu(x_MD, w_gate_eDF, w_up_eDF, w_down_eFD, group_sizes_e, block: int = 0):
    """SwiGLU experts over grouped rows; see mixtral_jax.kernels for the signature.

    Args:
        x_MD: rows sorted by expert, float.
        w_gate_eDF, w_up_eDF: first-layer weights (w1 and w3 in Mistral's names).
        w_down_eFD: second-layer weights (w2).
        group_sizes_e: rows of each expert, int32; the sum may be less than M.
        block: unused here; part of the signature.

    Returns:
        y_MD in x's dtype: silu(x w_gate) * (x w_up) w_down of each row's own expert, zero after the last group.
    """
    del block
    experts = jnp.arange(group_sizes_e.shape[0])
    ends_e = jnp.cumsum(group_sizes_e)
    row_expert_M = jnp.searchsorted(ends_e, jnp.arange(x_MD.shape[0]), side="right")
    member_Me = (row_expert_M[:, None] == experts[None, :]).astype(x_MD.dtype)
    gate_MeF = jnp.einsum("MD,eDF->MeF", x_MD, w_gate_eDF)
    up_MeF = jnp.einsum("MD,eDF->MeF", x_MD, w_up_eDF)
    hidden_MeF = jax.nn.silu(gate_MeF) * up_MeF * member_Me[:, :, None]
    return jnp.einsum("MeF,eFD->MD", hidden_MeF, w_down_eFD)


def grouped_swiglu_lora(x_MD, weights, adapters, group_sizes_e, block: int, scale: float):
    """The oracle of kernels/adapters.py: the same arguments, one einsum for each product, `block` unused."""
    del block
    w_gate_eDF, w_up_eDF, w_down_eFD = weights
    starts_e = jnp.cumsum(group_sizes_e) - group_sizes_e
    rows_M1 = jnp.arange(x_MD.shape[0])[:, None]
    member_Me = ((rows_M1 >= starts_e[None, :]) & (rows_M1 < (starts_e + group_sizes_e)[None, :])).astype(x_MD.dtype)

    def low_rank(left, x, a, right, b):
        return scale * jnp.einsum(right, jnp.einsum(left, x, a), b)

    gate_MeF = jnp.einsum("MD,eDF->MeF", x_MD, w_gate_eDF)
    gate_MeF += low_rank("MD,eDR->MeR", x_MD, adapters.gate_a_eDR, "MeR,eRF->MeF", adapters.gate_b_eRF)
    up_MeF = jnp.einsum("MD,eDF->MeF", x_MD, w_up_eDF)
    up_MeF += low_rank("MD,eDR->MeR", x_MD, adapters.up_a_eDR, "MeR,eRF->MeF", adapters.up_b_eRF)
    hidden_MeF = jax.nn.silu(gate_MeF) * up_MeF * member_Me[:, :, None]
    y_MD = jnp.einsum("MeF,eFD->MD", hidden_MeF, w_down_eFD)
    return y_MD + low_rank("MeF,eFR->MeR", hidden_MeF, adapters.down_a_eFR, "MeR,eRD->MD", adapters.down_b_eRD)
