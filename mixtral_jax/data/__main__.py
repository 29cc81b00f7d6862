"""The command line of the data package; see `python -m mixtral_jax.data --help`."""

import json
import logging
import os
import statistics
import sys
from pathlib import Path

from mixtral_jax.config import Config, DataConfig, RunError, UserError
from mixtral_jax.data.arguments import data_config, parse
from mixtral_jax.data.bad_rows import BadRows
from mixtral_jax.data.cache import build_cache
from mixtral_jax.data.chat_corpus import open_chat_corpus
from mixtral_jax.data.corpus import open_batches, open_corpus
from mixtral_jax.data.corrected import write_corrected
from mixtral_jax.data.packing import pack, pack_pairs
from mixtral_jax.data.preview import preview_lines
from mixtral_jax.data.text import documents, is_heldout
from mixtral_jax.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from mixtral_jax.data.validate import validate
from mixtral_jax.data.validate_chat import validate_chat
from mixtral_jax.data.validation_report import corrected_lines, report_lines
from mixtral_jax.jsonl import read_jsonl

PREVIEW_LIMIT = 10_000_000  # positions
SPEED_LINES = 50  # the latest lines of metrics.jsonl whose median speed is taken


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("datasets", "httpx", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        arguments, config = parse(sys.argv[1:] if argv is None else argv)
        if arguments.command:
            {"build": _build, "preview": _preview, "tokenizer": _tokenizer}[arguments.command](arguments, config)
            return 0
        return _look(arguments, config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _look(arguments, config: Config | None) -> int:
    """What --preview, --validate and --write_corrected do."""
    if not (arguments.preview or arguments.validate or arguments.write_corrected):
        raise UserError("nothing to do; give --config=FILE with --preview=N or --validate, or a command (see --help)")
    if config is None:
        raise UserError("--config is missing; for example --config=configs/tiny.py")
    stage = config.train.stage
    if arguments.write_corrected and stage == "pretrain":
        raise UserError("--write_corrected with train.stage=pretrain; it corrects conversations (sft) and pairs (dpo)")
    if arguments.out and not (arguments.validate or arguments.write_corrected):
        raise UserError(f"--out={arguments.out} without --validate; there is no report to write")
    tokenizer = _load(config.data)
    if arguments.preview:
        _show(config.data, tokenizer, arguments.preview, config.train.seq_len, config.train.seed, stage)
    report = {}
    if arguments.validate:
        report = _validate(arguments, config, tokenizer)
    if arguments.write_corrected:
        out = Path(arguments.write_corrected)
        report["corrected"] = write_corrected(config, tokenizer, out, bar=sys.stderr.isatty())
        print("\n".join(corrected_lines(report["corrected"])))
    if arguments.out:
        _write(Path(arguments.out), json.dumps(report, indent=2).encode() + b"\n")
        print(f"written to {arguments.out}")
    for problem in report.get("problems", ()):
        print(f"error: {problem}", file=sys.stderr)
    return 2 if report.get("problems") else 0


def _load(data: DataConfig) -> Tokenizer:
    return load_tokenizer(data.tokenizer, data.cache_dir, data.heldout_fraction)


def _build(arguments, config: Config | None) -> None:
    data, seq_len = data_config(arguments, config)
    if data.streaming:
        raise UserError(
            "data.streaming=True keeps no cache, so there is nothing to build; --validate reads the data once"
        )
    stage = "pretrain" if config is None else config.train.stage
    tokenizer = _load(data)
    if stage == "pretrain":
        corpus = build_cache(data, tokenizer, verify=True)
    else:
        corpus = open_chat_corpus(data, tokenizer, stage, seq_len)
    print(f"tokenizer {tokenizer.name}, vocabulary {tokenizer.vocab_size:,}, sha256 {tokenizer.fingerprint[:16]}")
    planned = pack_pairs if stage == "dpo" else pack
    for source in corpus.sources:
        if len(corpus.sources) > 1:
            print(f"{source.name}, weight {source.weight:g}")
        print(f"{'split':<9}{'documents':>12}{'tokens':>17}{'bytes':>17}{'bytes/token':>13}{'rows':>11}{'padding':>9}")
        for name, split in (("train", source.train), ("held out", source.heldout)):
            size, tokens = int(split.bytes_.sum()), len(split.tokens)
            plan = planned(split.lengths, seq_len, one_per_row=not data.packing)
            # Of conversations only the bytes of answers are known, and they are not those of all tokens.
            ratio = f"{size / max(tokens, 1):.3f}" if stage == "pretrain" else "-"
            print(
                f"{name:<9}{len(split.ids):>12,}{tokens:>17,}{size:>17,}{ratio:>13}{plan.n_rows:>11,}{plan.waste:>9.2%}"
            )
    print(f"rows and padding are those of {seq_len} positions in a row")


def _preview(arguments, config: None) -> None:
    if config is not None:
        raise UserError(f"preview takes no --config; write --config=... --preview={arguments.rows}")
    data, seq_len = data_config(arguments, None)
    _show(data, _load(data), arguments.rows, seq_len, arguments.seed)


def _show(data: DataConfig, tokenizer: Tokenizer, rows: int, seq_len: int, seed: int, stage: str = "pretrain") -> None:
    if rows * seq_len > PREVIEW_LIMIT:
        raise UserError(f"{rows} rows of {seq_len} positions; a preview shows at most {PREVIEW_LIMIT:,}")
    # The order of the rows does not depend on the batch size, so one batch of so many rows holds the run's first ones.
    corpus = open_corpus(data, tokenizer) if stage == "pretrain" else open_chat_corpus(data, tokenizer, stage, seq_len)
    batches = open_batches(data, corpus, tokenizer, batch_size=rows, seq_len=seq_len, seed=seed, pairs=stage == "dpo")
    batch = next(batches.read())[0] if data.streaming else batches.batch(0)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for line in preview_lines(batch, tokenizer, colour):
        print(line)


def _validate(arguments, config: Config, tokenizer: Tokenizer) -> dict:
    """Prints the report, and returns it."""
    speed, origin = _speed(arguments)
    read = validate if config.train.stage == "pretrain" else validate_chat
    report = read(config, tokenizer, bar=sys.stderr.isatty())
    if report["run"] is not None:
        report["run"] |= {
            "tokens_per_second": speed,
            "speed_from": origin,
            "seconds": speed and report["run"]["positions"] / speed,
        }
    print("\n".join(report_lines(report)))
    return report


def _speed(arguments) -> tuple[float | None, str]:
    """Returns tokens per second and where they come from; None if nobody knows."""
    if arguments.tokens_per_second is not None:
        if not 0 < arguments.tokens_per_second < float("inf"):
            raise UserError(f"--tokens_per_second={arguments.tokens_per_second}; it must be positive")
        return arguments.tokens_per_second, "--tokens_per_second"
    if arguments.workdir is None:
        return None, "unknown; give --tokens_per_second or --workdir"
    folder = Path(arguments.workdir)
    files = [*folder.glob("metrics.jsonl"), *folder.glob("*/metrics.jsonl")]
    if not files:
        raise UserError(f"--workdir={folder} holds no metrics.jsonl; give a run's folder, or --tokens_per_second")
    newest = max(files, key=lambda file: file.stat().st_mtime)
    lines = [line for line in read_jsonl(newest) if line["kind"] == "train" and line["tokens_per_second"]]
    if not lines:
        raise UserError(f"{newest} has no speed yet; give --tokens_per_second")
    return statistics.median(line["tokens_per_second"] for line in lines[-SPEED_LINES:]), str(newest)


def _tokenizer(arguments, config: Config | None) -> None:
    data, _ = data_config(arguments, config)
    bad_rows = BadRows(data.max_bad_rows)  # over the whole corpus, as for build
    texts = (document.text for source in data.sources for document in documents(source, bad_rows))
    model = train_sentencepiece(
        (text for text in texts if not is_heldout(text, data.heldout_fraction)), arguments.vocab_size
    )
    _write(Path(arguments.out), model)
    print(f"wrote {arguments.out}; use it with --tokenizer={arguments.out}")


def _write(out: Path, content: bytes) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(content)
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written ({error.strerror}); choose another file") from error


if __name__ == "__main__":
    sys.exit(main())
