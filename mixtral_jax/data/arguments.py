"""The arguments of `python -m mixtral_jax.data`: a configuration as train.py takes it, or flags of its own."""

import argparse
import typing

from absl import flags
from ml_collections import config_flags

from mixtral_jax.config import Config, DataConfig, UserError, from_config_dict
from mixtral_jax.data.mend import RULES

# The defaults of configs/common.py (which the package cannot import; a test keeps them equal), and what each key means.
DEFAULTS = {
    "source": ("stdlib", "the kind of text; stdlib is the running Python's own source and needs no path"),
    "path": (
        "",
        "files: paths, directories or globs, separated by commas; of hub NAME, NAME:SUBSET or NAME:SUBSET:SPLIT",
    ),
    "text_key": ("text", "the field that holds the text, for jsonl, parquet, arrow and hub"),
    "max_bad_rows": (0, "rows that may be skipped because they cannot be read"),
    "tokenizer": ("mistral-v1", "mistral-v1 | bytes | stdlib:SIZE (trained once, cached) | a SentencePiece .model"),
    "cache_dir": ("~/.cache/mixtral_jax", "where tokens and trained tokenizers are kept"),
    "heldout_fraction": (0.02, "share of documents, by hash of their text, kept for evaluation"),
    "workers": (2, "threads that read ahead in training"),
}
SEQ_LEN = 4096
EPILOG = """examples:
  python -m mixtral_jax.data --config=configs/tiny.py --validate
  python -m mixtral_jax.data --config=configs/tiny.py --config.data.tokenizer=bytes --preview=3
  python -m mixtral_jax.data --config=configs/mixtral_8x7b.py --validate --tokens_per_second=400000 --out=data.json
  python -m mixtral_jax.data --config=configs/sft.py --validate --write_corrected=corrected.jsonl
  python -m mixtral_jax.data build --config=configs/tiny.py
  python -m mixtral_jax.data build --source=jsonl --path='corpus/*.jsonl' --text_key=content
  python -m mixtral_jax.data preview 2 --tokenizer=bytes --seq_len=512
  python -m mixtral_jax.data tokenizer --source=text --path=books --vocab_size=8000 --out=books.model

rules of --write_corrected (a row that none of them mends is left out and named):
{}

exit status: 0 done, 2 a mistake in the arguments or bad data, 1 something went wrong on the way (a process was killed);
explained on stderr."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (--help shows the flags)")


def parse(argv: list[str]) -> tuple[argparse.Namespace, Config | None]:
    """Returns the arguments and the configuration of --config, if there is one.

    Raises:
        UserError: a flag that means nothing, or a wrong configuration.
    """
    config, rest = _config(argv)
    return _parser().parse_args(rest), config


def data_config(arguments: argparse.Namespace, config: Config | None) -> tuple[DataConfig, int]:
    """Returns the data's configuration and the positions of a row, from --config or from flags.

    Raises:
        UserError: flags that contradict each other or make no sense.
    """
    given = {key: getattr(arguments, key, None) for key in (*DEFAULTS, "seq_len")}
    given = {key: value for key, value in given.items() if value is not None}
    if config is not None:
        for key in given:
            group = "train" if key == "seq_len" else "data"
            raise UserError(f"--{key} beside --config; write --config.{group}.{key}={given[key]}")
        return config.data, config.train.seq_len
    seq_len = given.pop("seq_len", SEQ_LEN)
    data = DataConfig(
        **{key: default for key, (default, _) in DEFAULTS.items()}
        | given
        | {"mixture": (), "streaming": False, "packing": True}
    )
    if not 0 < data.heldout_fraction < 1:
        raise UserError(f"--heldout_fraction={data.heldout_fraction}; it must lie between 0 and 1")
    if data.max_bad_rows < 0:
        raise UserError(f"--max_bad_rows={data.max_bad_rows}; it must not be negative")
    if data.source != "stdlib" and not data.path:
        raise UserError(f"--source={data.source} needs files; set --path to paths or globs separated by commas")
    return data, seq_len


def _config(argv: list[str]) -> tuple[Config | None, list[str]]:
    """Takes --config=FILE[:argument] and --config.GROUP.KEY=VALUE out of the arguments."""
    values = flags.FlagValues()
    words = ["data", *argv]
    holder = config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=words)
    try:
        rest = values(words, known_only=True)[1:]
        if holder.value is None:
            return None, rest
        _ = holder.value.model  # what went wrong while the file was read is raised at the first look
    except Exception as error:  # a config file is a program: whatever it raises is about what the user asked for
        raise UserError(f"--config: {_one_line(error)}") from error
    return from_config_dict(holder.value), rest


def _one_line(error: Exception) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    # config_flags puts the whole stack trace into its message; its last line is what a person needs.
    words = (text.strip().splitlines()[-1] if "Traceback" in text else text).split()
    return " ".join(words) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "python -m mixtral_jax.data",
        description="Builds, checks and shows training data.",
        epilog=EPILOG.format("\n".join(f"  {rule:<18}{meaning}" for rule, meaning in RULES.items())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    _add_config(parser)
    add(
        "--preview",
        type=positive,
        metavar="N",
        help="show the first N rows of the run: what is trained on and what is not",
    )
    add(
        "--validate",
        action="store_true",
        help="read all of the data: every bad row, counts, and what the run takes of it",
    )
    add(
        "--write_corrected",
        metavar="FILE",
        help="stages sft and dpo: write what can be trained on as JSON lines, mended by the rules below",
    )
    add("--out", metavar="FILE", help="with --validate or --write_corrected: write the report as JSON, too")
    add("--tokens_per_second", type=float, help="with --validate: the speed from which the run's time follows")
    add("--workdir", help="with --validate: or the run whose metrics.jsonl tells the speed")
    commands = parser.add_subparsers(dest="command", metavar="build | preview | tokenizer", parser_class=_Parser)
    build = commands.add_parser(
        "build", allow_abbrev=False, help="tokenise a corpus into the cache and print its counts"
    )
    show = commands.add_parser("preview", allow_abbrev=False, help="print the first rows of a corpus, without a config")
    tokenizer = commands.add_parser(
        "tokenizer", allow_abbrev=False, help="train a SentencePiece model on a corpus's training documents"
    )
    show.add_argument("rows", nargs="?", type=positive, default=3, help="rows to show (default: 3)")
    show.add_argument("--seed", type=_seed, default=0, help="of the shuffle: train.seed (default: 0)")
    tokenizer.add_argument("--vocab_size", type=positive, required=True, help="pieces, 259 special ones included")
    tokenizer.add_argument("--out", required=True, help="the file to write; then use --tokenizer=FILE")
    for command in (build, tokenizer):
        _add_config(command)
    for command in (build, show, tokenizer):
        _add_data(command)
    for command in (build, show):
        text = f"positions in a row: train.seq_len (default: {SEQ_LEN})"
        command.add_argument("--seq_len", type=positive, help=text)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    # For --help alone: the configuration's flags are taken out before.
    text = "a configuration, its argument after a colon; --config.GROUP.KEY=VALUE changes one of its values"
    parser.add_argument("--config", metavar="FILE[:ARGUMENT]", help=text)


def _add_data(parser: argparse.ArgumentParser) -> None:
    hints = typing.get_type_hints(DataConfig)
    for key, (default, meaning) in DEFAULTS.items():
        shown = f"{meaning} (default: {default!r})".replace("%", "%%")
        parser.add_argument(f"--{key}", type=type(default), choices=typing.get_args(hints[key]) or None, help=shown)


def positive(text: str) -> int:
    """Reads a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _seed(text: str) -> int:
    """Reads a seed as train.seed is: in 32 bits, for a larger one would repeat a smaller."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{value} is not from 0 to 2**32 - 1")
    return value
