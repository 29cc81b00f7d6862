"""The command line of the conversion; see `python -m mixtral_jax.convert --help`."""

import argparse
import os
import re
import sys
from pathlib import Path

# Conversion is the host's work: no accelerator is taken from a run beside it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")


from mixtral_jax.config import UserError
from mixtral_jax.convert.exporter import export_checkpoint
from mixtral_jax.convert.importer import import_checkpoint, merge, upcycle
from mixtral_jax.convert.verify import compare, table
from mixtral_jax.progress import messages
from mixtral_jax.remote import is_remote

EPILOG = """examples:
  python -m mixtral_jax.convert import --from=Mixtral-8x7B-v0.1 --to=runs/8x7b
  python -m mixtral_jax.convert export --from=runs/8x7b --to=hf/8x7b --dtype=bfloat16
  python -m mixtral_jax.convert verify --from=Mixtral-8x7B-v0.1 --to=runs/8x7b
  python -m mixtral_jax.convert merge --from=runs/lora --to=runs/merged
  python -m mixtral_jax.convert upcycle --from=Mistral-7B-v0.1 --to=runs/8x7b-up --experts=8 --noise=0.01

A checkpoint is a run's workdir (its newest step) or the folder of a step, here or on an object store (gs://bucket/run), where
import and upcycle may put their new one, too. That of a LoRA run holds adapters; every command reads it as merged weights,
with the base that train.init_from names in its config.json. A directory of Hugging Face's holds config.json
and safetensors, one of Mistral's params.json and consolidated*.safetensors. A target must not exist yet; it appears
when it is complete.

exit status: 0 done (verify: equal), 1 a fault (verify: different), 2 a mistake of the user's, explained on stderr."""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        with messages():
            return arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m mixtral_jax.convert",
        description="Weights of Hugging Face's and Mistral's <-> checkpoints of ours, streamed: memory does not grow with the model.",
        epilog=EPILOG,
        formatter_class=raw,
    )
    commands = parser.add_subparsers(required=True, metavar="import | export | merge | verify | upcycle")

    def command(name: str, run, text: str, source: str, target: str):
        sub = commands.add_parser(name, help=text, description=text, epilog=EPILOG, formatter_class=raw)
        sub.add_argument("--from", dest="source", type=_where, required=True, metavar="DIR", help=source)
        sub.add_argument("--to", dest="target", type=_where, required=True, metavar="DIR", help=target)
        sub.set_defaults(run=run)
        return sub

    command("import", _import, "make a workdir of ours", "Hugging Face's or Mistral's files", "the new workdir")
    sub = command("export", _export, "make a Hugging Face directory", "a checkpoint", "the new directory")
    sub.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of all tensors; default: each one's stored dtype (of a LoRA run: in its base)",
    )
    sub.add_argument("--max_shard_size", type=_size, default="5GB", help="of a file, as in 5GB or 500MB (default: 5GB)")
    sub = command("merge", _merge, "make plain weights of a LoRA run", "a LoRA run's checkpoint", "the new workdir")
    sub.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of all parameters; default: the base's, and float32 where adapters were merged, which loses nothing",
    )
    command("verify", _verify, "compare two checkpoints of any kind", "one checkpoint", "the other")
    sub = command("upcycle", _upcycle, "make a Mixtral of a dense model", "a dense Mistral or Llama", "the new workdir")
    sub.add_argument("--experts", type=int, default=8, help="copies of the FFN in each layer (default: 8)")
    sub.add_argument("--experts_per_token", type=int, default=2, help="K (default: 2)")
    sub.add_argument(
        "--noise", type=float, default=0.0, help="added to experts, as a share of their weights' deviation (default: 0)"
    )
    sub.add_argument("--router_std", type=float, default=0.02, help="deviation of the router's weights (default: 0.02)")
    sub.add_argument("--seed", type=int, default=0, help="of the router and the noise (default: 0)")
    return parser


def _where(text: str) -> str | Path:
    return text if is_remote(text) else Path(text)  # a Path would make one slash of two


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.upper())
    if not match or not (size := int(float(match[1]) * _UNITS[match[2] or ""])):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 5GB, 500MB or 2GiB")
    return size


def _import(arguments) -> int:
    config = import_checkpoint(arguments.source, arguments.target)
    m = config.model
    print(
        f"{arguments.target}: {m.num_layers} layers, {m.num_experts} experts, vocabulary {m.vocab_size}, computing in {m.dtype}"
    )
    return 0


def _export(arguments) -> int:
    files = export_checkpoint(arguments.source, arguments.target, arguments.dtype, arguments.max_shard_size)
    print(f"{arguments.target}: {len(files)} file{'s' if len(files) > 1 else ''} of weights")
    return 0


def _merge(arguments) -> int:
    config = merge(arguments.source, arguments.target, arguments.dtype)
    print(f"{arguments.target}: {config.model.num_layers} layers with {arguments.source}'s adapters merged into them")
    return 0


def _verify(arguments) -> int:
    text, equal = table(*compare(arguments.source, arguments.target))
    print(f"{arguments.source}\n{arguments.target}\n{text}")
    return 0 if equal else 1


def _upcycle(arguments) -> int:
    a = arguments
    upcycle(a.source, a.target, a.experts, a.experts_per_token, a.noise, a.router_std, a.seed)
    print(f"{a.target}: {a.experts} experts, {a.experts_per_token} for each token, noise {a.noise:g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
