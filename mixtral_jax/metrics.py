"""What a run is measured by: training FLOPs and the hardware's peak (for MFU), router health, and the run's header.

The live bar and the throughput meter are in progress.py, the metrics file in jsonl.py.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mixtral_jax import backends
from mixtral_jax.config import Config, LossConfig, ModelConfig, OptimConfig

# Dense bf16 matmul peak of one chip, FLOP/s, from the makers' data sheets (cloud.google.com/tpu/docs; NVIDIA's sheets
# quote twice as much "with sparsity"). Matched as a part of jax's device_kind in lower case; the first match counts, so
# the narrower name stands first: jax calls v5e "TPU v5 lite" and v5p "TPU v5".
_BF16_PEAK = (
    ("tpu v6", 918e12),
    ("tpu v5 lite", 197e12),
    ("tpu v5e", 197e12),
    ("tpu v5", 459e12),
    ("tpu v4", 275e12),
    ("h200 nvl", 835e12),
    ("h200", 989e12),
    ("h100 nvl", 835e12),
    ("h100 pcie", 756e12),
    ("h100", 989e12),
    ("a100", 312e12),
)
_BARS = " ▁▂▃▄▅▆▇█"


def human(x: float, digits: int = 3) -> str:
    """Formats a count with a metric letter and that many significant digits: 41234 -> 41.2k, 4.67e10 -> 46.7B."""
    x = float(f"{x:.{digits - 1}e}")  # rounds first, so that 999,999 is 1.00M and not 1000k
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= scale:
            whole = len(str(int(abs(x) / scale)))
            return f"{x / scale:.{max(digits - whole, 0)}f}{letter}"
    return f"{x:g}"


def short_float(x: float) -> str:
    """Formats a small number such as a learning rate with three digits: 0.0003 -> 3e-4, 0.04 -> 0.04."""
    if x == 0 or not math.isfinite(x) or 1e-2 <= abs(x) < 1e3:
        return f"{x:.3g}"
    mantissa, exponent = f"{x:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _flops(x: float) -> str:
    """Formats FLOPs with three digits: 79.7 GF, 29.4 PF."""
    scale, letter = next((s for s in ((1e18, "E"), (1e15, "P"), (1e12, "T")) if x >= s[0]), (1e9, "G"))
    return f"{x / scale:.3g} {letter}F"


def mean_visible_keys(seq_len: int, window: int) -> float:
    """Keys a query sees on average: S/2 causally, w - w^2/(2S) with a sliding window w < S (both meet at w = S)."""
    if 0 < window < seq_len:
        return window - window**2 / (2 * seq_len)
    return seq_len / 2


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Training FLOPs per token, the numerator of MFU.

    6 * (L * (attn + K*3*D*F + D*E) + V*D) + 12 * L * N*H * (mean visible keys), attn = 2*D*N*H + 2*D*G*H.

    Convention: a multiply-add is 2, the backward pass twice the forward pass, attention is causal (a query sees S/2
    keys on average, so that the score term is 6*L*N*H*S), only the K chosen experts count, the embedding look-up is
    free, and nothing that is recomputed counts. 8x7B: 79.7e9 at S = 4096.

    Args:
        model: the shape.
        seq_len: S, the length of the training sequences; a packed row counts as one sequence.

    Returns:
        FLOPs per token.
    """
    D, N, G, H = model.d_model, model.num_heads, model.num_kv_heads, model.head_dim
    attention = 2 * D * N * H + 2 * D * G * H
    layer = attention + model.experts_per_token * 3 * D * model.d_ff + D * model.num_experts
    weights = 6 * (model.num_layers * layer + model.vocab_size * D)
    # Scores and values: 2 matmuls * 2 FLOPs * 3 (forward and backward) per visible key.
    scores = 12 * model.num_layers * N * H * mean_visible_keys(seq_len, model.sliding_window)
    return float(weights + scores)


def device_peak_flops(device: jax.Device, dtype: str) -> tuple[float, str]:
    """The matmul peak of one device, the denominator of MFU.

    Args:
        device: its `device_kind` is looked up; a kind that is not in the table, CPUs among them, is measured by a short
            matmul (< 0.5 s).
        dtype: "bfloat16" or "float32". In float32 a GPU is held to its tf32 peak (half of bf16) and a TPU to its bf16
            peak, because that is what XLA runs float32 matmuls in by default.

    Returns:
        FLOP/s of the device, and in words where the figure comes from.
    """
    kind = device.device_kind.lower()
    peak = next((peak for name, peak in _BF16_PEAK if name in kind), None)
    if peak is None:
        return _matmul_rate(device, dtype), f"measured matmul rate, {dtype}"
    if dtype == "bfloat16":
        return peak, "data sheet, dense bf16"
    if "tpu" in kind:
        return peak, "data sheet, dense bf16 (float32 matmuls run in bf16 passes by default)"
    return peak / 2, "data sheet, dense tf32 (what float32 matmuls run in by default)"


def mesh_peak_flops(devices: Sequence[jax.Device], dtype: str) -> tuple[float, str]:
    """The matmul peak of all devices of a mesh together; see device_peak_flops.

    CPU devices of one process are one CPU split up (`--xla_force_host_platform_device_count`), so they count once, and
    so do the processes of a local trial, which share it too.
    """
    devices = list(np.ravel(devices))
    local = next(device for device in devices if device.process_index == jax.process_index())
    peak, source = device_peak_flops(local, dtype)
    if local.platform == "cpu":
        return peak, f"{source}; {len(devices)} CPU devices share one CPU" if len(devices) > 1 else source
    return peak * len(devices), source


def _matmul_rate(device: jax.Device, dtype: str) -> float:
    """Best rate of a square matmul in FLOP/s, within about 0.4 s: the matrix grows while there is time, then repeats."""
    matmul = jax.jit(lambda a, b: a @ b)
    best, start = 0.0, time.perf_counter()
    for n in (512, 1024, 2048, 4096):
        a = jax.device_put(np.ones((n, n), jax.numpy.dtype(dtype)), device)
        matmul(a, a).block_until_ready()
        for _ in range(3):
            begin = time.perf_counter()
            matmul(a, a).block_until_ready()
            seconds = time.perf_counter() - begin
            best = max(best, 2 * n**3 / seconds)
        # The next size takes 8 times as long, four times over.
        if time.perf_counter() - start + 4 * 8 * seconds > 0.3:
            break
    while time.perf_counter() - start < 0.35:  # on a busy machine the best of many comes nearer to the peak
        begin = time.perf_counter()
        matmul(a, a).block_until_ready()
        best = max(best, 2 * n**3 / (time.perf_counter() - begin))
    return best


def router_health(load_LE, entropy_L, dropped_L) -> dict[str, Any]:
    """Condenses the router's statistics: per layer (lists) and the worst of all layers (floats).

    Args:
        load_LE: assignments of each expert, as counts or as shares; each layer is normalised to sum 1.
        entropy_L: mean entropy of the router's softmax, nats.
        dropped_L: share of the assignments that no expert computed, 0..1.

    Returns:
        max_over_mean_L: the busiest expert's load over the mean, 1 (even) .. E (collapsed); max_over_mean: the highest.
        min_share_L: the idlest expert's share of the assignments, 1/E at best; min_share: the lowest.
        entropy_L in nats, entropy_relative_L over log E, 0..1; entropy_relative: the lowest.
        dropped_L; dropped: the mean over layers, which is the share over all assignments.
    """
    share_LE = _shares(load_LE)
    e = share_LE.shape[-1]
    entropy_L, dropped_L = np.asarray(entropy_L, np.float64), np.asarray(dropped_L, np.float64)
    max_over_mean_L, min_share_L = share_LE.max(-1) * e, share_LE.min(-1)
    relative_L = entropy_L / math.log(e) if e > 1 else np.ones_like(entropy_L)
    return {
        "max_over_mean": float(max_over_mean_L.max()),
        "min_share": float(min_share_L.min()),
        "entropy_relative": float(relative_L.min()),
        "dropped": float(dropped_L.mean()),
        "max_over_mean_L": max_over_mean_L.tolist(),
        "min_share_L": min_share_L.tolist(),
        "entropy_L": entropy_L.tolist(),
        "entropy_relative_L": relative_L.tolist(),
        "dropped_L": dropped_L.tolist(),
    }


def _shares(load_LE) -> np.ndarray:
    load_LE = np.asarray(load_LE, np.float64)
    if load_LE.ndim != 2:
        raise ValueError(f"load_LE has shape {load_LE.shape}; it must be [layers, experts]")
    return load_LE / np.maximum(load_LE.sum(-1, keepdims=True), 1e-30)


def router_table(load_LE, entropy_L, dropped_L) -> str:
    """Draws the router's health as a terminal table, a line per layer; arguments as in router_health.

    Each expert is a bar, half high at the fair share 1/E, with its load in per cent beside it (up to 16 experts).
    """
    share_LE = _shares(load_LE)
    health = router_health(load_LE, entropy_L, dropped_L)
    e = share_LE.shape[-1]
    numbers = e <= 16

    def cell(share: float) -> str:
        level = min(round(share * e * 4), 8)
        # An expert that gets something is never drawn as empty.
        bar = _BARS[max(level, 1) if share > 0 else 0]
        return f"{bar}{100 * share:5.1f}" if numbers else bar

    gap = "  " if numbers else ""
    width = len(gap.join(cell(share) for share in share_LE[0]))
    title = gap.join(f"{f'e{i}':>6}" for i in range(e)) if numbers else f"load of {e} experts"
    lines = [f"layer  {title:<{width}}  max/mean  {'entropy, nats':>20}  dropped"]
    for layer, share_E in enumerate(share_LE):
        cells = gap.join(cell(share) for share in share_E)
        entropy, relative = health["entropy_L"][layer], health["entropy_relative_L"][layer]
        lines.append(
            f"{layer:5d}  {cells:<{max(width, len(title))}}  {health['max_over_mean_L'][layer]:8.2f}  "
            f"{entropy:6.3f} ({relative:4.0%} of max)  {health['dropped_L'][layer]:7.2%}"
        )
    return "\n".join(lines)


def header(
    config: Config,
    *,
    total_params: int,
    active_params: int,
    mesh_shape: Mapping[str, int],
    tokenizer_name: str,
    num_train_tokens: int,
    device_kind: str,
    num_devices: int,
    peak: float,
    peak_source: str,
) -> str:
    """The block of text a run opens with: everything that decides its speed and its result, in aligned rows.

    Args:
        config: the run's configuration.
        total_params, active_params: numbers of parameters, all and those one token uses.
        mesh_shape: mesh axis -> size.
        tokenizer_name: as the user would name it.
        num_train_tokens: tokens in one epoch of the training split; 0 if it is not known (a stream).
        device_kind, num_devices: the hardware.
        peak: FLOP/s of all devices together, and peak_source: where that figure comes from (see mesh_peak_flops).
    """
    model, loss, optim, train = backends.resolve(config.model), config.loss, config.optim, config.train
    bound = f", at most {model.buffer_factor:g} times the even share a device" if model.buffer_factor else ""
    if model.buffer_factor and model.dispatch == "ring":  # what "auto" means here; by name it is refused with a factor
        bound = ", which has no use for model.buffer_factor and drops nothing"
    step_tokens = train.batch_size * train.seq_len
    tokens = train.steps * step_tokens
    epochs = f" = {tokens / num_train_tokens:.3g} epochs of {human(num_train_tokens)}" if num_train_tokens else ""
    flops = flops_per_token(model, train.seq_len)
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh_shape.items() if size > 1)
    rows = {
        "stage": f"{train.stage}, seed {train.seed}",
        "size": f"{human(total_params, 4)} parameters, {human(active_params, 4)} active per token",
        "shape": f"{model.num_layers} layers, D {model.d_model}, heads {model.num_heads} / {model.num_kv_heads} kv of {model.head_dim}, F {model.d_ff}, V {model.vocab_size}"
        + (f", sliding window {model.sliding_window}" if model.sliding_window else ""),
        "experts": f"{model.num_experts}, top {model.experts_per_token}, backend {model.expert_backend}"
        + (f" (blocks of {model.expert_block} rows)" if model.expert_backend == "blocks" else "")
        + (f", dispatch {model.dispatch}{bound}" if mesh_shape.get("expert", 1) > 1 else ""),
        "attention": model.attention,
        "batch": f"{train.batch_size} x {train.seq_len} = {step_tokens:,} tokens per step"
        + (f" in {train.accumulation_steps} micro-batches" if train.accumulation_steps > 1 else ""),
        "length": f"{train.steps:,} steps = {human(tokens)} tokens{epochs}",
        "tokenizer": tokenizer_name,
        "mesh": f"{num_devices} x {device_kind}: {axes or 'one device'}",
        "precision": f"{model.dtype} activations and matmuls; float32 weights, router, norms, loss; remat {model.remat}",
        **_loss_rows(loss, model.experts_per_token),
        **_optim_rows(optim),
        **_tuning_rows(config),
        "FLOPs": f"{_flops(flops)} per token, {_flops(flops * step_tokens)} per step "
        "(multiply-add 2, backward 2x forward, causal attention, no recompute)",
        "peak": f"{_flops(peak)}LOP/s in all = MFU 100% ({peak_source})",
    }
    return "\n".join(f"  {name:<10} {text}" for name, text in rows.items())


def _tuning_rows(config: Config) -> dict[str, str]:
    """What only SFT, DPO and LoRA have to say."""
    dpo, lora, rows = config.dpo, config.lora, {}
    if config.train.stage == "dpo":
        extras = [
            f"label smoothing {dpo.label_smoothing:g}" if dpo.label_smoothing else "",
            f"gamma {dpo.gamma:g}, no reference" if dpo.loss == "simpo" else f"reference {dpo.reference}",
            f"plus {dpo.sft_weight:g} of the chosen answers' token loss" if dpo.sft_weight else "",
        ]
        rows["preference"] = ", ".join([f"{dpo.loss}, beta {dpo.beta:g}", *filter(None, extras)])
    if lora.rank:
        rows["LoRA"] = (
            f"rank {lora.rank}, alpha {lora.alpha:g} on {', '.join(lora.targets)}; the base is frozen in {config.model.dtype}"
        )
    if config.optim.freeze_router:
        rows["routers"] = "frozen"
    return rows


def _loss_rows(loss: LossConfig, k: int) -> dict[str, str]:
    uniform = f"{k}.0" if loss.balance_mode == "huggingface" else "1.0"
    if loss.balance_weight:
        balance = f"{loss.balance_mode}, weight {short_float(loss.balance_weight)} ({uniform} = even)"
    else:
        balance = f"OFF (weight 0); {loss.balance_mode} value is still logged, {uniform} = even"
    if loss.bias_update_rate:
        balance += f"; router bias steers, rate {short_float(loss.bias_update_rate)}"
    return {
        "balance": balance,
        "router z": f"weight {short_float(loss.router_z_weight)}" if loss.router_z_weight else "OFF (weight 0)",
        "logit z": f"weight {short_float(loss.z_weight)}" if loss.z_weight else "OFF (weight 0)",
    }


def _optim_rows(optim: OptimConfig) -> dict[str, str]:
    top, last = optim.learning_rate, optim.learning_rate * optim.final_lr_ratio
    schedule = f"{optim.schedule}, warmup {optim.warmup_steps} steps to {short_float(top)}"
    if optim.schedule == "warmup_cosine":
        schedule += f", down to {short_float(last)}"
    elif optim.schedule == "warmup_stable_decay":
        schedule += f", the last {optim.decay_steps} steps down to {short_float(last)}"
    elif not optim.warmup_steps:
        schedule = f"constant {short_float(top)}"
    clip = f"clip {short_float(optim.clip_norm)}" if optim.clip_norm else "clipping OFF"
    decay = f"decay {short_float(optim.weight_decay)}" if optim.weight_decay else "decay OFF"
    betas = "" if optim.name == "adafactor" else f"b1 {optim.b1:g}, b2 {optim.b2:g}, "
    return {"optimizer": f"{optim.name}, {betas}{decay}, {clip}, {optim.moment_dtype} moments", "schedule": schedule}
