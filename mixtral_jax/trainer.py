"""The loop, the same for every stage: build, restore, step, look now and then, finish."""

import dataclasses
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mixtral_jax import metrics, report
from mixtral_jax.checkpoint import Checkpoints, store_run
from mixtral_jax.config import Config, RunError, UserError, resolve_mesh
from mixtral_jax.data import Corpus, load_tokenizer, open_corpus, prefetch
from mixtral_jax.generate import sample
from mixtral_jax.jsonl import JsonlWriter, read_jsonl
from mixtral_jax.models import mixtral
from mixtral_jax.optim import make_optimizer
from mixtral_jax.progress import Progress, Throughput, printable
from mixtral_jax.sharding import make_mesh, place, replicated
from mixtral_jax.stages import STAGES
from mixtral_jax.step import TrainState, abstract_state, init_state, make_train_step


class NonFiniteError(RunError):
    """The loss or the gradient norm of a step was not finite; that step's update never happened."""


@dataclasses.dataclass
class Run:
    """Everything a run has at hand between its steps; built by `start`."""

    config: Config
    workdir: Path
    mesh: jax.sharding.Mesh
    tokenizer: Any
    corpus: Corpus
    batches: Any
    data_state: dict | None  # of streamed batches, after the last step's
    state: TrainState
    step_fn: Callable
    heldout: Callable  # (params, limit) -> {"loss", "bits_per_byte", ...}
    checkpoints: Checkpoints
    flops_per_token: float
    peak_flops: float
    progress: Progress
    writer: JsonlWriter
    throughput: Throughput

    @property
    def finished(self) -> bool:
        """Whether the final evaluation of the last step is already written."""
        lines = read_jsonl(self.workdir / "metrics.jsonl")
        return any(line["kind"] == "final" and line["step"] == self.config.train.steps for line in lines)


def start(config: Config, workdir: Path, make_heldout: Callable) -> Run:
    """Builds a run from a configuration whose mesh is resolved, restores its state if there is one, prints the header.

    Raises:
        UserError: the tokenizer, the data or the checkpoint does not fit the configuration.
    """
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.cache_dir, config.data.heldout_fraction)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids and model.vocab_size={config.model.vocab_size}; "
            f"raise model.vocab_size to at least {tokenizer.vocab_size}"
        )
    corpus = open_corpus(config.data, tokenizer)
    mesh = make_mesh(config.mesh)
    stage = STAGES[config.train.stage]
    optimizer = make_optimizer(config.optim, config.train.steps)
    checkpoints = Checkpoints(workdir, config.train.checkpoints_to_keep)
    # Where the state comes from: this run's newest checkpoint if there is one, else random weights.
    step = checkpoints.latest()
    if step is None:
        state, shardings = init_state(config, optimizer, mesh)
    else:
        _check_resume(config, checkpoints, step, _identity(config, tokenizer, corpus))
        like, shardings = abstract_state(config, optimizer, mesh)
        params, opt_state = checkpoints.restore(step, like.params, like.opt_state)
        scalars = jax.device_put((np.int32(step), np.bool_(False)), replicated(mesh))
        state = TrainState(scalars[0], params, opt_state, scalars[1])
    store_run(workdir, config.to_dict())
    tokenizer.save(workdir / "tokenizer")
    step_fn = jax.jit(
        make_train_step(config, optimizer, stage.loss), donate_argnums=0, out_shardings=(shardings, replicated(mesh))
    )
    peak, peak_source = metrics.mesh_peak_flops(mesh.devices.flat, config.model.dtype)
    first = step or 0
    progress = Progress(config.train.steps, first, log_every=config.train.log_every)
    progress.note(_header(config, mesh, tokenizer, corpus, peak, peak_source))
    if step is not None:
        progress.note(f"resumed from {checkpoints.folder}/{step}")
    return Run(
        config=config,
        workdir=workdir,
        mesh=mesh,
        tokenizer=tokenizer,
        corpus=corpus,
        batches=stage.batches(config, corpus, tokenizer),
        data_state=checkpoints.meta(step)["data"] if step is not None and config.data.streaming else None,
        state=state,
        step_fn=step_fn,
        heldout=make_heldout(config, corpus.heldout),
        checkpoints=checkpoints,
        flops_per_token=metrics.flops_per_token(config.model, config.train.seq_len),
        peak_flops=peak,
        progress=progress,
        writer=JsonlWriter(workdir / "metrics.jsonl", resume_step=first if step is not None else -1),
        throughput=Throughput(config.train.batch_size * config.train.seq_len),
    )


def _identity(config: Config, tokenizer, corpus: Corpus) -> dict[str, Any]:
    """What decides the batches of a run; stored with each checkpoint, because a resume with another would change them."""
    train = config.train
    return {
        "corpus": corpus.key,  # files, tokenizer and data.heldout_fraction
        "tokenizer": tokenizer.fingerprint,
        "train.seed": train.seed,
        "train.batch_size": train.batch_size,
        "train.seq_len": train.seq_len,
    }


def _check_resume(config: Config, checkpoints: Checkpoints, step: int, identity: dict[str, Any]) -> None:
    meta = checkpoints.meta(step)
    if "identity" not in meta:
        raise UserError(f"{checkpoints.folder.parent} holds imported weights and no run; train in another workdir")
    stored = meta["identity"]
    lines = [
        f"  {name}: checkpoint {stored[name]}, now {value}" for name, value in identity.items() if stored[name] != value
    ]
    if lines:
        raise UserError(
            f"the run in {checkpoints.folder.parent} is another one; restore these values or use another workdir:\n"
            + "\n".join(lines)
        )
    if step > config.train.steps:
        raise UserError(
            f"the newest checkpoint in {checkpoints.folder} is of step {step}, beyond train.steps={config.train.steps}; "
            f"set train.steps to at least {step}, or use another workdir"
        )


def _header(config, mesh, tokenizer, corpus, peak, peak_source) -> str:
    total, active = mixtral.parameter_counts(config.model)
    return metrics.header(
        config,
        total_params=total,
        active_params=active,
        mesh_shape=dict(mesh.shape),
        tokenizer_name=tokenizer.name,
        num_train_tokens=0 if config.data.streaming else len(corpus.train.tokens),
        device_kind=jax.devices()[0].device_kind,
        num_devices=mesh.size,
        peak=peak,
        peak_source=peak_source,
    )


def fit(config: Config, workdir: str | Path, make_heldout: Callable, baselines: Callable) -> dict[str, float]:
    """Trains to config.train.steps, resuming where the workdir left off.

    Args:
        config: validated; its mesh is resolved against the devices here.
        workdir: gets checkpoints/, config.json, tokenizer/, metrics.jsonl, report.png.
        make_heldout: (config, held-out TokenFile) -> callable (params, limit) -> {"loss", "bits_per_byte", ...}.
        baselines: (config, corpus) -> scores to compare with at the end.

    Returns:
        The final metrics: held-out loss and bits per byte, and the baselines'. Empty if the run was finished before.

    Raises:
        UserError: see `start`.
        NonFiniteError: a loss or gradient norm was not finite; the step's update did not happen.
    """
    if jax.process_count() > 1:
        raise UserError(f"{jax.process_count()} processes were started; training with more than one is not built yet")
    config = resolve_mesh(config, jax.device_count())
    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be made a folder: {error}") from error
    run = start(config, workdir, make_heldout)
    try:
        with jax.set_mesh(run.mesh):
            values = _train(run)
            if run.finished:
                run.progress.note("this run is finished; raise train.steps to go on, or choose another workdir")
                return {}
            return _finish(run, baselines, values)
    finally:
        run.progress.close()
        run.writer.close()
        run.checkpoints.close()


def _train(run: Run) -> dict | None:
    """The loop. Metrics of a step are fetched after the next one is dispatched, so that the device never waits."""
    train = run.config.train
    first = int(jax.device_get(run.state.step))
    pending = values = None
    ahead = prefetch(run.batches, first, train.steps, run.config.data.workers, state=run.data_state)
    for k, batch, run.data_state in ahead:
        arrays = place(batch, run.mesh)
        with jax.transfer_guard("disallow"):
            run.state, on_device = run.step_fn(run.state, arrays)
        if pending is not None:
            values = _log(run, *pending)
        step = k + 1
        pending = (step, on_device, batch["documents"])
        due = [
            every > 0 and step % every == 0 for every in (train.eval_every, train.sample_every, train.checkpoint_every)
        ]
        if any(due) or step == train.steps:
            values, pending = _log(run, *pending), None
            with run.throughput.pause():
                _interlude(run, step, *due)
    return values


def _log(run: Run, step: int, on_device: dict, documents: list) -> dict:
    """Fetches, checks and writes the metrics of one step; returns them as host values."""
    values = jax.device_get(on_device)
    if values.pop("halted"):
        names = sorted({name for row in documents for name in row})
        saved = run.checkpoints.latest()
        stands = (
            "there is no checkpoint yet" if saved is None else f"{run.checkpoints.folder}/{saved} is the last good one"
        )
        raise NonFiniteError(
            f"step {step}: loss {values['loss']}, gradient norm {values['gradient_norm']}. The update was not made; {stands}. "
            f"Documents of this batch: {', '.join(names[:20])}{f' and {len(names) - 20} more' if len(names) > 20 else ''}. "
            "Try a lower optim.learning_rate, a longer optim.warmup_steps, or loss.z_weight=1e-4."
        )
    health = metrics.router_health(values["load_LE"], values["entropy_L"], values["dropped_L"])
    speed = run.throughput.tick()
    values |= {
        "tokens_per_second": speed,
        "mfu": speed and speed * run.flops_per_token / run.peak_flops,
        "max_over_mean_L": health["max_over_mean_L"],
    }
    run.progress.update(step, values)
    if step % run.config.train.log_every == 0 or step in (1, run.config.train.steps):
        run.writer.write("train", step, values)
    return values


def _interlude(run: Run, step: int, evaluate: bool, draw_sample: bool, save: bool) -> None:
    """What happens between steps now and then: held-out loss, a sample of text, a checkpoint, in this order."""
    train = run.config.train
    last = step == train.steps
    if evaluate and not last:
        found = run.heldout(run.state.params, train.eval_batches)
        run.writer.write("heldout", step, {name: found[name] for name in ("loss", "bits_per_byte")})
        run.progress.note(
            f"held-out at step {step}: loss {found['loss']:.4f}, {found['bits_per_byte']:.4f} bits per byte"
        )
        report.write_report(run.workdir / "metrics.jsonl", run.workdir / "report.png", run.workdir.name)
    if draw_sample or (last and train.sample_every):
        prompt = train.sample_prompt
        text = sample(
            run.state.params,
            run.tokenizer,
            prompt,
            max_tokens=train.sample_tokens,
            temperature=0.7,
            seed=train.seed + step,
        )
        run.writer.write("sample", step, {"text": prompt + text})
        shown = textwrap.indent(printable(prompt + text), "    | ", lambda line: True)
        run.progress.note(f"sample at step {step}:\n{shown}")
    if save or last:
        meta = {"identity": _identity(run.config, run.tokenizer, run.corpus), "data": run.data_state}
        run.checkpoints.save(step, run.state.params, run.state.opt_state, meta)


def _finish(run: Run, baselines: Callable, values: dict | None) -> dict[str, float]:
    """The last words: the whole held-out split, the baselines, the routers' health, the report."""
    run.progress.note("evaluating on the whole held-out split ...")
    found = run.heldout(run.state.params, None)
    final = {name: found[name] for name in ("loss", "bits_per_byte", "tokens")} | baselines(run.config, run.corpus)
    run.writer.write("heldout", run.config.train.steps, {name: found[name] for name in ("loss", "bits_per_byte")})
    run.writer.write("final", run.config.train.steps, final)
    if values is not None:
        run.progress.note(metrics.router_table(values["load_LE"], values["entropy_L"], values["dropped_L"]))
    run.progress.note(_verdict(final))
    path = report.write_report(run.workdir / "metrics.jsonl", run.workdir / "report.png", run.workdir.name)
    run.progress.note(f"checkpoint  {run.checkpoints.folder}/{run.config.train.steps}\nreport      {path}")
    return final


def _verdict(final: dict[str, float]) -> str:
    """The comparison a person looks for: ours against the n-gram models on the same text."""
    rows = [("unigram", final["unigram_bits_per_byte"]), ("bigram", final["bigram_bits_per_byte"])]
    rows.append(("this model", final["bits_per_byte"]))
    lines = [f"  {name:<10}  {bits:7.4f}" for name, bits in rows]
    better = final["bits_per_byte"] < final["bigram_bits_per_byte"]
    closing = "beats the bigram model" if better else "does not beat the bigram model: train longer"
    return "\n".join([f"held-out bits per byte ({final['tokens']:,} tokens):", *lines, f"  The model {closing}."])
