"""Train a Mixtral: pretraining, supervised fine-tuning (SFT), direct preference optimization (DPO).

    python train.py --config=configs/tiny.py --workdir=runs/tiny
    python train.py --config=configs/mixtral_8x7b.py --workdir=runs/8x7b --config.optim.learning_rate=1e-4

A workdir holds checkpoints/, config.json, tokenizer/, metrics.jsonl, tensorboard/ and report.png. The same command again
resumes it; Ctrl-C and SIGTERM save first.
"""

from mixtral_jax import host_memory

if __name__ == "__main__":  # before jax is imported, for that takes long and would be done twice
    host_memory.restart_with_huge_pages()

from absl import flags

from mixtral_jax import cli
from mixtral_jax.config import UserError

_CONFIG = cli.define_config_flag()
cli.define_process_flags()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: created, or resumed if it holds checkpoints.")
_PROFILE = flags.DEFINE_string("profile", "", "FIRST:STOP: trace these steps into WORKDIR/profile, for example 10:15.")


def main() -> None:
    """Flags -> config -> fit."""
    config = cli.typed_config(_CONFIG.value)
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; for example --workdir=runs/tiny")
    # After the checks: a mistake is answered before jax has started.
    from mixtral_jax import compilation_cache, evals, trainer
    from mixtral_jax.evals import during
    from mixtral_jax.profile import parse_profile

    profile = parse_profile(_PROFILE.value)
    during.check(config)

    compilation_cache.enable()
    cli.join_processes()
    trainer.fit(config, _WORKDIR.value, evals.heldout, evals.baselines, profile, during.measure)


if __name__ == "__main__":
    cli.run(main, __doc__, "interrupted; run the same command again to continue from the last checkpoint")
