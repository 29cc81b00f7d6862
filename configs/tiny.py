"""A tiny Mixtral on the running Python's own standard-library source: what `make demo` trains.

    python train.py --config=configs/tiny.py --workdir=runs/tiny

Hardware: any 2 CPU cores. Time: 3 to 5 minutes. Result (2026-11-22, Python 3.11.7): 1.989 held-out bits per byte; the
bigram model has 2.276, the unigram model 3.432.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """Arguments: `steps=N` (a shorter or longer run, its rhythm scaled); `tiny` (seconds, for tests)."""
    args = common.parse_arg(arg, tiny=False, steps=400)
    c = common.base()
    c.model.update(
        vocab_size=1024,
        num_layers=3,
        d_model=128,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
        d_ff=256,
        max_seq_len=1024,
        dtype="float32",
        remat="none",
    )
    c.loss.update(balance_weight=0.02, head_chunk=128)
    c.optim.update(learning_rate=4e-3, warmup_steps=max(args.steps // 10, 1), final_lr_ratio=0.05)
    c.data.update(tokenizer="stdlib:1024", heldout_fraction=0.05)
    fifth = max(args.steps // 5, 1)
    c.train.update(
        steps=args.steps,
        batch_size=16,
        seq_len=256,
        log_every=max(args.steps // 60, 1),
        eval_every=fifth,
        eval_batches=8,
        sample_every=fifth,
        sample_tokens=96,
        checkpoint_every=fifth,
        checkpoints_to_keep=2,
    )
    return common.shrink(c) if args.tiny else c
