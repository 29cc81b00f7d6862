"""Evaluate a checkpoint: a run's workdir or step, or hf:DIR; or set several side by side.

    python eval.py --checkpoint=runs/tiny --out=reports/tiny
    python eval.py --checkpoint=runs/tiny --evals=perplexity,routing --step=200 --out=reports/tiny
    python eval.py --checkpoint=hf:Mixtral-8x7B-v0.1 --evals=passkey,context --mesh=expert=8 --out=reports/8x7b
    python eval.py --compare runs/demo/pretrain runs/demo/sft runs/demo/dpo --out=runs/demo/comparison

Prints tables; writes results.json, report.md and report.html (one file, no network) into --out. The same command again
goes on where an interrupted one was. See docs/evaluation.md.
"""

from mixtral_jax import host_memory

if __name__ == "__main__":  # before jax is imported, for that takes long and would be done twice
    host_memory.restart_with_huge_pages()

import dataclasses

from absl import flags

from mixtral_jax import cli
from mixtral_jax.config import UserError, mesh_sizes
from mixtral_jax.evals.settings import Settings, read_settings

cli.define_process_flags()
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A run's workdir or WORKDIR/checkpoints/STEP, here or on a store (gs://bucket/run), or hf:DIR."
)
_STEP = flags.DEFINE_string(
    "step", None, "Of a workdir, which checkpoint: a number, or best (lowest held-out loss); default: the newest."
)
_EVALS = flags.DEFINE_list(
    "evals", None, "Which evaluations, separated by commas, or all; default: the short ones that fit the run's stage."
)
_COMPARE = cli.define_several(
    "compare",
    "Checkpoints to set side by side, the base first, then SFT, DPO: on what the last tuned one held out, and with --evals.",
)
_QUESTIONS = flags.DEFINE_integer("questions", 5, "With --compare: held-out questions that every model answers.")
_OUT = flags.DEFINE_string("out", None, "Folder for the results, for example reports/tiny.")
_MESH = flags.DEFINE_string(
    "mesh", None, "Axes of the mesh over the devices here: expert=4,tensor=2 (default: fsdp=-1)."
)


def _define(field: dataclasses.Field) -> None:
    """A flag for a field of Settings."""
    default, words = field.default, field.metadata["help"]
    if isinstance(default, tuple):
        flags.DEFINE_list(field.name, [str(item) for item in default], words)
    else:
        kinds = {bool: flags.DEFINE_boolean, int: flags.DEFINE_integer, str: flags.DEFINE_string}
        kinds[type(default)](field.name, default, words)


for _field in dataclasses.fields(Settings):
    _define(_field)


def _settings() -> Settings:
    """The settings that the flags give.

    Raises:
        UserError: an item of a list is no number where one is meant.
    """
    given = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Settings)}
    return read_settings(given)


def main() -> None:
    """Flags -> checkpoint -> evaluations -> results."""
    several, step = _COMPARE.value, _STEP.value
    for name in ("out",) if several else ("checkpoint", "out"):
        if not flags.FLAGS[name].value:
            raise UserError(f"--{name} is missing; for example --checkpoint=runs/tiny --out=reports/tiny")
    if several and (_CHECKPOINT.value or step not in (None, "best")):
        raise UserError(
            "--compare takes all checkpoints by itself: leave --checkpoint and a number in --step out (WORKDIR/checkpoints/STEP "
            "names a step)"
        )
    settings, sizes = _settings(), mesh_sizes(_MESH.value)
    from mixtral_jax import compilation_cache
    from mixtral_jax.evals import compare, run
    from mixtral_jax.resolve import parse_step

    step = None if step is None else parse_step(step)
    compilation_cache.enable()
    cli.join_processes()
    if several:
        compare.compare(several, _OUT.value, _QUESTIONS.value, step, _EVALS.value, settings, sizes)
    else:
        run.evaluate(_CHECKPOINT.value, step, _EVALS.value, _OUT.value, settings, sizes)


if __name__ == "__main__":
    cli.run(
        main,
        __doc__,
        "interrupted; run the same command again to go on: finished pieces are kept in the folder of --out",
    )
