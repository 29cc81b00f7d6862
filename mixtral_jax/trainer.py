"""The loop, the same for every stage: build, restore, step, look now and then, finish."""

import contextlib
import errno
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from mixtral_jax import distributed, interlude, metrics, watch
from mixtral_jax.checkpoint import SaveError
from mixtral_jax.config import Config, RunError, TrainConfig, UserError, resolve_mesh
from mixtral_jax.data import prefetch
from mixtral_jax.interrupt import Interrupt
from mixtral_jax.memory import explain_oom, is_oom
from mixtral_jax.optim import make_optimizer
from mixtral_jax.profile import Profiler
from mixtral_jax.run import Run, start
from mixtral_jax.sharding import make_mesh, place
from mixtral_jax.step import abstract_state
from mixtral_jax.timing import Breakdown, per_step
from mixtral_jax.workdir import held_by_all

# What a person put in the way: a file for a folder, a folder for a file, a folder that is not theirs.
MISTAKES = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM)


class NonFiniteError(RunError):
    """The loss or the gradient norm of a step was not finite; that step's update never happened."""


def fit(
    config: Config,
    workdir: str | Path,
    make_heldout: Callable,
    baselines: Callable,
    profile: tuple[int, int] | None = None,
    measure: Callable | None = None,
) -> dict[str, float]:
    """Trains to config.train.steps, resuming where the workdir left off.

    Args:
        config: validated; its mesh is resolved against the devices here.
        workdir: gets checkpoints/, config.json, tokenizer/, metrics.jsonl, report.png; may be on an object store (mirror.py).
        make_heldout: (config, corpus, Reference or None) -> callable (params, limit, frozen) -> {"loss", ...}.
        baselines: (config, corpus) -> scores to compare with at the end.
        profile: trace the steps from the first to the one before the second, counted from 1.
        measure: (Run, names) -> (evaluation, {metric: number}) one after the other, for what train.evals names.

    Returns:
        The final metrics: held-out loss and bits per byte, and the baselines'. Empty if the run was finished before.

    Raises:
        UserError: the workdir is in use; train.continue_on_save_error with several processes; or see `start`.
        NonFiniteError: more losses or gradient norms than train.skip_nonfinite were not finite; see its message.
        SaveError: a checkpoint could not be written.
        InterruptedRun: SIGTERM or SIGINT; what was trained is saved.
    """
    config = resolve_mesh(config, jax.device_count())
    if config.train.continue_on_save_error and distributed.together():
        raise UserError(
            f"train.continue_on_save_error=True with {distributed.process_count()} processes: one that cannot write would keep the "
            "others waiting at the next save; set it to False: the run then ends, and goes on from the last checkpoint"
        )
    distributed.same(_flat(config), "start all with the same command")
    with (
        Interrupt("run the same command again to go on", watch.ask_to_stop) as interrupt,
        held_by_all(workdir) as local,
    ):
        with _memory_explained(config), _files_explained():
            run = start(config, local, make_heldout, workdir)
            run.measure = measure
        try:
            with jax.set_mesh(run.mesh), _memory_explained(config):
                profiler = Profiler(local, *(profile or (0, 0)))
                try:
                    values = _train(run, interrupt, profiler)
                finally:
                    _note(run, profiler.close())
                interlude.watch_saves(run, run.checkpoints.finish)
                interrupt.disarm("after the last step, which is saved")
                finished = distributed.decided("finished", lambda: interlude.is_finished(run))
                final = {} if finished else interlude.finish(run, baselines, values)
        except BaseException:
            with contextlib.suppress(SaveError):  # the first error is the one to tell
                run.close(saves=not distributed.together())  # the others may be anywhere
            raise
        run.close()
    if not final and distributed.speaks():
        print("this run is finished; raise train.steps to go on, or choose another workdir", file=sys.stderr)
    if run.save_error is not None:
        raise run.save_error
    return final


def _flat(config: Config) -> dict[str, object]:
    """A configuration as group.key -> value."""
    return {f"{group}.{key}": value for group, values in config.to_dict().items() for key, value in values.items()}


@contextlib.contextmanager
def _memory_explained(config: Config) -> Iterator[None]:
    """Turns an error that means "out of memory" into a RunError that says what filled it and what would help."""
    try:
        yield
    except (UserError, RunError):
        raise  # explained already; a full disk, for one, is a RESOURCE_EXHAUSTED too
    except (MemoryError, RuntimeError, ValueError) as error:  # jax raises RuntimeErrors, its compilers ValueErrors too
        if not is_oom(error):
            raise
        like, _ = abstract_state(config, make_optimizer(config.optim, config.train.steps), make_mesh(config.mesh))
        raise RunError(explain_oom(error, config=config, state_or_abstract=like)) from error


@contextlib.contextmanager
def _files_explained() -> Iterator[None]:
    """Turns an error of a file, of the workdir or another, into one that names it: a mistake, or a fault of the disk."""
    try:
        yield
    except OSError as error:
        kind = UserError if error.errno in MISTAKES else RunError
        raise kind(f"{error.filename or 'a file'}: {error.strerror or error}") from error


def _train(run: Run, interrupt: Interrupt, profiler: Profiler) -> dict | None:
    """The loop. Metrics of a step are fetched after the next one is dispatched, so that the device never waits."""
    train = run.config.train
    first = int(jax.device_get(run.state.step))
    if first == 0 and train.stage != "pretrain":  # what the tuning is compared with
        with run.throughput.pause():
            _interlude(run, 0, {"evaluate", "sample"} & _wanted(train), {})
    pending = values = on_device = None
    reader = prefetch(run.batches, first, train.steps, run.config.data.workers, *run.rows, state=run.data_state)
    for k, batch, data_state in _timed(reader, run.breakdown):
        step = k + 1
        _note(run, profiler.step(step, on_device))
        with (
            run.breakdown.measure("compile" if k == first else "step"),
            jax.profiler.StepTraceAnnotation("train", step_num=step),
        ):
            arrays = place(batch, run.mesh, run.rows[0], train.batch_size)
            with jax.transfer_guard("disallow"):
                run.state, on_device = run.step_fn(run.state, arrays, run.frozen)
        if pending is not None:
            values = _log(run, *pending)
        pending = (step, on_device, batch["documents"])
        interrupt.arm()
        with run.breakdown.measure("checkpoint"):
            interlude.watch_saves(run, run.checkpoints.poll)
            if not train.continue_on_save_error:
                run.checkpoints.failing()
        due = _due(train, step, stopping=_stops_here(interrupt, step))
        if due:
            values, pending = _log(run, *pending), None
            with run.throughput.pause():
                _interlude(run, step, due, data_state)
        if _stops_here(interrupt, step):  # asked again: a signal may have come meanwhile
            _stop(run, interrupt, step, due, pending, data_state)
    return values


def _stops_here(interrupt: Interrupt, step: int) -> bool:
    """Whether the run stops after this step: at once where it is alone, else where all processes do."""
    if not distributed.together():
        return interrupt.number is not None
    here = watch.reached(step)
    interrupt.number = watch.stopping() if here else interrupt.number
    return here


def _stop(run: Run, interrupt: Interrupt, step: int, due: set[str], pending, data_state: dict) -> None:
    """Saves this step, unless that was just done, and ends the run."""
    if "save" not in due:
        if pending is not None:
            _log(run, *pending)
        _interlude(run, step, {"save"}, data_state)
    interlude.watch_saves(run, run.checkpoints.finish)
    interlude.draw_report(run)
    if run.save_error is not None:
        raise interrupt.stopped(f"step {step} is NOT saved: {run.save_error}")
    raise interrupt.stopped(f"step {step} is saved in {run.checkpoints.folder}/{step}")


def _note(run: Run, text: str | None) -> None:
    if text:
        run.progress.note(text)


def _due(train: TrainConfig, step: int, stopping: bool) -> set[str]:
    """What is to be done after a step: evaluate, sample, save, and the names of train.evals."""
    every = {"evaluate": train.eval_every, "sample": train.sample_every, "save": train.checkpoint_every}
    every |= train.evals_every()
    due = {name for name, n in every.items() if n > 0 and step % n == 0}
    if step == train.steps:
        # The last evaluation reads the whole split, after the loop.
        due = (due - {"evaluate"}) | {"save"} | ({"sample"} if train.sample_every else set()) | set(train.evals_every())
    return {"save"} if stopping else due


def _wanted(train: TrainConfig) -> set[str]:
    """What the configuration asks for now and then."""
    every = {"evaluate": train.eval_every, "sample": train.sample_every, "save": train.checkpoint_every}
    return {name for name, n in every.items() if n > 0}


def _timed(reader: Iterator, breakdown: Breakdown) -> Iterator:
    """Yields what the reader yields; waiting for it counts as data_wait."""
    with contextlib.closing(reader):
        while True:
            with breakdown.measure("data_wait"):
                item = next(reader, None)
            if item is None:
                return
            yield item


def _interlude(run: Run, step: int, due: set[str], data_state: dict) -> None:
    loss = None
    if "evaluate" in due:
        with run.breakdown.measure("eval"):
            loss = interlude.evaluate(run, step)
    if "sample" in due:
        with run.breakdown.measure("sample"):
            interlude.draw_sample(run, step)
    if names := [name for name in run.config.train.evals_every() if name in due]:
        with run.breakdown.measure("eval"):
            interlude.measure(run, step, names)
    if "save" in due:
        with run.breakdown.measure("checkpoint"):
            interlude.save(run, step, data_state, loss)


def _log(run: Run, step: int, on_device: dict, documents: list) -> dict:
    """Fetches, checks and writes the metrics of one step; returns them as host values."""
    with run.breakdown.measure("step"):
        values = jax.device_get(on_device)
    seconds = run.breakdown.take()
    run.goodput.add(seconds["step"])
    run.seconds.update(seconds)
    run.steps_since_line += 1
    skipped = int(values["skipped"])
    if values.pop("halted"):
        raise NonFiniteError(_non_finite(run, step, values, documents))
    if skipped > run.skipped:
        allowed = run.config.train.skip_nonfinite
        run.progress.note(
            f"WARNING: step {step} was skipped, number {skipped} of at most {allowed}: {_what_happened(run, values, documents)}"
        )
        run.skipped = skipped
    health = metrics.router_health(values["load_LE"], values["entropy_L"], values["dropped_L"])
    speed = run.throughput.tick()
    values |= {
        "tokens_per_second": speed,
        "mfu": speed and speed * run.flops_per_token / run.peak_flops,
        "max_over_mean_L": health["max_over_mean_L"],
        "goodput": run.goodput.value(time.time()),
        **per_step(run.seconds, run.steps_since_line),
    }
    run.progress.update(step, values)
    if step % run.config.train.log_every == 0 or step in (1, run.config.train.steps):
        run.write("train", step, values)
        run.seconds.clear()
        run.steps_since_line = 0
    return values


def _non_finite(run: Run, step: int, values: dict, documents: list) -> str:
    """Explains the step that stopped the run."""
    with contextlib.suppress(SaveError):
        run.checkpoints.finish()
    saved = run.checkpoints.latest()
    stands = "there is no checkpoint yet" if saved is None else f"{run.checkpoints.folder}/{saved} is the last good one"
    before = f"{run.skipped} such steps were skipped before (train.skip_nonfinite). " if run.skipped else ""
    return (
        f"step {step}: {_what_happened(run, values, documents)}. The update was not made; {stands}. {before}"
        "Try a lower optim.learning_rate, a longer optim.warmup_steps, loss.z_weight=1e-4, or train.skip_nonfinite=10."
    )


def _what_happened(run: Run, values: dict, documents: list) -> str:
    """Says what was not finite, and which documents all processes had read; they all come here at the same step."""
    mine = json.dumps(sorted({name for row in documents for name in row}))
    names = sorted({name for text in distributed.exchange("documents", mine) for name in json.loads(text)})
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return (
        f"loss {values['loss']}, gradient norm {values['gradient_norm']}. "
        f"Documents of this batch: {', '.join(names[:20])}{more}"
    )
