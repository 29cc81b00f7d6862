"""Supervised fine-tuning of Mixtral 8x7B on conversations: all weights, or LoRA.

    python -m mixtral_jax.data --config=configs/sft.py --config.data.path=chats.jsonl --config.data.source=jsonl --validate
    python train.py --config=configs/sft.py --workdir=runs/sft --config.train.init_from=hf:Mixtral-8x7B-v0.1 \
        --config.data.source=jsonl --config.data.path='chats/*.jsonl'
    python train.py --config=configs/sft.py:lora --workdir=runs/sft-lora --config.train.init_from=hf:Mixtral-8x7B-v0.1

Without --config.data.path it reads UltraChat 200k, 207,865 conversations, from the hub. Values: AdamW, cosine, learning rate
2e-5 and 10% warm-up are Zephyr's (arXiv 2310.16944, section 4.2: 1 to 3 epochs); Tulu 2 has 2e-5 and 2 epochs too
(arXiv 2311.10702, appendix A). No weight decay, as both. The router terms stay on with a smaller weight: without them a
few thousand steps on narrow data can undo the balance. LoRA: rank 64 is mistral-finetune's, 1e-4 five times the full
learning rate (LoRA: arXiv 2106.09685, appendix D). Steps: about one epoch of UltraChat packed into rows of 4,096, which is
an estimate; `--validate` counts it. Mesh: a copy of the model on 64 chips, as pretraining. Result: not yet measured.
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
