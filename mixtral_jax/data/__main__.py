"""The command line of the data package; see `python -m mixtral_jax.data --help`."""

import argparse
import dataclasses
import itertools
import logging
import sys
import typing
from pathlib import Path

import numpy as np

from mixtral_jax.config import DataConfig, UserError
from mixtral_jax.data.cache import Corpus, TokenFile, build_cache
from mixtral_jax.data.loader import Batches
from mixtral_jax.data.packing import pack
from mixtral_jax.data.text import documents, is_heldout
from mixtral_jax.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

# The defaults of configs/common.py (which the package cannot import; a test keeps them equal), and what each key means.
DEFAULTS = {
    "source": ("stdlib", "the kind of text; stdlib is the running Python's own source and needs no path"),
    "path": ("", "files: paths, directories or globs, separated by commas"),
    "text_key": ("text", "the field that holds the text, for jsonl and parquet"),
    "max_bad_rows": (0, "rows that may be skipped because they cannot be read"),
    "tokenizer": ("mistral-v1", "mistral-v1 | bytes | stdlib:SIZE (trained once, cached) | a SentencePiece .model"),
    "cache_dir": ("~/.cache/mixtral_jax", "where tokens and trained tokenizers are kept"),
    "heldout_fraction": (0.02, "share of documents, by hash of their text, kept for evaluation"),
    "workers": (2, "threads that read ahead in training"),
}
SEQ_LEN = 4096
PREVIEW_LIMIT = 10_000_000
EPILOG = """examples:
  python -m mixtral_jax.data build --tokenizer=stdlib:4096 --seq_len=2048
  python -m mixtral_jax.data build --source=jsonl --path='corpus/*.jsonl' --text_key=content
  python -m mixtral_jax.data preview 2 --tokenizer=bytes --seq_len=512
  python -m mixtral_jax.data tokenizer --source=text --path=books --vocab_size=8000 --out=books.model

exit status: 0 done, 2 a mistake in the arguments or the data, explained on stderr."""
CYAN, GREEN, GREY, RESET = "\033[36m", "\033[32m", "\033[90m", "\033[0m"


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns the exit status."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("datasets", "httpx", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        {"build": _build, "preview": _preview, "tokenizer": _tokenizer}[arguments.command](arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m mixtral_jax.data", description="Builds and shows training data.", epilog=EPILOG, formatter_class=raw
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="build | preview | tokenizer")
    build = commands.add_parser("build", help="tokenise a corpus into the cache and print its counts")
    preview = commands.add_parser("preview", help="print packed rows as text, with their document boundaries")
    tokenizer = commands.add_parser("tokenizer", help="train a SentencePiece model on a corpus's training documents")
    preview.add_argument("rows", nargs="?", type=_positive, default=3, help="rows to show (default: 3)")
    preview.add_argument("--seed", type=int, default=0, help="of the shuffle: train.seed (default: 0)")
    tokenizer.add_argument("--vocab_size", type=_positive, required=True, help="pieces, 259 special ones included")
    tokenizer.add_argument("--out", required=True, help="the file to write; then use --tokenizer=FILE")
    hints = typing.get_type_hints(DataConfig)
    for command in (build, preview, tokenizer):
        for key, (default, meaning) in DEFAULTS.items():
            choices = typing.get_args(hints[key]) or None
            shown = f"{meaning} (default: {default!r})".replace("%", "%%")
            command.add_argument(f"--{key}", type=type(default), default=default, choices=choices, help=shown)
    for command in (build, preview):
        text = f"positions in a row: train.seq_len (default: {SEQ_LEN})"
        command.add_argument("--seq_len", type=_positive, default=SEQ_LEN, help=text)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _data_config(arguments: argparse.Namespace) -> DataConfig:
    given = {field.name: getattr(arguments, field.name, None) for field in dataclasses.fields(DataConfig)}
    data = DataConfig(**given | {"mixture": (), "streaming": False})
    if not 0 < data.heldout_fraction < 1:
        raise UserError(f"--heldout_fraction={data.heldout_fraction}; it must lie between 0 and 1")
    if data.source != "stdlib" and not data.path:
        raise UserError(f"--source={data.source} needs files; set --path to paths or globs separated by commas")
    return data


def _open(arguments: argparse.Namespace) -> tuple[Tokenizer, Corpus]:
    data = _data_config(arguments)
    tokenizer = load_tokenizer(data.tokenizer, data.cache_dir, data.heldout_fraction)
    return tokenizer, build_cache(data, tokenizer)


def _build(arguments: argparse.Namespace) -> None:
    tokenizer, corpus = _open(arguments)
    print(f"tokenizer {tokenizer.name}, vocabulary {tokenizer.vocab_size:,}, sha256 {tokenizer.fingerprint[:16]}")
    print(f"{'split':<9}{'documents':>12}{'tokens':>17}{'bytes':>17}{'bytes/token':>13}{'rows':>11}{'padding':>9}")
    for name, split in (("train", corpus.train), ("held out", corpus.heldout)):
        size, tokens = int(split.bytes_.sum()), len(split.tokens)
        plan = pack(split.lengths, arguments.seq_len)
        print(
            f"{name:<9}{len(split.ids):>12,}{tokens:>17,}{size:>17,}{size / tokens:>13.3f}{plan.n_rows:>11,}{plan.waste:>9.2%}"
        )
    print(f"rows and padding are those of --seq_len={arguments.seq_len}")


def _preview(arguments: argparse.Namespace) -> None:
    if arguments.rows * arguments.seq_len > PREVIEW_LIMIT:
        raise UserError(
            f"{arguments.rows} rows of {arguments.seq_len} positions; a preview shows at most {PREVIEW_LIMIT:,}"
        )
    tokenizer, corpus = _open(arguments)
    colour = sys.stdout.isatty()
    for line in preview_lines(corpus.train, tokenizer, arguments.rows, arguments.seq_len, arguments.seed, colour):
        print(line)


def preview_lines(
    split: TokenFile, tokenizer: Tokenizer, rows: int, seq_len: int, seed: int, colour: bool
) -> typing.Iterator[str]:
    """Yields the first rows of training as text: a line for each document's start, its tokens, and the padding.

    In colour, trained tokens are green and tokens that are only read are grey; without, the latter stand in [[ ]].
    """
    batch = Batches(split, pack(split.lengths, seq_len), batch_size=rows, seq_len=seq_len, seed=seed).batch(0)
    paint = (lambda code, text: f"{code}{text}{RESET}") if colour else (lambda code, text: text)
    only_read = (lambda text: paint(GREY, text)) if colour else (lambda text: f"[[{text}]]")
    for b in range(rows):
        weights_T, segment_ids_T = batch["loss_weights_BT"][b], batch["segment_ids_BT"][b]
        trained, padding = np.count_nonzero(weights_T), np.count_nonzero(segment_ids_T == 0)
        yield paint(CYAN, f"=== row {b + 1}: {trained} trained tokens, {padding} padding")
        for segment, document in enumerate(batch["documents"][b], 1):
            inside = segment_ids_T == segment
            yield paint(CYAN, f"--- {document} ({np.count_nonzero(inside)} positions)")
            ids = [int(batch["tokens_BT"][b][inside][0]), *batch["targets_BT"][b][inside].tolist()]
            text = only_read(_readable(tokenizer, [], ids[:1]))
            marks = weights_T[inside] > 0
            cuts = [0, *(np.flatnonzero(np.diff(marks)) + 1).tolist(), len(marks)]  # where trained begins or ends
            for first, last in itertools.pairwise(cuts):
                run = _readable(tokenizer, ids[: first + 1], ids[first + 1 : last + 1])
                text += paint(GREEN, run) if marks[first] else only_read(run)
            yield text
        if padding:
            yield paint(GREY, f"... {padding} positions of padding")


def _readable(tokenizer: Tokenizer, context: list[int], ids: list[int]) -> str:
    """Decodes a run of ids with BOS and EOS made visible; a segment has them at its ends only."""
    before = "<BOS>" if ids[:1] == [tokenizer.bos_id] else ""
    after = "<EOS>" if ids[-1:] == [tokenizer.eos_id] else ""
    return before + tokenizer.continuation(context, ids) + after


def _tokenizer(arguments: argparse.Namespace) -> None:
    data = _data_config(arguments)
    texts = (document.text for document in documents(data))
    model = train_sentencepiece(
        (text for text in texts if not is_heldout(text, data.heldout_fraction)), arguments.vocab_size
    )
    out = Path(arguments.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(model)
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written ({error.strerror}); choose another file") from error
    print(f"wrote {out}; use it with --tokenizer={out}")


if __name__ == "__main__":
    sys.exit(main())
