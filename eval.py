"""Evaluate a checkpoint, by default a run's newest one, on its own held-out split.

    python eval.py --checkpoint=runs/tiny --out=reports/tiny
    python eval.py --checkpoint=runs/tiny --evals=perplexity --step=200 --out=reports/tiny

Prints a table and writes results.json into --out.
"""

from absl import flags

from mixtral_jax import cli
from mixtral_jax.config import UserError

cli.define_process_flags()
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A run's workdir or WORKDIR/checkpoints/STEP, here or on a store (gs://bucket/run), or hf:DIR."
)
_STEP = flags.DEFINE_string(
    "step", None, "Of a workdir, which checkpoint: a number, or best (lowest held-out loss); default: the newest."
)
_EVALS = flags.DEFINE_list("evals", ["perplexity", "baselines"], "Which evaluations, separated by commas.")
_OUT = flags.DEFINE_string("out", None, "Folder for results.json, for example reports/tiny.")


def main() -> None:
    """Flags -> checkpoint -> evaluations -> results."""
    for name in ("checkpoint", "out"):
        if not flags.FLAGS[name].value:
            raise UserError(f"--{name} is missing; for example --checkpoint=runs/tiny --out=reports/tiny")
    from mixtral_jax import compilation_cache
    from mixtral_jax.evals import run
    from mixtral_jax.resolve import parse_step

    step = None if _STEP.value is None else parse_step(_STEP.value)
    compilation_cache.enable()
    cli.join_processes()
    run.evaluate(_CHECKPOINT.value, step, _EVALS.value, _OUT.value)


if __name__ == "__main__":
    cli.run(main, __doc__)
