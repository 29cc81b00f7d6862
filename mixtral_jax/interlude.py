"""What happens between steps now and then: held-out loss, a sample of text, a checkpoint; and at the end, the verdict."""

import contextlib
import textwrap
from collections.abc import Callable

import jax

from mixtral_jax import distributed, metrics, report
from mixtral_jax.checkpoint import SaveError
from mixtral_jax.generate import encode_chat, sample
from mixtral_jax.jsonl import read_jsonl
from mixtral_jax.progress import printable
from mixtral_jax.resume import identity
from mixtral_jax.run import Run, session_line, store


def evaluate(run: Run, step: int) -> float:
    """Scores some held-out batches, draws the report, returns the loss in nats per token."""
    found = run.heldout(run.state.params, run.config.train.eval_batches, run.frozen)
    run.write("heldout", step, _kept(found))
    run.progress.note(f"held-out at step {step}: {_in_words(found)}")
    draw_report(run)
    return found["loss"]


def measure(run: Run, step: int, names: list[str]) -> None:
    """Runs evaluations that train.evals names, and writes a line of each one's numbers."""
    with jax.transfer_guard("allow"):
        for name, found in run.measure(run, names):
            run.write("eval", step, {f"{name}/{metric}": value for metric, value in found.items()})
            few = ", ".join(f"{metric} {value:.4g}" for metric, value in list(found.items())[:4])
            run.progress.note(f"{name} at step {step}: {few}")


def draw_report(run: Run) -> None:
    """Draws report.png, on process 0; a picture that cannot be written is no reason to stop."""
    if not distributed.speaks():
        return
    try:
        report.write_report(run.workdir / "metrics.jsonl", run.workdir / "report.png", run.workdir.name)
    except OSError as error:
        run.progress.note(f"WARNING: {run.workdir / 'report.png'} could not be written: {error}")
    run.publish()


def _kept(found: dict[str, float]) -> dict[str, float]:
    """What the metrics keep of an evaluation; perplexity follows from the loss, and counts stand in the final line."""
    return {name: value for name, value in found.items() if name not in ("perplexity", "tokens", "pairs")}


def _in_words(found: dict[str, float]) -> str:
    if "accuracy" in found:
        return (
            f"loss {found['loss']:.4f}, reward accuracy {found['accuracy']:.1%} ({found['accuracy_low']:.1%} to "
            f"{found['accuracy_high']:.1%} of {found['pairs']} pairs), margin {found['margin']:.4f} "
            f"({found['margin_low']:.4f} to {found['margin_high']:.4f})"
        )
    return f"loss {found['loss']:.4f}, {found['bits_per_byte']:.4f} bits per byte"


def draw_sample(run: Run, step: int) -> None:
    """Continues train.sample_prompts, or in SFT and DPO answers them, and shows the texts."""
    train = run.config.train
    chat = train.stage != "pretrain"
    questions = [{"role": "user", "content": prompt} for prompt in train.sample_prompts]
    texts = sample(
        run.model,
        run.tokenizer,
        [encode_chat(run.tokenizer, [question]) for question in questions] if chat else train.sample_prompts,
        max_tokens=train.sample_tokens,
        temperature=0.0 if chat else 0.7,  # answers of one run are compared with each other
        seed=train.seed + step,
        message=chat,
    )
    for number, (prompt, text) in enumerate(zip(train.sample_prompts, texts), 1):
        values = {"prompt": prompt, "answer": text} if chat else {"text": prompt + text}
        run.write("sample", step, values | {"number": number})
        shown = f"{prompt}\n> {text}" if chat else prompt + text
        shown = textwrap.indent(printable(shown), "    | ", lambda line: True)
        run.progress.note(f"{'answer' if chat else 'sample'} at step {step}:\n{shown}")


def save(run: Run, step: int, data_state: dict, heldout_loss: float | None = None) -> None:
    """Starts a checkpoint of this step.

    Raises:
        SaveError: this one or the one before it could not be written, and train.continue_on_save_error is off.
    """
    meta = {
        "identity": identity(run.config, run.tokenizer, run.corpus),
        "skipped": run.skipped,
        "heldout_loss": heldout_loss,
        "productive_seconds": run.goodput.productive_seconds,
    }
    if run.frozen_meta is not None:
        meta["frozen"] = run.frozen_meta
    if distributed.speaks() and not (run.workdir / "config.json").exists():
        with contextlib.suppress(OSError):  # the folder vanished; if it cannot be made again, the save says so
            run.workdir.mkdir(parents=True, exist_ok=True)
            (run.workdir / "tensorboard").mkdir(exist_ok=True)
            store(run.workdir, run.config, run.tokenizer)
            run.write("session", step, session_line(0.0))
    run.publish()  # before the checkpoint is there, so that its metrics are never missing
    watch_saves(run, run.checkpoints.finish)  # of the one before: its failure must not keep this one from starting
    watch_saves(run, lambda: run.checkpoints.save(step, run.state.params, run.state.opt_state, meta, data_state))


def watch_saves(run: Run, act: Callable) -> None:
    """Does something with the checkpoints; a save that failed stops the run, or is told and noted.

    Raises:
        SaveError: a save failed and train.continue_on_save_error is off.
    """
    try:
        if act() is not None:
            run.save_error = None
    except SaveError as error:
        if not run.config.train.continue_on_save_error:
            raise
        run.save_error = error
        run.progress.note(f"WARNING: {error}. Training goes on (train.continue_on_save_error).")


def is_finished(run: Run) -> bool:
    """Whether the final evaluation of the last step is already written."""
    return _is_written(run, "final", run.config.train.steps)


def _is_written(run: Run, kind: str, step: int) -> bool:
    lines = read_jsonl(run.workdir / "metrics.jsonl")
    return any(line["kind"] == kind and line["step"] == step for line in lines)


def finish(run: Run, baselines: Callable, values: dict | None) -> dict[str, float]:
    """The last words: the whole held-out split, the baselines, the routers' health, the report."""
    steps = run.config.train.steps
    run.progress.note("evaluating on the whole held-out split ...")
    found = run.heldout(run.state.params, None, run.frozen)
    final = {name: value for name, value in found.items() if name != "perplexity"}
    if not distributed.speaks():
        watch_saves(run, run.checkpoints.finish)
        return final
    final |= baselines(run.config, run.corpus)
    if not _is_written(run, "heldout", steps):  # else the run was stopped between this line and the next
        run.write("heldout", steps, _kept(found))
    run.write("final", steps, final)
    if values is not None:
        run.progress.note(metrics.router_table(values["load_LE"], values["entropy_L"], values["dropped_L"]))
    run.progress.note(_verdict(final))
    draw_report(run)
    run.progress.note(f"report      {run.workdir / 'report.png'}")
    watch_saves(run, run.checkpoints.finish)
    if run.save_error is None:
        run.progress.note(f"checkpoint  {run.checkpoints.folder}/{steps}")
    return final


def _verdict(final: dict[str, float]) -> str:
    """The comparison a person looks for: ours against the n-gram models on the same text; answers and pairs in words."""
    if "unigram_bits_per_byte" not in final:
        return f"held-out: {_in_words(final)}"
    rows = [
        (name, final[f"{name}_bits_per_byte"]) for name in ("unigram", "bigram") if f"{name}_bits_per_byte" in final
    ]
    rows.append(("this model", final["bits_per_byte"]))
    lines = [
        f"held-out bits per byte ({final['tokens']:,} tokens):",
        *(f"  {name:<10}  {bits:7.4f}" for name, bits in rows),
    ]
    if "bigram_bits_per_byte" in final:
        better = final["bits_per_byte"] < final["bigram_bits_per_byte"]
        closing = "beats the bigram model" if better else "does not beat the bigram model: train longer"
        lines.append(f"  The model {closing}.")
    return "\n".join(lines)
