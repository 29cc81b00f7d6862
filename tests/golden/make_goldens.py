"""Writes tests/golden/NAME.npz: what transformers computes for the small Mixtrals of reference.py.

python -m tests.golden.make_goldens       # needs requirements-parity.txt
"""

from pathlib import Path

import numpy as np
import torch
import transformers

from tests.golden import reference


def build(shape: dict, weights: dict[str, np.ndarray] | None = None) -> transformers.MixtralForCausalLM:
    """transformers' model of a shape of reference.py, float32, eager attention; weights by our names, default its own."""
    config = transformers.MixtralConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["d_model"],
        intermediate_size=shape["d_ff"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        head_dim=shape["head_dim"],
        num_local_experts=shape["num_experts"],
        num_experts_per_tok=shape["experts_per_token"],
        rope_parameters={"rope_type": "default", "rope_theta": shape["rope_theta"]},
        sliding_window=shape["sliding_window"] or None,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = transformers.MixtralForCausalLM(config)
    state = reference.to_hugging_face(reference.weights(shape) if weights is None else weights)
    state = {name: torch.tensor(np.ascontiguousarray(a)) for name, a in state.items()}
    model.load_state_dict(state, strict=True)
    return model


def compute(shape: dict) -> dict[str, np.ndarray]:
    """Logits, losses and the gradient of every parameter.

    Returns:
        logits [B, T, V]; loss (mean next-token cross-entropy over real targets); aux (transformers' balance loss);
        loss_grad.NAME and aux_grad.NAME for every parameter, by our names.
    """
    model, ours = build(shape), reference.weights(shape)
    batch = reference.batch(shape)
    tokens, mask = torch.tensor(batch["tokens"]).long(), torch.tensor(batch["mask"])
    labels = tokens.masked_fill(mask == 0, -100)

    out = {}
    for which in ("loss", "aux"):
        model.zero_grad()
        result = model(input_ids=tokens, attention_mask=mask, output_router_logits=True)
        # Computed here and not by passing labels, which would add the balance loss to the token loss.
        loss = torch.nn.functional.cross_entropy(
            result.logits[:, :-1].reshape(-1, shape["vocab_size"]), labels[:, 1:].reshape(-1)
        )
        value = {"loss": loss, "aux": result.aux_loss}[which]
        value.backward()
        grads = {
            n: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy() for n, p in model.named_parameters()
        }
        grads = reference.from_hugging_face(grads, ours)
        out[which] = np.float32(value.item())
        out |= {f"{which}_grad.{name}": grad.copy() for name, grad in grads.items()}
    out["logits"] = result.logits.detach().numpy()
    return out


def main() -> None:
    """Writes one file per shape."""
    for name, shape in reference.SHAPES.items():
        path = Path(__file__).parent / f"{name}.npz"
        np.savez_compressed(
            path, versions=f"torch {torch.__version__}, transformers {transformers.__version__}", **compute(shape)
        )
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
