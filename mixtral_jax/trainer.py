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
from mixtral_jax.config import Config, UserError, resolve_mesh
from mixtral_jax.data import Corpus, build_cache, load_tokenizer, prefetch
from mixtral_jax.generate import sample
from mixtral_jax.jsonl import JsonlWriter, read_jsonl
from mixtral_jax.models import mixtral
from mixtral_jax.optim import make_optimizer
from mixtral_jax.progress import Progress, Throughput
from mixtral_jax.sharding import make_mesh, place, replicated
from mixtral_jax.stages import STAGES
from mixtral_jax.step import TrainState, init_state, make_train_step


class NonFiniteError(RuntimeError):
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
    """Builds a run, restores its state where there is one, and prints the header.

    Raises:
        UserError: the mesh, the tokenizer, the data or the checkpoint does not fit the configuration.
    """
    config = resolve_mesh(config, jax.device_count())
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.cache_dir)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids and model.vocab_size={config.model.vocab_size}; "
            f"raise model.vocab_size to at least {tokenizer.vocab_size}"
        )
    corpus = build_cache(config.data, tokenizer)
    mesh = make_mesh(config.mesh)
    stage = STAGES[config.train.stage]
    optimizer = make_optimizer(config.optim, config.train.steps)
    state, shardings = init_state(config, optimizer, mesh)
    checkpoints = Checkpoints(workdir, config.train.checkpoints_to_keep)
    # Where the state comes from: this run's newest checkpoint if there is one, else random weights.
    step = checkpoints.latest()
    if step is not None:
        params, opt_state, meta = checkpoints.restore(step, state.params, state.opt_state)
        if meta["tokenizer"] != tokenizer.fingerprint:
            raise UserError(f"{workdir} was trained with another tokenizer than {tokenizer.name}; use another workdir")
        state = TrainState(jax.device_put(np.int32(step), replicated(mesh)), params, opt_state, state.halted)
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
        batches=stage.batches(config, corpus.train),
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


def _header(config, mesh, tokenizer, corpus, peak, peak_source) -> str:
    total, active = mixtral.parameter_counts(config.model)
    return metrics.header(
        config,
        total_params=total,
        active_params=active,
        mesh_shape=dict(mesh.shape),
        tokenizer_name=tokenizer.name,
        num_train_tokens=len(corpus.train.tokens),
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
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
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
    for k, batch in prefetch(run.batches, first, train.steps, run.config.data.workers):
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
        raise NonFiniteError(
            f"step {step}: loss {values['loss']}, gradient norm {values['gradient_norm']}. The update was not made, and the "
            f"checkpoints in {run.checkpoints.folder} are good up to step {run.checkpoints.latest()}. Documents of this batch: "
            f"{', '.join(names[:20])}{f' and {len(names) - 20} more' if len(names) > 20 else ''}. "
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
        run.progress.note(f"sample at step {step}:\n" + textwrap.indent(prompt + text, "    | ", lambda line: True))
    if save or last:
        meta = {"tokenizer": run.tokenizer.fingerprint, "step": step}
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
