"""Imports run down the layers of docs/design.md, and the package never imports torch or transformers."""

import ast
import graphlib
from pathlib import Path

import pytest

LAYERS = [
    {"config", "remote", "sharding"},
    {"backends", "models", "kernels", "losses", "preference", "optim", "data"},
    {"fingerprint", "checkpoint", "workdir", "metrics", "progress", "jsonl", "load", "resolve", "generate", "convert"}
    | {
        "clusters",
        "mirror",
        "lora_base",
        "distributed",
        "last_words",
        "watch",
        "appending",
        "events",
        "writers",
        "timing",
        "profile",
        "memory",
        "host_memory",
        "saving",
        "compilation_cache",
        "xla_flags",
        "interrupt",
    },
    {
        "stages",
        "step",
        "frozen",
        "reference",
        "resume",
        "run",
        "interlude",
        "trainer",
        "evals",
        "report",
        "panels",
        "time_panels",
        "tuning_panels",
        "plan",
    },
    {"cli", "launch"},
    {"env"},
]
ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "mixtral_jax").rglob("*.py"))


def layer_of(module: str) -> int | None:
    parts = module.split(".")
    if len(parts) < 2:
        return None
    if parts[-1] == "__main__":  # a program stands above the layers, and nothing imports it
        return len(LAYERS)
    levels = [level for level, names in enumerate(LAYERS) if parts[1] in names]
    assert levels, f"{module} is in no layer: add it to LAYERS and to docs/design.md"
    return levels[0]


def imported(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module)
            found += [f"{node.module}.{alias.name}" for alias in node.names if node.module == "mixtral_jax"]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_down(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    mine = layer_of(module.removesuffix(".__init__"))
    for name in imported(path):
        assert name.split(".")[0] not in ("torch", "transformers", "configs", "tests"), f"{path} imports {name}"
        if name.startswith("mixtral_jax.") and mine is not None:
            theirs = layer_of(name)
            if theirs is not None:
                assert theirs <= mine, f"{module} (layer {mine}) imports {name} (layer {theirs})"


def test_nothing_imports_in_a_circle():
    """Also not within a function, where Python would bear it; a package's own name stands for its __init__."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    graph = {}
    for name, path in names.items():
        found = set(imported(path))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        graph[name] = found & names.keys() - {name}  # a package may name its own parts
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_the_trainer_does_not_know_the_evaluations():
    """They are passed in by train.py, so that an evaluation never changes the loop."""
    for name in ("trainer", "step", "stages"):
        assert not [module for module in imported(ROOT / "mixtral_jax" / f"{name}.py") if "evals" in module]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.name)
def test_configs_import_nothing_from_the_package(path):
    assert not [name for name in imported(path) if name.startswith("mixtral_jax")]


def test_data_imports_no_model_and_no_jax():
    for path in (ROOT / "mixtral_jax" / "data").glob("*.py"):
        assert not [name for name in imported(path) if name.split(".")[0] in ("jax", "flax")]
