"""Reads a compiled module's text: which collectives it has, how often each runs, over which mesh axes, how many bytes.

Bytes are what one device receives: of an all-gather's result the parts of the others, and so on (see `amounts.moved`).
"""

import dataclasses
import math
import re

import numpy as np

from mixtral_jax.plan.amounts import moved

ITEM = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "ragged-all-to-all", "all-to-all", "collective-permute")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_CALLS = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a module."""

    kind: str
    axes: tuple[str, ...]  # mesh axes it runs over; empty: they could not be read
    size: int  # devices of a group
    bytes: float  # that a device receives each time
    times: int  # how often a step runs it
    name: str  # where it comes from in the program


def collectives(text: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> list[Collective]:
    """Lists what a step communicates.

    Args:
        text: the optimised module of one device, as XLA prints it.
        shape, axes: of the mesh, whose devices are numbered in its order.

    Returns:
        the collectives of groups of more than one device, each with the number of times that its loops run it.
    """
    computations, entry = _computations(text)
    found: list[Collective] = []

    def visit(name: str, times: int) -> None:
        lines = computations.get(name, {})
        for result, (shape_text, op, rest) in lines.items():
            kind = op.removesuffix("-start")
            if kind in KINDS:
                found.extend(_collective(kind, op, shape_text, rest, lines, name, times, (shape, axes)))
            if op == "while":
                trips = _trips(rest, computations)
                visit(re.search(r"body=%?([\w.\-]+)", rest)[1], times * trips)
            elif kind not in KINDS:  # a collective's to_apply is its sum
                for called in _CALLS.findall(rest) + _BRANCHES.findall(rest):
                    for each in re.findall(r"[\w.\-]+", called):
                        visit(each, times)
            del result

    visit(entry, 1)
    return found


def _computations(text: str) -> tuple[dict[str, dict[str, tuple[str, str, str]]], str]:
    """Computation -> instruction -> (shape, operation, the rest of its line); and the name of the entry."""
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
            continue
        found = _LINE.match(line) if current is not None else None
        if found:
            current[found[1]] = (found[2], found[3], found[4])
    return computations, entry


def _trips(rest: str, computations) -> int:
    """How often a loop runs: as XLA noted, or the constant its counter is compared with; 1 where it is not fixed."""
    known = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', rest)
    if known:
        return int(known[1])
    lines = computations.get(re.search(r"condition=%?([\w.\-]+)", rest)[1], {})
    constants = {name: re.match(r"(\d+)\)", more) for name, (_, op, more) in lines.items() if op == "constant"}
    for _, (_, op, more) in lines.items():
        if (op == "compare" and "direction=LT" in more) or op == "fusion":
            for name in re.findall(r"%([\w.\-]+)", more.split("), ")[0]):
                if constants.get(name):
                    return int(constants[name][1])
    return 1


def _collective(kind, op, shape_text, rest, lines, computation, times, mesh) -> list[Collective]:
    members = _group(rest)
    if members is None or len(members) < 2:
        return []
    n = len(members) if kind != "collective-permute" else 2
    sizes = [_bytes(one) for one in _SHAPE.findall(shape_text)]
    if op.endswith("-start") and kind in ("all-gather", "collective-permute", "reduce-scatter", "all-to-all"):
        result = sizes[1] if kind == "collective-permute" else sum(sizes[len(sizes) // 2 :])  # (operands, results)
    else:
        result = sum(sizes)
    if kind == "ragged-all-to-all":
        # Its buffers are for the worst case; what travels is at most what is there to send.
        operand = lines.get(re.search(r"%([\w.\-]+)", rest)[1])
        result = min(result, sum(map(_bytes, _SHAPE.findall(operand[0])))) if operand else result
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind, amount = "reduce-scatter", result * (n - 1) / n  # XLA:TPU writes a reduce-scatter so, with its slice
    else:
        amount = moved(kind, result, n)
    name = re.search(r'op_name="([^"]*)"', rest)
    return [Collective(kind, _varying(members, *mesh), n, amount, times, name[1] if name else "")]


def _bytes(shape: tuple[str, str]) -> int:
    return math.prod(int(n) for n in shape[1].split(",") if n) * ITEM.get(shape[0], 4)


def _group(rest: str) -> list[int] | None:
    """The devices of the first group of a collective."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
    if pairs:
        moving = [pair for pair in re.findall(r"(\d+),(\d+)", pairs[1]) if pair[0] != pair[1]]
        return [int(n) for n in moving[0]] if moving else None
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if listed:
        return [int(n) for n in listed[1].split(",")]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest)
    if iota:
        return _order(iota[2]).reshape(_numbers(iota[1]))[0].tolist()
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", rest)
    return _mesh_group(mesh[1], mesh[2] or "", mesh[3]) if mesh else None


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _order(text: str):
    """Device numbers in the order `[4,16]T(1,0)`: counted in that shape, then transposed."""
    dims, turned = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    dims = _numbers(dims)
    return np.arange(math.prod(dims)).reshape(dims).transpose(_numbers(turned) if turned else range(len(dims))).ravel()


def _mesh_group(sizes: str, order: str, over: str) -> list[int]:
    """`'axis_0'=16,'axis_1'=4` and `'axis_0'`, or a part of an axis: `'axis_0':(2)4` (after 2, of size 4)."""
    dims = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", sizes)}
    total = math.prod(dims.values())
    devices = _order(order or f"[{total}]").reshape(tuple(dims.values()))
    parts = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", over)
    index = []
    for name, size in dims.items():
        mine = [(int(before), int(width)) for other, before, width in parts if other == name and width]
        if mine:
            before, width = mine[0]
            index.append(np.arange(width) * (size // before // width))
        else:
            index.append(np.arange(size) if any(other == name for other, *_ in parts) else np.zeros(1, int))
    return devices[np.ix_(*index)].ravel().tolist()


def _varying(members: list[int], shape, axes) -> tuple[str, ...]:
    places = np.stack(np.unravel_index(members, shape))
    return tuple(axis for axis, place in zip(axes, places) if len(set(place.tolist())) > 1)
