"""Compile time of a train step against the number of layers, scanned and unrolled.

    python -m benchmarks.compile_time

The model is configs/tiny.py with 4 and 32 layers. Each compilation is in a process state without earlier caches of it.
"""

import argparse
import dataclasses
import time

import jax

from benchmarks.common import write
from configs import tiny
from mixtral_jax.config import Config, from_config_dict
from mixtral_jax.models import mixtral
from mixtral_jax.optim import make_optimizer
from mixtral_jax.stages import STAGES
from mixtral_jax.step import TrainState, make_train_step


def compile_seconds(config: Config) -> float:
    """Seconds to trace and compile the train step from abstract shapes."""
    optimizer = make_optimizer(config.optim, config.train.steps)
    params = mixtral.abstract(config.model)
    scalar = jax.ShapeDtypeStruct((), jax.numpy.int32)
    state = TrainState(scalar, params, jax.eval_shape(optimizer.init, params), jax.ShapeDtypeStruct((), bool))
    shape = (config.train.batch_size, config.train.seq_len)
    names = ("tokens_BT", "targets_BT", "positions_BT", "segment_ids_BT")
    batch = {name: jax.ShapeDtypeStruct(shape, jax.numpy.int32) for name in names}
    batch["loss_weights_BT"] = jax.ShapeDtypeStruct(shape, jax.numpy.float32)
    step = make_train_step(config, optimizer, STAGES[config.train.stage].loss)
    start = time.perf_counter()
    jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    return time.perf_counter() - start


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    config = from_config_dict(tiny.get_config())
    rows = []
    compile_seconds(config)  # warms up what is compiled once per process
    for layers, scan in ((4, True), (32, True), (4, False), (32, False)):
        model = dataclasses.replace(config.model, num_layers=layers, scan_layers=scan)
        seconds = compile_seconds(dataclasses.replace(config, model=model))
        rows.append([layers, "scanned" if scan else "unrolled", f"{seconds:.1f}"])
    write("compile_time", "Compile time of a train step (configs/tiny.py)", ["layers", "how", "seconds"], rows, {})


if __name__ == "__main__":
    main()
