"""The whole suite runs on 8 fake CPU devices, with rank promotion an error (pyproject.toml makes warnings errors)."""

import os

# Nearly all of the suite's time is compilation, so LLVM optimises nothing here; the programs stay the same.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 " + os.environ.get("XLA_FLAGS", "")
)
os.environ.setdefault("MPLBACKEND", "Agg")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
# Commands that are called within the suite's process would turn it on; what is tested is what is compiled.
jax.config.update("jax_enable_compilation_cache", False)
