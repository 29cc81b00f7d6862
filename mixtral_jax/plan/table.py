"""Plans for a person, in lines of text."""

from typing import Any

from mixtral_jax import metrics
from mixtral_jax.memory import GIB
from mixtral_jax.plan.result import axes_text


def plan(result: dict[str, Any]) -> str:
    """The plan for a person, in lines."""
    t, times = result["traffic_bytes_per_device"], result["seconds_per_step"]
    mark = " (estimated)" if result["estimated"] or result["memory_from"] == "formulas" else ""
    mesh = axes_text({axis: size for axis, size in result["mesh"].items() if size > 1})
    tokens = result["tokens_per_device_and_micro_batch"]
    lines = [
        f"{result['topology']}: {result['devices']} chips as {mesh}; {', '.join(result['backends'].values())}; remat {result['remat']}",
        f"{metrics.human(result['parameters'], 4)} parameters, {metrics.human(result['active_parameters'], 4)} active per token; "
        f"batch {result['batch_size']} in {result['accumulation_steps']} micro-batches, {tokens:,} tokens a chip each",
        "",
        f"memory of a chip{mark}",
    ]
    need, have = result["hbm_bytes_needed"], result["hbm_bytes_available"]
    lines += [f"  {name:<14}{size / GIB:9.2f} GiB" for name, size in result["hbm_bytes_per_device"].items()]
    verdict = "fits" if result["fits"] else "DOES NOT FIT"
    lines.append(f"  {'in all':<14}{need / GIB:9.2f} GiB of {have / GIB:.2f} GiB: {verdict} ({need / have:.0%})")
    if result["host_bytes_per_device"]:
        lines.append(
            f"  {'on its host':<14}{result['host_bytes_per_device'] / GIB:9.2f} GiB (pinned; optim.offload, model.remat=offload)"
        )
    for row in [] if result["fits"] else result["largest_buffers"]:
        lines.append(f"    {row['bytes'] / GIB:9.2f} GiB  {row['shapes'][:80]}  {row.get('where', '')[-60:]}")
    lines += [f"    {text}" for text in result["knobs"]]
    drop = result["dropless"]
    lines.append(
        f"  staying dropless: {drop['dropless'] / GIB:.2f} GiB a receive buffer, {drop['configured'] / GIB:.2f} GiB with "
        f"model.buffer_factor={drop['buffer_factor']:g}; a layer holds several of them"
    )
    lines += ["", "traffic of a chip and step, received", f"  {'axis':<10}{'formula':>12}{'compiled':>12}   over"]
    for axis, amount in t["formula"].items():
        got = f"{t['compiled'][axis] / GIB:8.2f} GiB" if t["compiled"] else "-"
        lines.append(f"  {axis:<10}{amount / GIB:8.2f} GiB{got:>12}   {result['wires'][axis]['text']}")
    lines += ["", f"time of a step{' (estimated)' if result['estimated'] else ''}"]
    lines.append(f"  {'compute':<22}{times['compute']:9.3f} s   with what is computed again, at the data sheet's peak")
    lines.append(f"  {'memory':<22}{times['hbm']:9.3f} s")
    lines += [f"  {f'interconnect, {axis}':<22}{s:9.3f} s" for axis, s in times["interconnect"].items()]
    lines.append(
        f"  bound {times['bound']:.3f} s by {times['bound_by']}: MFU ceiling {result['mfu_ceiling']:.1%}; tokens' transfers "
        f"waited for: {times['predicted']:.3f} s, {result['mfu_predicted']:.1%}, {metrics.human(result['tokens_per_second'])} tokens/s"
    )
    lines.append(
        f"FLOPs: {result['flops_per_token'] / 1e9:.1f} GF a token, {result['flops_per_step'] / 1e15:,.1f} PF a step"
    )
    if result.get("paths"):
        lines.append("paths: " + ", ".join(f"{name} x{count}" for name, count in result["paths"].items()))
    if "compile_seconds" in result:
        lines.append(
            f"compiled in {result['compile_seconds']:.0f} s ({result['compile_cpu_seconds']:.0f} s of CPU time)"
        )
    return "\n".join(lines)


def ranking(plans: list[dict[str, Any]]) -> str:
    """The ranking for a person."""
    lines = [
        f"{'mesh (data fsdp expert context tensor)':<40}{'micro':>6}{'remat':>9}{'GiB':>8}{'s/step':>9}{'MFU':>7}{'ceiling':>9}"
    ]
    for one in plans:
        mesh = " x ".join(str(size) for size in one["mesh"].values())
        lines.append(
            f"{mesh:<40}{one['accumulation_steps']:>6}{one['remat']:>9}{one['hbm_bytes_needed'] / GIB:>8.1f}"
            f"{one['seconds_per_step']['predicted']:>9.3f}{one['mfu_predicted']:>7.1%}{one['mfu_ceiling']:>9.1%}"
            + ("" if one["fits"] else "   does not fit")
        )
    return "\n".join(lines)
