"""What benchmarks/cpu.py and gpu.py measure of transformers: the same cases, shapes and precision, each experts implementation.

Candidates: transformers-eager, transformers-grouped_mm, transformers-batched_mm, and transformers-compile (torch.compile of
the first). Training is AdamW (fused) with the router's auxiliary loss, as ours.
"""

import atexit
import copy
import shutil
import tempfile

import torch
import transformers

from benchmarks.worker import Run, documents_of, tokens


def _model(candidate: str, shape: dict):
    config = transformers.MixtralConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["d_model"],
        intermediate_size=shape["d_ff"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        head_dim=shape["head_dim"],
        num_local_experts=shape["num_experts"],
        num_experts_per_tok=shape["experts_per_token"],
        max_position_embeddings=max(2 * shape["seq_len"], 1024),
        router_aux_loss_coef=0.02,
    )
    torch.manual_seed(0)
    kind = candidate.removeprefix("transformers-")
    config._experts_implementation = "eager" if kind == "compile" else kind
    with torch.device(shape["device"]):  # made there: at full width the host would take minutes
        return transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, shape["dtype"]))


def about(shape: dict) -> dict:
    """The device."""
    return {"device": torch.cuda.get_device_name() if shape["device"] == "cuda" else shape["device"]}


def device_peak_bytes(shape: dict) -> int | None:
    """The most device memory in use so far; None where it is the host's."""
    return torch.cuda.max_memory_allocated() if shape["device"] == "cuda" else None


def _wait(shape: dict) -> None:
    if shape["device"] == "cuda":
        torch.cuda.synchronize()


def _ids(shape: dict, rows: int, width: int):
    return torch.tensor(tokens(shape, rows, width), dtype=torch.long, device=shape["device"])


def _maybe_compiled(candidate: str, function):
    return torch.compile(function) if candidate.endswith("compile") else function


def train(candidate: str, shape: dict) -> Run:
    """A training step: forward, backward, clipping and AdamW."""
    model = _model(candidate, shape).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = _ids(shape, shape["batch"], shape["seq_len"])
    forward = _maybe_compiled(candidate, lambda ids: model(input_ids=ids, labels=ids, output_router_logits=True).loss)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = forward(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        float(loss.detach())
        _wait(shape)

    return run


def _layer(candidate: str, shape: dict):
    model = _model(candidate, shape | {"num_layers": 1})
    torch.manual_seed(0)
    size = (shape["batch"], shape["seq_len"], shape["d_model"])
    x = torch.randn(size, dtype=getattr(torch, shape["dtype"]), device=shape["device"])
    return _maybe_compiled(candidate, model.model.layers[0].mlp), x


def _output(found):
    return found[0] if isinstance(found, tuple) else found


def moe_forward(candidate: str, shape: dict) -> Run:
    """One layer of experts, router included."""
    layer, x = _layer(candidate, shape)

    def run() -> None:
        with torch.no_grad():
            _output(layer(x))
        _wait(shape)

    return run


def moe_train(candidate: str, shape: dict) -> Run:
    """The same with the gradients of its input and of all its weights."""
    layer, x = _layer(candidate, shape)
    x.requires_grad_()

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        out = _output(layer(x))
        out.backward(out.detach())
        _wait(shape)

    return run


def prefill_case(candidate: str, shape: dict) -> Run:
    """A batch of prompts up to the logits of their next tokens."""
    model = _model(candidate, shape).eval()
    ids = _ids(shape, shape["batch"], shape["seq_len"])
    forward = _maybe_compiled(candidate, lambda ids: model(input_ids=ids, use_cache=True, logits_to_keep=1).logits)

    def run() -> None:
        with torch.no_grad():
            forward(ids)
        _wait(shape)

    return run


def decoding(rows: int):
    """Greedy decoding of some tokens for several rows, each step's tokens fetched."""

    def build(candidate: str, shape: dict) -> Run:
        model = _model(candidate, shape).eval()
        ids = _ids(shape, rows, shape["prompt"])
        call = _maybe_compiled(candidate, model)
        with torch.no_grad():
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        first, start = out.logits[:, -1].argmax(-1), out.past_key_values

        def run() -> None:
            token, held = first, copy.deepcopy(start)
            with torch.no_grad():
                for _ in range(shape["new_tokens"]):
                    out = call(input_ids=token[:, None], past_key_values=held, use_cache=True)
                    token, held = out.logits[:, -1].argmax(-1), out.past_key_values
                    token.tolist()

        return run

    return build


def data_case(candidate: str, shape: dict) -> Run:
    """Shuffled batches through transformers' collator and torch's DataLoader, of rows cut out of all documents one after the other.

    They were cut and stored before, as transformers' own scripts do it; documents in a row are not told apart.
    """
    import datasets

    total, t = int(documents_of(shape).sum()), shape["seq_len"]
    rows = tokens(shape, 1, total // t * t).reshape(-1, t)
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    datasets.Dataset.from_dict({"input_ids": rows, "labels": rows}).save_to_disk(folder)
    loader = torch.utils.data.DataLoader(
        datasets.load_from_disk(folder), shape["batch"], shuffle=True, collate_fn=transformers.default_data_collator
    )
    held = [iter(loader)]

    def run() -> None:
        for _ in range(shape["batches"]):
            batch = next(held[0], None)
            if batch is None:  # the next epoch
                held[0] = iter(loader)

    return run


CASES = {
    "train": train,
    "moe_forward": moe_forward,
    "moe_train": moe_train,
    "prefill": prefill_case,
    "decode_1": decoding(1),
    "decode_8": decoding(8),
    "decode_32": decoding(32),
    "data": data_case,
}
