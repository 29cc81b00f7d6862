"""Decoding speed at the 214M shape of our CPU measurements: prepared and stacked weights, and transformers where it is installed.

python -m benchmarks.decode [--rows=1,8] [--steps=40]

float32, greedy, prompts of 32 tokens; milliseconds of one step over all rows. Each of the candidates runs in turn, so that
they meet the same load of the machine. transformers is timed where it can be imported, with the same weights' shapes.
"""

import argparse
import importlib.util
import os
import statistics
import time
from importlib.metadata import version

import jax
import numpy as np

from benchmarks.common import write
from configs.common import base, shrink
from mixtral_jax.config import from_config_dict
from mixtral_jax.models import mixtral
from mixtral_jax.models.decode import decode, prefill, prepare

SHAPE = dict(
    vocab_size=32000,
    num_layers=8,
    d_model=512,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    d_ff=1792,
    num_experts=8,
    experts_per_token=2,
    max_seq_len=1024,
    expert_block=256,
)
PROMPT = 32


def ours(weights, rows: int):
    """A function that decodes one more token and waits for it."""
    tokens_BT = np.random.default_rng(0).integers(3, 32000, (rows, PROMPT)).astype(np.int32)
    logits, cache = prefill(weights, tokens_BT, np.full(rows, PROMPT, np.int32), 1024)
    state = [np.asarray(logits).argmax(-1).astype(np.int32), cache]
    active = np.ones(rows, bool)

    def step():
        logits, state[1] = decode(weights, state[1], state[0], active)
        state[0] = np.asarray(logits.argmax(-1)).astype(np.int32)

    return step


def theirs(rows: int):
    """The same for transformers, with its own random weights."""
    import torch
    import transformers

    s = SHAPE
    config = transformers.MixtralConfig(
        vocab_size=s["vocab_size"],
        hidden_size=s["d_model"],
        intermediate_size=s["d_ff"],
        num_hidden_layers=s["num_layers"],
        num_attention_heads=s["num_heads"],
        num_key_value_heads=s["num_kv_heads"],
        head_dim=s["head_dim"],
        num_local_experts=s["num_experts"],
        num_experts_per_tok=s["experts_per_token"],
    )
    model = transformers.MixtralForCausalLM(config).eval()
    tokens = torch.tensor(np.random.default_rng(0).integers(3, 32000, (rows, PROMPT)))
    with torch.no_grad():
        out = model(input_ids=tokens, use_cache=True)
    state = [out.logits[:, -1].argmax(-1), out.past_key_values]

    def step():
        with torch.no_grad():
            out = model(input_ids=state[0][:, None], past_key_values=state[1], use_cache=True)
        state[:] = [out.logits[:, -1].argmax(-1), out.past_key_values]

    return step


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser("python -m benchmarks.decode")
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    c = shrink(base())
    c.model.update(SHAPE)
    config = from_config_dict(c).model
    model = jax.jit(mixtral.init, static_argnums=0)(config, jax.random.key(0))
    prepared = prepare(model)
    print(f"prepared weights: {prepared.nbytes / 1e6:,.0f} MB beside the model's own")
    table = []
    for rows in map(int, arguments.rows.split(",")):
        candidates = {}
        for name, make in (
            ("prepared", lambda rows=rows: ours(prepared, rows)),
            ("stacked", lambda rows=rows: ours(model, rows)),
            ("transformers", lambda rows=rows: theirs(rows)),
        ):
            begun = time.perf_counter()
            try:
                candidates[name] = make()
            except ImportError as error:
                print(f"  {name}: not measured ({error})")
                continue
            candidates[name]()
            print(f"  {name}: first step after {time.perf_counter() - begun:.1f} s")
        times = {name: [] for name in candidates}
        for _ in range(arguments.steps):
            for name, step in candidates.items():
                begun = time.perf_counter()
                step()
                times[name].append((time.perf_counter() - begun) * 1e3)
        middle = {name: statistics.median(ms) for name, ms in times.items()}
        for name, ms in times.items():
            ratio = f"{middle['transformers'] / middle[name]:.2f}" if "transformers" in middle else ""
            table.append(
                [rows, name, f"{middle[name]:.1f}", f"{min(ms):.1f}", f"{rows / middle[name] * 1e3:.1f}", ratio]
            )
    columns = ["rows", "what", "median ms a step", "best ms", "tokens/s", "times transformers"]
    peers = {name: version(name) for name in ("torch", "transformers") if importlib.util.find_spec(name)}
    about = {"load": os.getloadavg(), "shape": SHAPE, "peers": peers}
    write("decode", "Decoding, 214M parameters, float32", columns, table, about)


if __name__ == "__main__":
    main()
