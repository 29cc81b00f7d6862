"""Direct preference optimization of a fine-tuned Mixtral 8x7B on pairs of answers: all weights, or LoRA.

    python -m mixtral_jax.data --config=configs/dpo.py --config.data.path=pairs.jsonl --config.data.source=jsonl --validate
    python train.py --config=configs/dpo.py --workdir=runs/dpo --config.train.init_from=runs/sft \
        --config.data.source=jsonl --config.data.path='pairs/*.jsonl'
    python train.py --config=configs/dpo.py:lora --workdir=runs/dpo-lora --config.train.init_from=runs/sft

Without --config.data.path it reads UltraFeedback's binarized pairs from the hub, some 60,000. Values: beta 0.1, learning rate
5e-7, 10% warm-up and no weight decay are Zephyr's (arXiv 2310.16944, section 4) and Tulu 2's (arXiv 2311.10702), whose batch
is 32 pairs and whose decay is linear. A batch here is rows, and a row of 4,096 holds about 4 of these pairs: 16 rows are about 64 pairs, so a
step sees a little more and an epoch has about 950 steps. Both are estimates; `--validate` counts them. LoRA: 5e-6, ten
times the full learning rate. The reference's log-probabilities are computed once before the first step and kept in
data.cache_dir. Mesh: a copy of the model on 16 chips; compiled ahead of time for v5p:2x2x4 it takes 63.5 of 95.7 GiB a chip,
with LoRA 15.7 (docs/plan.md). Result: not yet measured.
"""

from ml_collections import ConfigDict

from configs import common, sft


def get_config(arg: str | None = None) -> ConfigDict:
    """Arguments: `lora` (adapters on a frozen base); `tiny` (the same recipe at a size that trains in seconds on a CPU)."""
    args = common.parse_arg(arg, tiny=False, lora=False)
    c = sft.get_config("lora" if args.lora else None)
    c.optim.update(learning_rate=5e-6 if args.lora else 5e-7, warmup_steps=95)
    c.data.update(path="HuggingFaceH4/ultrafeedback_binarized:default:train_prefs")
    c.dpo.update(loss="sigmoid", beta=0.1, reference="precomputed")
    c.mesh.update(data=-1, fsdp=4, expert=4)
    c.model.update(remat="full")
    c.train.update(stage="dpo", steps=950, batch_size=16, accumulation_steps=1)
    return common.shrink(c) if args.tiny else c
