"""The picture of a plan: memory of a chip by category."""

from pathlib import Path
from typing import Any

from mixtral_jax.memory import GIB

# One colour for each category, in every plan: pictures of different pods can be laid side by side.
COLOURS = {
    "parameters": "#4269d0",
    "optimizer": "#6cc5b0",
    "batch": "#9c6b4e",
    "gradients": "#efb118",
    "temporaries": "#ff725c",
    "program": "#9498a0",
}


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Writes a PNG with a bar for each plan, its parts by category, against the chip's memory.

    Args:
        results: plans, as result.make returns them.
        path: of the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.62 * len(results)), layout="constrained")
    axes = figure.subplots()
    most = max(max(one["hbm_bytes_needed"], one["hbm_bytes_available"]) for one in results) / GIB
    for y, one in enumerate(results):
        left = 0.0
        for name, size in one["hbm_bytes_per_device"].items():
            axes.barh(y, size / GIB, left=left, height=0.6, color=COLOURS[name], label=name if y == 0 else None)
            if size / GIB > 0.06 * most:
                axes.text(left + size / GIB / 2, y, f"{size / GIB:.1f}", ha="center", va="center", color="white")
            left += size / GIB
        have = one["hbm_bytes_available"] / GIB
        axes.plot(
            [have, have], [y - 0.42, y + 0.42], color="black", linewidth=2, label="the chip has" if y == 0 else None
        )
        mark = "" if one["fits"] else "  does not fit"
        axes.text(max(left, have) + 0.01 * most, y, f"{left:.1f} of {have:.1f}{mark}", va="center")
    axes.set_yticks(range(len(results)), [_label(one) for one in results])
    axes.invert_yaxis()
    axes.set_xlim(0, most * 1.22)
    axes.set_xlabel("GiB of a chip" + (" (estimated)" if any(one["estimated"] for one in results) else ""))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=7, frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)


def _label(one: dict[str, Any]) -> str:
    mesh = " ".join(f"{axis}{size}" for axis, size in one["mesh"].items() if size > 1) or "one device"
    return f"{one['topology']}\n{mesh}"
