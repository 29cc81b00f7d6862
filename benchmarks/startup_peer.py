"""The nearest thing to `train.py --config=configs/tiny.py` with transformers: a process's start to its first training step.

    python -m benchmarks.startup_peer

The model of configs/tiny.py, random tokens instead of a corpus, AdamW, one step.
"""


def main() -> None:
    """Builds the model and makes one step."""
    import torch
    import transformers

    from configs import tiny

    c = tiny.get_config()
    config = transformers.MixtralConfig(
        vocab_size=c.model.vocab_size,
        hidden_size=c.model.d_model,
        intermediate_size=c.model.d_ff,
        num_hidden_layers=c.model.num_layers,
        num_attention_heads=c.model.num_heads,
        num_key_value_heads=c.model.num_kv_heads,
        head_dim=c.model.head_dim,
        num_local_experts=c.model.num_experts,
        num_experts_per_tok=c.model.experts_per_token,
        max_position_embeddings=c.model.max_seq_len,
    )
    model = transformers.MixtralForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    rows = torch.randint(3, c.model.vocab_size, (4 * c.train.batch_size, c.train.seq_len))
    ids = next(iter(torch.utils.data.DataLoader(rows, batch_size=c.train.batch_size, shuffle=True)))
    loss = model(input_ids=ids, labels=ids, output_router_logits=True).loss
    loss.backward()
    optimizer.step()
    print(float(loss.detach()))


if __name__ == "__main__":
    main()
