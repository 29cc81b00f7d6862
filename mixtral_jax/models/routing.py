"""What the routers decided of each token, seen from the run of the model's own blocks."""

import jax

from mixtral_jax.models.layers import embed, rope_table
from mixtral_jax.models.mixtral import Mixtral, scan_layers
from mixtral_jax.models.moe import Choices
from mixtral_jax.sharding import constrain, everywhere, unzigzag


def choices(model: Mixtral, tokens_BT, positions_BT, segment_ids_BT) -> Choices:
    """Runs all layers and returns their routers' choices. Trace it under jit: what the caller leaves unused costs nothing.

    Args:
        model: on the current mesh, with or without adapters.
        tokens_BT, positions_BT, segment_ids_BT: see Mixtral.hidden, with the columns as sharding.place puts them.

    Returns:
        Choices with a leading L: index_LBTK, gates_LBTK, logits_LBTE. Columns are in the order of the row, on a mesh with
        `context` too, and every device holds all of it. They are what routers chose, whether or not an expert's buffer
        (model.buffer_factor) had room.
    """
    c = model.config
    x_BTD = constrain(embed(model.embedding_VD[...], tokens_BT, c.dtype), "BTD")
    rope = rope_table(positions_BT, c.head_dim, c.rope_theta)

    def body(x_BTD, block):
        x_BTD, _, _, found = block.observed(x_BTD, rope, segment_ids_BT, positions_BT)
        return x_BTD, found

    _, found_L = scan_layers(body, x_BTD, model.layers, c)
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else mesh.shape["context"]
    if shards > 1:
        found_L = jax.tree.map(jax.vmap(lambda a_BT: unzigzag(a_BT, shards)), found_L)
    return jax.tree.map(everywhere, found_L)
