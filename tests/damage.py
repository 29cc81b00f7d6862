"""Damages every file of a checkpoint in turn and tells what became of it: `python -m tests.damage FOLDER` prints JSON."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

from mixtral_jax.checkpoint import Checkpoints, DamagedError
from mixtral_jax.sharding import named_leaves
from tests.helpers import on_mesh, tiny
from tests.test_checkpoint import META, random_state, saved


def damage(path: Path, how: str, rng: np.random.Generator) -> None:
    """Flips a bit, cuts the end off, or deletes the file."""
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
    elif how == "cut":
        path.write_bytes(content[: rng.integers(len(content))])
    else:
        path.unlink()


def look(folder: Path, like, want) -> str:
    """Returns noticed (it is called damaged), harmless (all of it is as it was saved) or, for shame, WRONG."""
    checkpoints = Checkpoints(folder)
    try:
        meta, data = checkpoints.meta(7), checkpoints.data(7)
        found = named_leaves(checkpoints.restore(7, *like))
    except DamagedError as error:
        return "noticed" if str(folder) in str(error) else "without its name"
    finally:
        checkpoints.close()
    same = all(np.array_equal(leaf, found[name]) for name, leaf in want.items())
    return "harmless" if same and meta.items() >= META.items() and data == {"at": [7, 12345]} else "WRONG"


def main(folder: Path) -> None:
    """Saves a checkpoint and damages it, again and again."""
    config, mesh = on_mesh(tiny(model__num_layers=1), fsdp=2)
    saved(folder, config, mesh)
    checkpoint, good = folder / "checkpoints" / "7", folder / "good"
    shutil.copytree(checkpoint, good)
    want = {name: np.asarray(leaf) for name, leaf in named_leaves(random_state(config, mesh, seed=7)).items()}
    like = random_state(config, mesh, seed=1)
    rng = np.random.default_rng(0)
    names = sorted(path.relative_to(good) for path in good.rglob("*") if path.is_file() and path.stat().st_size)
    results: dict[str, dict[str, str]] = {}
    for how, times in (("flip", 2), ("cut", 1), ("delete", 1)):
        results[how] = {}
        for name in [f"{name}#{i}" for i in range(times) for name in names]:
            shutil.rmtree(checkpoint)
            shutil.copytree(good, checkpoint)
            damage(checkpoint / name.partition("#")[0], how, rng)
            results[how][name] = look(folder, like, want)
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
