"""AdamW in torch on a small Mixtral of transformers': what 50 steps of ours must repeat.

python -m tests.golden.training       # writes adamw.npz; needs requirements-parity.txt
"""

from pathlib import Path

import numpy as np

from tests.golden import reference

STEPS, BATCHES = 50, 5  # the batches come round and round, so that the loss falls
LEARNING_RATE, WEIGHT_DECAY, BETAS, EPS, CLIP, BALANCE = 3e-3, 0.1, (0.9, 0.95), 1e-8, 1.0, 0.02
FILE = Path(__file__).parent / "adamw.npz"


def batch(shape: dict, step: int) -> dict[str, np.ndarray]:
    """Tokens and mask of a step: the last row is padded on the right."""
    rng = np.random.RandomState(100 + step % BATCHES)
    made = reference.batch(shape)
    return made | {"tokens": rng.randint(0, shape["vocab_size"], made["tokens"].shape).astype(np.int32)}


def losses(shape: dict) -> dict[str, np.ndarray]:
    """Runs torch.

    Returns:
        token_loss and aux (transformers' balance loss) of each step, before its update; norm, that of the gradient
        of token_loss + BALANCE * aux before clipping.
    """
    import torch

    from tests.golden.make_goldens import build

    model = build(shape)
    named = dict(model.named_parameters())
    kept = [p for name, p in named.items() if "norm" in name or "embed_tokens" in name]
    decayed = [p for name, p in named.items() if not ("norm" in name or "embed_tokens" in name)]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS)
    out: dict = {"token_loss": [], "aux": [], "norm": []}
    for step in range(STEPS):
        made = batch(shape, step)
        tokens, mask = torch.tensor(made["tokens"]).long(), torch.tensor(made["mask"])
        result = model(input_ids=tokens, attention_mask=mask, output_router_logits=True)
        labels = tokens.masked_fill(mask == 0, -100)[:, 1:].reshape(-1)
        loss = torch.nn.functional.cross_entropy(result.logits[:, :-1].reshape(-1, shape["vocab_size"]), labels)
        optimizer.zero_grad()
        (loss + BALANCE * result.aux_loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        for name, value in (("token_loss", loss.detach()), ("aux", result.aux_loss.detach()), ("norm", norm)):
            out[name].append(float(value))
    return {name: np.asarray(values) for name, values in out.items()}


def main() -> None:
    """Writes the losses of two shapes."""
    made = {
        f"{name}.{key}": a for name in ("mixtral", "window_top3") for key, a in losses(reference.SHAPES[name]).items()
    }
    np.savez_compressed(FILE, **made)
    print({name: (a[0].round(4), a[-1].round(4)) for name, a in made.items()})


if __name__ == "__main__":
    main()
