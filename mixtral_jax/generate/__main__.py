"""The command line of generation; see `python -m mixtral_jax.generate --help`."""

import argparse
import sys

from mixtral_jax import cli
from mixtral_jax.config import UserError, mesh_sizes
from mixtral_jax.generate.terminal import converse, say, show

EPILOG = """examples:
  python -m mixtral_jax.generate --checkpoint=runs/demo/pretrain --prompt='def main(' --max_tokens=64
  python -m mixtral_jax.generate --checkpoint=runs/demo/pretrain --prompt='import ' --temperature=0.8 --top_p=0.95 --num_samples=3
  python -m mixtral_jax.generate --checkpoint=runs/demo/pretrain --prompt='class A' --prompt='for i in' --stop='\\n\\n'
  python -m mixtral_jax.generate --checkpoint=hf:Mixtral-8x7B-v0.1 --prompt='def ' --mesh=expert=4,tensor=2
  python -m mixtral_jax.generate --checkpoint=hf:Mixtral-8x7B-Instruct-v0.1 --chat --system='Be brief.'

The text goes to stdout as it is made, everything else to stderr. --stop understands \\n and \\t.
exit status: 0 done, 2 a mistake in the arguments or the checkpoint, explained on stderr."""
TOKENS, CHAT_TOKENS = 64, 512  # the default of --max_tokens


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status."""
    arguments = _parser().parse_args(argv)
    cli.threads_for_fake_devices()
    return cli.guarded(lambda: _run(arguments), "\ninterrupted")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m mixtral_jax.generate",
        description="Continues prompts with a checkpoint, or talks.",
        epilog=EPILOG,
        formatter_class=raw,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run's workdir or WORKDIR/checkpoints/STEP, here or gs://..., or hf:DIR")
    add("--step", help="of a workdir, which checkpoint: a number, or best (default: the newest)")
    add("--prompt", action="append", default=[], help="text to continue; give it several times for a batch")
    add("--chat", action="store_true", help="talk in Mixtral-8x7B-Instruct's format; with --prompt, answer and end")
    add("--system", default="", help="a system prompt for --chat")
    add("--max_tokens", type=int, help="longest continuation (default: 64; with --chat 512, or what room there is)")
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
    _check(arguments)
    sizes = mesh_sizes(arguments.mesh)
    import jax

    from mixtral_jax import compilation_cache, host_memory
    from mixtral_jax.generate import Sampling, encode_chat
    from mixtral_jax.load import load, stored_tokenizer
    from mixtral_jax.models.decode import prepare
    from mixtral_jax.resolve import parse_step, resolve_checkpoint

    compilation_cache.enable()
    a = arguments
    sampling = Sampling(a.temperature, a.top_k, a.top_p, a.min_p)
    checkpoint = resolve_checkpoint(a.checkpoint, None if a.step is None else parse_step(a.step))
    tokenizer = stored_tokenizer(checkpoint)
    if a.chat:
        encode_chat(tokenizer, [{"role": "user", "content": "?"}])  # refuses a tokenizer of another format at once
    _, weights, mesh = load(checkpoint, sizes, for_decoding=True)
    stop = [s.replace("\\n", "\n").replace("\\t", "\t") for s in a.stop]
    with jax.set_mesh(mesh):
        say(f"{checkpoint}; {mesh.size} device{'s' * (mesh.size > 1)}")
        if not a.stacked:
            weights = prepare(weights)
            host_memory.give_back()
            say(f"weights laid out for decoding: {weights.nbytes / 1e6:,.1f} MB")
        _answer(a, weights, tokenizer, dict(sampling=sampling, seed=a.seed, stop=stop))


def _check(a: argparse.Namespace) -> None:
    """Whatever can be refused is refused before JAX starts and weights are read."""
    if a.num_samples < 1 or (a.max_tokens is not None and a.max_tokens < 1):
        raise UserError(f"--num_samples={a.num_samples} --max_tokens={a.max_tokens}; both must be at least 1")
    if a.num_samples > 1 and a.temperature == 0:
        raise UserError("--num_samples at --temperature=0 gives the same text again and again; set a temperature")
    if not 0 <= a.seed < 2**32:
        raise UserError(f"--seed={a.seed} must lie between 0 and {2**32 - 1}")
    if not a.prompt and not a.chat:
        raise UserError("--prompt is missing; give a text to continue, or --chat to talk")
    if not a.prompt and a.num_samples > 1:
        raise UserError(f"--num_samples={a.num_samples} needs a --prompt: a conversation has one answer at a time")
    if a.system and not a.chat:
        raise UserError("--system is a part of a conversation; add --chat")


def _answer(a: argparse.Namespace, weights, tokenizer, settings: dict) -> None:
    from mixtral_jax.generate import encode_chat, stream
    from mixtral_jax.generate.chat import room

    if a.chat and not a.prompt:
        converse(weights, tokenizer, a.system, max_tokens=a.max_tokens or CHAT_TOKENS, **settings)
        return
    prompts = [prompt for prompt in a.prompt for _ in range(a.num_samples)]
    heads, max_tokens = prompts, a.max_tokens or TOKENS
    if a.chat:
        system = [{"role": "system", "content": a.system}]
        prompts = [encode_chat(tokenizer, [*system, {"role": "user", "content": p}]) for p in prompts]
        heads, max_tokens = [""] * len(prompts), room(weights, prompts, a.max_tokens or CHAT_TOKENS)
    show(stream(weights, tokenizer, prompts, max_tokens=max_tokens, message=a.chat, **settings), heads)


if __name__ == "__main__":
    sys.exit(main())
