"""AdamW in torch on a small Mixtral of transformers': what 50 steps of ours must repeat.

python -m tests.golden.training       # writes adamw.npz; needs requirements-parity.txt
"""

from pathlib import Path

import numpy as np

from tests.golden import reference

STEPS, BATCHES = 50, 5  # the batches come round and round, so that the loss falls
WEIGHT_DECAY, BETAS, CLIP, BALANCE = 0.1, (0.9, 0.95), 1.0, 0.02
# Two float32 programs part for good where rounding decides something: the router at a near-tie (deep_top4_of_16 with the
# usual settings: a token of step 21 whose 4th and 5th logits are 1.4e-6 apart), or Adam about an element whose first
# gradient is not far from eps (narrow_window_top4_of_5: 1e-4 after one update). More routers and experts meet more
# near-ties, so those two shapes have batches, and the deep one a step, with which neither happens in 50 steps.
USUAL = {"seed": 100, "learning_rate": 3e-3, "eps": 1e-8}
SETTINGS = {
    "deep_top4_of_16": {"seed": 300, "learning_rate": 1e-3, "eps": 1e-6},
    "narrow_window_top4_of_5": {"seed": 200, "learning_rate": 3e-3, "eps": 1e-8},
}
FILE = Path(__file__).parent / "adamw.npz"


def settings(name: str) -> dict[str, float]:
    """Seed of the batches, learning rate and eps of a shape."""
    return SETTINGS.get(name, USUAL)


def batch(name: str, step: int) -> dict[str, np.ndarray]:
    """Tokens and mask of a step: the last row is padded on the right."""
    shape = reference.LIVE[name]
    rng = np.random.RandomState(settings(name)["seed"] + step % BATCHES)
    made = reference.batch(shape)
    return made | {"tokens": rng.randint(0, shape["vocab_size"], made["tokens"].shape).astype(np.int32)}


def losses(name: str) -> dict[str, np.ndarray]:
    """Runs torch.

    Returns:
        token_loss and aux (transformers' balance loss) of each step, before its update; norm, that of the gradient
        of token_loss + BALANCE * aux before clipping.
    """
    import torch

    from tests.golden.make_goldens import build

    shape, chosen = reference.LIVE[name], settings(name)
    model = build(shape)
    named = dict(model.named_parameters())
    kept = [p for name, p in named.items() if "norm" in name or "embed_tokens" in name]
    decayed = [p for name, p in named.items() if not ("norm" in name or "embed_tokens" in name)]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=chosen["learning_rate"], betas=BETAS, eps=chosen["eps"])
    out: dict = {"token_loss": [], "aux": [], "norm": []}
    for step in range(STEPS):
        made = batch(name, step)
        tokens, mask = torch.tensor(made["tokens"]).long(), torch.tensor(made["mask"])
        result = model(input_ids=tokens, attention_mask=mask, output_router_logits=True)
        labels = tokens.masked_fill(mask == 0, -100)[:, 1:].reshape(-1)
        loss = torch.nn.functional.cross_entropy(result.logits[:, :-1].reshape(-1, shape["vocab_size"]), labels)
        optimizer.zero_grad()
        (loss + BALANCE * result.aux_loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        for key, value in (("token_loss", loss.detach()), ("aux", result.aux_loss.detach()), ("norm", norm)):
            out[key].append(float(value))
    return {name: np.asarray(values) for name, values in out.items()}


def main() -> None:
    """Writes the losses of two shapes."""
    made = {f"{name}.{key}": a for name in ("mixtral", "window_top3") for key, a in losses(name).items()}
    np.savez_compressed(FILE, **made)
    print({name: (a[0].round(4), a[-1].round(4)) for name, a in made.items()})


if __name__ == "__main__":
    main()
