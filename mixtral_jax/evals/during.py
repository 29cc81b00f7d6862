"""Evaluations while a run trains (train.evals): with default settings, on the parameters as they are."""

from collections.abc import Iterator, Sequence

from mixtral_jax.config import Config, UserError
from mixtral_jax.evals import EVALS
from mixtral_jax.evals.run import merged
from mixtral_jax.evals.settings import Settings
from mixtral_jax.evals.subject import Subject
from mixtral_jax.run import Run


def check(config: Config) -> None:
    """Refuses, before a run starts, what train.evals cannot mean.

    Raises:
        UserError: an unknown evaluation, or one for other stages.
    """
    stage = config.train.stage
    for name in config.train.evals_every():
        fitting = [each for each, evaluation in EVALS.items() if stage in evaluation.stages]
        if name not in fitting:
            raise UserError(
                f"train.evals={config.train.evals}: {name} is no evaluation for train.stage={stage}; there are {', '.join(fitting)}"
            )
        if EVALS[name].check is not None:
            EVALS[name].check(config, Settings())


def measure(run: Run, names: Sequence[str]) -> Iterator[tuple[str, dict[str, float]]]:
    """Runs evaluations on the model a run has made so far, on its own mesh.

    Args:
        run: between two steps.
        names: of EVALS.

    Yields:
        (evaluation, {metric: value}), the values that are numbers.
    """
    meta = {} if run.frozen_meta is None else {"frozen": run.frozen_meta}
    subject = Subject(
        name=str(run.workdir),
        config=merged(run.config),  # run.model has its adapters in place
        model=run.model,
        mesh=run.mesh,
        tokenizer=run.tokenizer,
        settings=Settings(),
        open_corpus=lambda: run.corpus,
        note=run.progress.note,
        meta=meta,
        spare_memory=True,
    )
    for name in names:
        found = dict(EVALS[name].run(subject))
        yield name, {metric: value for metric, value in found.items() if _is_number(value)}


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
