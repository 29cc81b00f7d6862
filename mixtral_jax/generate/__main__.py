"""The command line of generation; see `python -m mixtral_jax.generate --help`."""

import argparse
import sys
import time
from pathlib import Path

from mixtral_jax.config import AXES, UserError
from mixtral_jax.progress import messages

EPILOG = """examples:
  python -m mixtral_jax.generate --checkpoint=runs/demo --prompt='def main(' --max_tokens=64
  python -m mixtral_jax.generate --checkpoint=runs/demo --prompt='import ' --temperature=0.8 --top_p=0.95 --num_samples=3
  python -m mixtral_jax.generate --checkpoint=runs/demo --prompt='class A' --prompt='for i in' --stop='\\n\\n'
  python -m mixtral_jax.generate --checkpoint=runs/8x7b --prompt='def ' --mesh=expert=4,tensor=2

The text goes to stdout as it is made, everything else to stderr. --stop understands \\n and \\t.
exit status: 0 done, 2 a mistake in the arguments or the checkpoint, explained on stderr."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        with messages():
            _run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m mixtral_jax.generate",
        description="Continues prompts with a run's checkpoint.",
        epilog=EPILOG,
        formatter_class=raw,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="the workdir of a run, for example runs/demo")
    add("--step", type=int, help="which of its checkpoints (default: the newest)")
    add("--prompt", action="append", required=True, help="text to continue; give it several times for a batch")
    add("--max_tokens", type=int, default=64, help="longest continuation (default: 64)")
    add("--temperature", type=float, default=0.0, help="0 takes the most likely token (default: 0)")
    add("--top_k", type=int, default=0, help="sample from the k most likely tokens (default: 0, all)")
    add("--top_p", type=float, default=1.0, help="sample from the likeliest tokens that make up p (default: 1, all)")
    add("--min_p", type=float, default=0.0, help="drop tokens less than p times as likely as the best (default: 0)")
    add("--seed", type=int, default=0, help="of the sampling (default: 0)")
    add("--stop", action="append", default=[], help="string that ends the text; may be given several times")
    add("--num_samples", type=int, default=1, help="continuations of each prompt (default: 1)")
    add("--mesh", help="axes of the mesh over the devices here, for example expert=4,tensor=2 (default: fsdp=-1)")
    add("--stacked", action="store_true", help="decode from the training layout: slower, without a second copy")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    # Whatever can be refused is refused before JAX starts and weights are read.
    if arguments.num_samples < 1 or arguments.max_tokens < 1:
        raise UserError(
            f"--num_samples={arguments.num_samples} --max_tokens={arguments.max_tokens}; both must be at least 1"
        )
    sizes = _mesh_sizes(arguments.mesh)
    import jax

    from mixtral_jax.data import load_tokenizer
    from mixtral_jax.generate import Sampling, stream
    from mixtral_jax.load import load
    from mixtral_jax.models.decode import prepare

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p)
    if sampling.temperature == 0 and arguments.num_samples > 1:
        raise UserError("--num_samples at --temperature=0 gives the same text again and again; set a temperature")
    config, weights, mesh, step = load(arguments.checkpoint, arguments.step, sizes)
    tokenizer = load_tokenizer(str(Path(arguments.checkpoint) / "tokenizer"), config.data.cache_dir)
    prompts = [prompt for prompt in arguments.prompt for _ in range(arguments.num_samples)]
    stop = [s.replace("\\n", "\n").replace("\\t", "\t") for s in arguments.stop]
    with jax.set_mesh(mesh):
        say(f"{arguments.checkpoint}, step {step}; {mesh.size} device{'s' * (mesh.size > 1)}")
        if not arguments.stacked:
            weights = prepare(weights)
            say(f"weights laid out for decoding: {weights.nbytes / 1e6:,.1f} MB")
        _print(stream, weights, tokenizer, prompts, arguments.max_tokens, sampling, arguments.seed, stop)


def say(text: str) -> None:
    """Prints to stderr: stdout is for the text alone."""
    print(text, file=sys.stderr, flush=True)


def _mesh_sizes(text: str | None) -> dict[str, int] | None:
    if text is None:
        return None
    sizes = {}
    for item in text.split(","):
        axis, _, size = item.partition("=")
        if axis not in AXES or not size.lstrip("-").isdecimal():
            raise UserError(f"--mesh={text}: {item!r} is no AXIS=SIZE; axes are {', '.join(AXES)}, a size may be -1")
        sizes[axis] = int(size)
    return sizes


def _print(stream, weights, tokenizer, prompts, max_tokens, sampling, seed, stop) -> None:
    """Streams one text as it comes; of several, the first one streams and the others follow whole."""
    pieces = stream(weights, tokenizer, prompts, max_tokens=max_tokens, sampling=sampling, seed=seed, stop=stop)
    began, times = time.perf_counter(), []  # a time for each token
    try:
        while True:
            row, piece = next(pieces)
            if not times:
                print(prompts[0], end="", flush=True)
            times.append(time.perf_counter())
            if row == 0:
                print(piece, end="", flush=True)
    except StopIteration as end:
        done = end.value
    print()
    for prompt, continuation in list(zip(prompts, done, strict=True))[1:]:
        print(f"{'-' * 40}\n{prompt}{continuation.text}")
    reasons = ", ".join(sorted({continuation.reason for continuation in done}))
    say(f"{len(times)} tokens, ended by {reasons}; the first after {times[0] - began:.2f} s, compilation included")
    after = len(times) - len(prompts)  # all rows have their first token at the same time
    if after > 0:
        rate = after / (times[-1] - times[0])
        say(f"then {rate:,.1f} tokens/s over {len(prompts)} row{'s' * (len(prompts) > 1)}")


if __name__ == "__main__":
    sys.exit(main())
