"""Supervised fine-tuning of Mixtral 8x7B on conversations: all weights, or LoRA.

    python -m mixtral_jax.data --config=configs/sft.py --config.data.path=chats.jsonl --config.data.source=jsonl --validate
    python train.py --config=configs/sft.py --workdir=runs/sft --config.train.init_from=hf:Mixtral-8x7B-v0.1 \
        --config.data.source=jsonl --config.data.path='chats/*.jsonl'
    python train.py --config=configs/sft.py:lora --workdir=runs/sft-lora --config.train.init_from=hf:Mixtral-8x7B-v0.1

Without --config.data.path it reads UltraChat 200k from the hub, some 200,000 conversations. Values: AdamW without weight
decay, cosine, learning rate 2e-5, 10% warm-up and 1 to 3 epochs are Zephyr's (arXiv 2310.16944, section 4); Tulu 2 has 2e-5
and 2 epochs (arXiv 2311.10702). The router terms stay on with half of pretraining's weight: the balance that pretraining
has made is kept and not forced. LoRA: rank 64 is mistral-finetune's, the learning rate five times the full one. Steps: about
one epoch of UltraChat packed into rows of 4,096, which is an estimate; `--validate` counts it. Mesh: a copy of the model on 64
chips, as in pretraining; compiled ahead of time for v5p:4x4x4 it takes 78.5 of 95.7 GiB a chip, with LoRA 55.2
(docs/plan.md). Result: not yet measured.
"""

from ml_collections import ConfigDict

from configs import common, mixtral_8x7b


def get_config(arg: str | None = None) -> ConfigDict:
    """Arguments: `lora` (adapters on a frozen base); `tiny` (the same recipe at a size that trains in seconds on a CPU)."""
    args = common.parse_arg(arg, tiny=False, lora=False)
    c = mixtral_8x7b.get_config()
    c.loss.update(balance_weight=0.02)
    c.optim.update(learning_rate=2e-5, warmup_steps=60, final_lr_ratio=0.0, weight_decay=0.0, b2=0.999)
    c.data.update(source="hub", path="HuggingFaceH4/ultrachat_200k:default:train_sft", heldout_fraction=0.01)
    c.train.update(
        stage="sft",
        steps=600,
        batch_size=128,
        seq_len=4096,
        accumulation_steps=2,
        eval_every=100,
        checkpoint_every=100,
        sample_every=100,
        sample_tokens=256,
        sample_prompts=(
            "Explain in three sentences why the sky is blue.",
            "Write a Python function that returns the n-th Fibonacci number.",
            "My friend is sad because her dog died. What can I say to her?",
        ),
    )
    if args.lora:
        c.optim.update(learning_rate=1e-4)
        c.lora.update(rank=64, alpha=64.0)
    return common.shrink(c) if args.tiny else c
