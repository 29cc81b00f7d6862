"""A run and all it has at hand between its steps."""

import dataclasses
import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from mixtral_jax import distributed, frozen, lora_base, metrics, mirror, saving
from mixtral_jax.checkpoint import Checkpoints, SaveError
from mixtral_jax.config import Config, RunError, UserError
from mixtral_jax.data import Corpus, load_tokenizer
from mixtral_jax.jsonl import first_start
from mixtral_jax.models import mixtral
from mixtral_jax.optim import make_optimizer
from mixtral_jax.preference import has_reference
from mixtral_jax.progress import Progress, Throughput
from mixtral_jax.reference import WithReference, open_reference
from mixtral_jax.resume import find_state, identity
from mixtral_jax.sharding import make_mesh, replicated
from mixtral_jax.stages import STAGES
from mixtral_jax.step import CompiledFirst, TrainState, make_train_step, model_of
from mixtral_jax.timing import Breakdown, Goodput
from mixtral_jax.workdir import store_run
from mixtral_jax.writers import MetricsWriter, require_wandb


@dataclasses.dataclass
class Run:
    """Everything a run has at hand between its steps; built by `start`."""

    config: Config
    workdir: Path
    mesh: jax.sharding.Mesh
    tokenizer: Any
    corpus: Corpus
    batches: Any
    public: str | Path | None  # the workdir as the user named it
    rows: tuple[int, int]  # of each global batch, those that this process reads: start and stop
    data_state: dict | None  # of the checkpoint it resumed from
    state: TrainState
    skipped: int  # non-finite steps so far
    step_fn: Callable
    frozen: Any  # weights that every step needs and that do not move, or None; see frozen.py
    frozen_meta: dict | None  # what checkpoints note of them
    heldout: Callable  # (params, limit, frozen) -> {"loss", "bits_per_byte", ...}
    checkpoints: Checkpoints
    flops_per_token: float
    peak_flops: float
    progress: Progress
    writer: MetricsWriter | None  # of process 0; the others write nothing
    throughput: Throughput
    breakdown: Breakdown
    goodput: Goodput
    seconds: Counter = dataclasses.field(default_factory=Counter)  # of the breakdown, since the last train line
    steps_since_line: int = 0
    copied: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)  # see mirror.push
    measure: Callable | None = None  # see trainer.fit
    save_error: SaveError | None = None  # of the latest save

    @property
    def model(self):
        """The model that the run has made so far."""
        return model_of(self.config, self.state.params, self.frozen)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Writes a line of metrics, on process 0; see MetricsWriter.write."""
        if self.writer is not None:
            self.writer.write(kind, step, values)

    def publish(self) -> None:
        """Copies what changed to a workdir on an object store, on process 0.

        Raises:
            RunError: the store does not take it, and train.continue_on_save_error is off.
        """
        if self.writer is None or self.public is None or not mirror.is_remote(self.public):
            return
        try:
            mirror.push(self.workdir, self.public, self.copied)
        except RunError as error:
            if not self.config.train.continue_on_save_error:
                raise
            self.progress.note(f"WARNING: {error}. Training goes on (train.continue_on_save_error).")

    def close(self, saves: bool = True) -> None:
        """Ends what runs in the background.

        Args:
            saves: wait for the save in flight, with all other processes. False: only this one ends here.

        Raises:
            SaveError: the save in flight failed.
        """
        self.progress.close()
        try:
            if self.writer is not None:
                self.writer.close()
            self.publish()
        finally:
            if saves:
                self.checkpoints.close()


def start(config: Config, workdir: Path, make_heldout: Callable, public: str | Path | None = None) -> Run:
    """Builds a run from a configuration whose mesh is resolved, restores its state if there is one, prints the header.

    Args:
        config: of the run.
        workdir: a local folder, see held_by_all.
        make_heldout: see trainer.fit.
        public: the workdir as the user named it, where it is on an object store; default: `workdir`.

    Raises:
        UserError: the tokenizer, the data, the checkpoint or train.init_from does not fit the configuration.
        RunError: there are checkpoints and all of them are damaged.
    """
    train = config.train
    breakdown = Breakdown()
    begin = time.time()
    if distributed.speaks():
        require_wandb(config)
    tokenizer, corpus = _open_data(config)
    mesh = make_mesh(config.mesh)
    stage = STAGES[train.stage]
    optimizer = make_optimizer(config.optim, train.steps)
    checkpoints = Checkpoints(
        public or workdir,
        train.checkpoints_to_keep,
        keep_every=train.checkpoint_keep_every,
        keep_best=train.keep_best,
        keep_going=train.continue_on_save_error,
    )
    notes = [f"removed {name}, which was not finished" for name in checkpoints.clean()]
    mine = identity(config, tokenizer, corpus)
    distributed.same(mine, "give all the same text, configuration and Python")
    found = find_state(config, optimizer, mesh, checkpoints, mine, tokenizer, notes.append)
    step_fn = CompiledFirst(
        jax.jit(
            make_train_step(config, optimizer, stage.loss),
            donate_argnums=0,
            out_shardings=(found.shardings, replicated(mesh)),
        )
    )
    progress, peak = _announce(config, mesh, tokenizer, corpus, found, notes)
    frozen_weights, frozen_meta, reference = _frozen(config, mesh, found, corpus, progress.note)
    batches = stage.batches(config, corpus, tokenizer)
    if distributed.speaks():
        store(workdir, config, tokenizer)  # now that nothing of it was refused: who reads the weights reads this
    resume_step = -1 if found.step is None else found.step
    writer = None
    if distributed.speaks():
        writer = MetricsWriter(workdir, config, resume_step, keep_going=train.continue_on_save_error)
        if (found.step or 0) < train.steps:
            writer.write("session", found.step or 0, session_line(time.time() - begin))
    return Run(
        config=config,
        workdir=workdir,
        mesh=mesh,
        tokenizer=tokenizer,
        corpus=corpus,
        batches=batches if reference is None else WithReference(batches, reference.train),
        public=public,
        rows=distributed.rows_here(mesh, train.batch_size),
        data_state=found.data,
        state=found.state,
        skipped=found.meta.get("skipped", 0),
        step_fn=step_fn,
        frozen=frozen_weights,
        frozen_meta=frozen_meta,
        heldout=make_heldout(config, corpus, reference),
        checkpoints=checkpoints,
        flops_per_token=metrics.flops_per_token(config.model, train.seq_len),
        peak_flops=peak,
        progress=progress,
        writer=writer,
        throughput=Throughput(train.batch_size * train.seq_len),
        breakdown=breakdown,
        goodput=Goodput(
            first_start(workdir / "metrics.jsonl") or time.time(), found.meta.get("productive_seconds", 0.0)
        ),
    )


def _open_data(config: Config):
    """Loads the tokenizer and opens the corpus; what is missing in the cache is built by process 0.

    Raises:
        UserError: the tokenizer has more ids than the model, or see stages.STAGES.
    """
    with distributed.process_0_first("tokenizer"):
        tokenizer = load_tokenizer(config.data.tokenizer, config.data.cache_dir, config.data.heldout_fraction)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids and model.vocab_size={config.model.vocab_size}; "
            f"raise model.vocab_size to at least {tokenizer.vocab_size}"
        )
    with distributed.process_0_first("corpus"):
        corpus = STAGES[config.train.stage].corpus(config, tokenizer)
    return tokenizer, corpus


def _announce(config: Config, mesh, tokenizer, corpus: Corpus, found, notes: list[str]) -> tuple[Progress, float]:
    """Starts the progress with the header and what there is to say; returns it and the mesh's peak in FLOP/s."""
    train = config.train
    peak, peak_source = metrics.mesh_peak_flops(mesh.devices.flat, config.model.dtype)
    progress = Progress(train.steps, found.step or 0, log_every=train.log_every, silent=not distributed.speaks())
    progress.note(_header(config, mesh, tokenizer, corpus, peak, peak_source))
    if distributed.together():
        progress.note(f"  together   {distributed.process_count()} processes, {jax.local_device_count()} devices each")
    for line in notes:
        progress.note(line)
    if config.lora.rank:
        progress.note(saving.text(config))
    return progress, peak


def _frozen(config: Config, mesh, found, corpus: Corpus, note: Callable):
    """Prepares what does not move: (weights that every step needs, what checkpoints note of them, Reference), or Nones.

    Raises:
        UserError: train.init_from is empty, or holds other weights than those the run began with.
    """
    if not config.lora.rank and not has_reference(config):
        return None, None, None
    meta, kept = found.meta.get("frozen"), []
    frozen.check_source(config, meta)

    def weights():
        if not kept:
            kept.append(frozen.weights(config, mesh))
            frozen.check(config, meta, lora_base.record(config, kept[0]))
        return kept[0]

    with jax.set_mesh(mesh):
        stays = weights() if frozen.stays(config) or meta is None else None
        meta = meta or lora_base.record(config, stays)
        reference = None
        if has_reference(config) and config.dpo.reference == "precomputed":
            reference = open_reference(config, corpus, meta["fingerprints"], weights, mesh, note)
    return (stays if frozen.stays(config) else None), meta, reference


def session_line(start_up: float) -> dict[str, Any]:
    """The values of a session's line in the metrics, written so many seconds after the process began with the run."""
    return {"start_up": start_up, "process": os.getpid(), "host": socket.gethostname()}


def store(workdir: Path, config: Config, tokenizer) -> None:
    """Keeps the configuration and the tokenizer with the run."""
    store_run(workdir, config.to_dict())
    tokenizer.save(workdir / "tokenizer")


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
