"""A tiny Mixtral on the running Python's own standard-library source: what `make demo` trains.

    python train.py --config=configs/tiny.py --workdir=runs/tiny
    python train.py --config=configs/tiny.py:stage=sft,steps=400 --workdir=runs/tiny-sft --config.train.init_from=runs/tiny
    python train.py --config=configs/tiny.py:stage=dpo,steps=300 --workdir=runs/tiny-dpo --config.train.init_from=runs/tiny-sft

Hardware: any 2 CPU cores. Time: 3 to 5 minutes. Result (2026-11-22, Python 3.11.7): 1.989 held-out bits per byte; the
bigram model has 2.276, the unigram model 3.432.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """Arguments: `steps=N` (a shorter or longer run, its rhythm scaled); `stage=sft` or `stage=dpo`; `tiny` (seconds, for tests)."""
    args = common.parse_arg(arg, tiny=False, steps=400, stage="pretrain")
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
    if args.stage != "pretrain":
        _tune(c, args.stage)
    return common.shrink(c) if args.tiny else c


def _tune(c: ConfigDict, stage: str) -> None:
    """SFT and DPO on questions about the standard library, the answers being its documentation."""
    c.optim.update(learning_rate={"sft": 2e-3, "dpo": 1e-3}[stage], weight_decay=0.0)
    c.dpo.update(beta=0.1, sft_weight=0.5)  # without that term a model so small forgets how to write
    c.train.update(
        stage=stage,
        sample_prompts=(
            "What does the function os.path.isdir(path) do?",
            "Summarise this Python method: def list.append(object)",
            "What is the class collections.OrderedDict for?",
        ),
        sample_tokens=48,
    )
