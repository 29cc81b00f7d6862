"""Evaluate a checkpoint, by default a run's newest one, on its own held-out split; or compare several.

    python eval.py --checkpoint=runs/tiny --out=reports/tiny
    python eval.py --checkpoint=runs/tiny --evals=perplexity --step=200 --out=reports/tiny
    python eval.py --compare runs/demo/pretrain runs/demo/sft runs/demo/dpo --out=runs/demo/comparison

Prints a table and writes results.json into --out; a comparison writes comparison.json, comparison.md and comparison.png.
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
_EVALS = flags.DEFINE_list(
    "evals", None, "Which evaluations, separated by commas; default: all that mean something for the run's stage."
)
_COMPARE = cli.define_several(
    "compare", "Checkpoints to compare on the held-out data of the last tuned one: the base first, then SFT, DPO."
)
_QUESTIONS = flags.DEFINE_integer("questions", 5, "With --compare: held-out questions that every model answers.")
_OUT = flags.DEFINE_string("out", None, "Folder for the results, for example reports/tiny.")


def main() -> None:
    """Flags -> checkpoint -> evaluations -> results."""
    several, step = _COMPARE.value, _STEP.value
    for name in ("out",) if several else ("checkpoint", "out"):
        if not flags.FLAGS[name].value:
            raise UserError(f"--{name} is missing; for example --checkpoint=runs/tiny --out=reports/tiny")
    if several and (_CHECKPOINT.value or _EVALS.value or step not in (None, "best")):
        raise UserError(
            "--compare takes all checkpoints by itself and has measurements of its own: leave --checkpoint, --evals and a number "
            "in --step out (WORKDIR/checkpoints/STEP names a step)"
        )
    from mixtral_jax import compilation_cache
    from mixtral_jax.evals import compare, run
    from mixtral_jax.resolve import parse_step

    step = None if step is None else parse_step(step)
    compilation_cache.enable()
    cli.join_processes()
    if several:
        compare.compare(several, _OUT.value, _QUESTIONS.value, step)
    else:
        run.evaluate(_CHECKPOINT.value, step, _EVALS.value, _OUT.value)


if __name__ == "__main__":
    cli.run(main, __doc__)
