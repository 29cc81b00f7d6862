"""One layer at Mixtral's full width (4096 x 14336), each framework in a process of its own: loss, logits, gradients.

python -m tests.golden.full_width transformers FOLDER
python -m tests.golden.full_width ours FOLDER

Writes FOLDER/WHO.NAME.npy; the weights are made from a seed in both processes. Each takes about 10 GB of memory.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np

from tests.golden import reference

SHAPE = reference.BASE | dict(
    vocab_size=512, num_layers=1, d_model=4096, num_heads=32, num_kv_heads=8, head_dim=128, d_ff=14336, num_experts=4
)
STD = 0.02  # as the model is initialised


def weights() -> dict[str, np.ndarray]:
    """Random weights by our names, of a deviation that is usual at this width."""
    rng = np.random.default_rng(0)
    shapes = reference.dimensions(SHAPE)
    made = {name: rng.standard_normal(size, np.float32) for name, size in shapes.items()}
    for name, a in made.items():
        a *= STD
        if "norm" in name:
            a += 1
    return made


def transformers(folder: Path) -> None:
    """Runs transformers; gradients are written in its own layout, to be turned when they are compared."""
    import torch

    from tests.golden.make_goldens import build

    made = weights()
    model = build(SHAPE, made)
    del made
    batch = reference.batch(SHAPE)
    tokens, mask = torch.tensor(batch["tokens"]).long(), torch.tensor(batch["mask"])
    logits = model(input_ids=tokens, attention_mask=mask).logits
    labels = tokens.masked_fill(mask == 0, -100)[:, 1:].reshape(-1)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, SHAPE["vocab_size"]), labels)
    loss.backward()
    np.save(folder / "transformers.logits.npy", logits.detach().numpy())
    np.save(folder / "transformers.loss.npy", loss.detach().numpy())
    grads = {name: p.grad.numpy() for name, p in model.named_parameters()}
    like = {name: np.broadcast_to(np.float32(0), size) for name, size in reference.dimensions(SHAPE).items()}
    for name, grad in reference.from_hugging_face(grads, like).items():
        np.save(folder / f"transformers.{name}.npy", grad)


def ours(folder: Path) -> None:
    """Runs our model on the same weights and batch."""
    import jax

    from mixtral_jax.losses import Totals, pretrain_loss
    from mixtral_jax.sharding import named_leaves
    from tests.test_parity import forward, ours_of

    config, model, batch = ours_of(SHAPE, weights(), model__expert_block=64)
    np.save(folder / "ours.logits.npy", np.asarray(forward(model, batch)))

    def value(model):
        alone = dataclasses.replace(config.loss, balance_weight=0.0, z_weight=0.0, router_z_weight=0.0)
        return pretrain_loss(model, batch, Totals.of(batch), alone)[0]

    loss, grads = jax.jit(jax.value_and_grad(value))(model)
    np.save(folder / "ours.loss.npy", np.asarray(loss))
    for name, grad in named_leaves(grads).items():
        np.save(folder / f"ours.{name}.npy", np.asarray(grad))


if __name__ == "__main__":
    {"transformers": transformers, "ours": ours}[sys.argv[1]](Path(sys.argv[2]))
