"""A tiny Mixtral on the running Python's own standard-library source: what `make demo` trains.

    python train.py --config=configs/tiny.py --workdir=runs/tiny

Hardware: any 2 CPU cores. Time: about 4 minutes. Result: not yet measured.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """Arguments: `tiny` (seconds instead of minutes, for tests)."""
    args = common.parse_arg(arg, tiny=False)
    c = common.base()
    c.model.update(
        vocab_size=4096,
        num_layers=4,
        d_model=256,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        d_ff=512,
        max_seq_len=1024,
        dtype="float32",
        remat="none",
    )
    c.loss.update(balance_weight=0.02, head_chunk=128)
    c.optim.update(learning_rate=2e-3, warmup_steps=40, final_lr_ratio=0.05)
    c.data.update(tokenizer="stdlib:4096")
    c.train.update(
        steps=400,
        batch_size=16,
        seq_len=256,
        log_every=10,
        eval_every=100,
        eval_batches=8,
        sample_every=100,
        checkpoint_every=200,
        checkpoints_to_keep=2,
    )
    return common.shrink(c) if args.tiny else c
