"""Out of memory: recognised in every text it comes in, measured against the compiler, and explained for real."""

import dataclasses
import functools
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import jax
import numpy as np
import pytest

from mixtral_jax import memory
from mixtral_jax.config import ModelConfig, RunError, UserError, from_config_dict, resolve_mesh
from mixtral_jax.memory import GIB, Available, explain_oom
from mixtral_jax.optim import make_optimizer
from mixtral_jax.plan import aot
from mixtral_jax.sharding import batch_sharding, replicated
from mixtral_jax.stages import STAGES
from mixtral_jax.step import abstract_state, make_train_step
from tests.helpers import on_mesh, random_batch, tiny

SHAPE = dict(
    model__d_model=128,
    model__d_ff=192,
    model__num_layers=4,
    model__vocab_size=1024,
    model__max_seq_len=256,
    train__seq_len=128,
    train__batch_size=16,
    loss__head_chunk=64,
)
RUN_TIME = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 26843545600 bytes.")


@functools.cache
def abstract(axes=(), **changes):
    config, mesh = on_mesh(tiny(**SHAPE | changes), **dict(axes))
    optimizer = make_optimizer(config.optim, config.train.steps)
    return config, mesh, optimizer, *abstract_state(config, optimizer, mesh)


@functools.cache
def compiled(axes=(), **changes):
    """The real train step, compiled and not run: the compiler knows what it will take."""
    config, mesh, optimizer, like, shardings = abstract(axes, **changes)
    step = jax.jit(
        make_train_step(config, optimizer, STAGES["pretrain"].loss),
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
    )
    batch = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=batch_sharding(mesh))
        for name, value in random_batch(config).items()
    }
    with jax.set_mesh(mesh):
        return config, like, step.lower(like, batch).compile()


TEXTS = {
    "cpu, at run time": (RUN_TIME, 25 * GIB, None),
    "gpu, at run time": (
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4770354232 bytes.\nBufferAssignment"),
        4770354232,
        None,
    ),
    "gpu, by units": (RuntimeError("Out of memory while trying to allocate 29.50GiB."), 29.5 * GIB, None),
    "gpu, allocator": (
        RuntimeError("RESOURCE_EXHAUSTED: Failed to allocate request for 176.00MiB (184549376B) on device ordinal 0"),
        184549376,
        None,
    ),
    "tpu, compiler": (
        ValueError(
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
            "Used 23.50G of 15.50G hbm. Exceeded hbm capacity by 8.00G."
        ),
        23.5 * GIB,
        None,
    ),
    "tpu, at run time": (
        RuntimeError(
            "RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 4.50G. That was not possible. "
            "There are 2.25G free.; (0x0x0_HBM0)"
        ),
        4.5 * GIB,
        2.25 * GIB,
    ),
    "cuda": (RuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"), None, None),
    "numpy": (MemoryError("Unable to allocate 2.00 PiB for an array with shape (281474976710656,)"), 2 * 2**50, None),
    "python": (MemoryError(), None, None),
    "c++": (RuntimeError("std::bad_alloc"), None, None),
    "system": (OSError(12, "Cannot allocate memory"), None, None),
}


@pytest.mark.parametrize(("error", "asked", "free"), TEXTS.values(), ids=TEXTS.keys())
def test_every_text_is_recognised_with_its_sizes(error, asked, free):
    assert memory.is_oom(error)
    assert memory._first(memory._ASKED, str(error)) == asked
    assert memory._first(memory._FREE, str(error)) == free


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("INVALID_ARGUMENT: shapes do not match"),
        ValueError("Ran out of memory in memory space smem. Used 1.00M of 1.00M smem."),
        RuntimeError("RESOURCE_EXHAUSTED: received message larger than max (4194308 vs. 4194304)"),
        OSError(28, "No space left on device"),
        KeyError("out of memory"),
    ],
    ids=["shapes", "a kernel's scratch memory", "a message's size", "disk", "a name"],
)
def test_other_errors_are_left_alone(error):
    config, *_, like, _ = abstract()
    assert explain_oom(error, config=config, state_or_abstract=like) is None


AXES = (("fsdp", 2), ("expert", 2))


def test_state_bytes_are_those_of_the_compiled_step():
    """Per device, on a mesh; the compiler also counts the batch."""
    config, like, step = compiled(AXES, model__remat="full")
    batch = sum(value.nbytes for value in random_batch(config).values()) // config.mesh.batch_shards
    assert sum(memory.state_bytes(like).values()) + batch == step.memory_analysis().argument_size_in_bytes
    sizes = dict(data=1, fsdp=2, expert=2, context=1, tensor=1)
    assert memory.state_bytes(abstract()[3], sizes) == memory.state_bytes(abstract(AXES)[3])


def test_estimates_come_near_what_the_compiler_says():
    """Within a factor of 2: XLA shares buffers and adds copies; the estimate only ranks settings."""
    for axes, remat in (((), "none"), (AXES, "full")):
        config, like, step = compiled(axes, model__remat=remat)
        estimate = sum(memory.activations(config).values()) + memory._gradients(config, like)
        assert 0.5 < estimate / step.memory_analysis().temp_size_in_bytes < 2, (axes, remat)


@pytest.mark.parametrize(
    ("where", "rank"),
    [
        ("precomputed", 2),
        ("on_the_fly", 0),
        pytest.param("precomputed", 0, marks=pytest.mark.slow),
        pytest.param("on_the_fly", 2, marks=pytest.mark.slow),
    ],
)
def test_the_frozen_weights_of_a_dpo_are_counted(where, rank):
    """By what the compiled step is given: the state, the batch, and what does not move."""
    changes = dict(train__stage="dpo", dpo__reference=where, lora__rank=rank, model__num_layers=1, model__remat="full")
    small = dict(train__batch_size=2, train__seq_len=16, model__dtype="bfloat16")
    config, mesh, _, like, _ = abstract((("fsdp", 2),), **changes | small)
    batch = aot.abstract_batch(config, mesh)
    read = [a for name, a in batch.items() if where == "precomputed" or not name.startswith("reference")]
    given = sum(memory.state_bytes(like).values()) + sum(a.size * a.dtype.itemsize for a in read) // 2
    compiled_step = aot.lower(config, mesh)[0].compile()
    assert compiled_step.memory_analysis().argument_size_in_bytes == given + memory.frozen_bytes(config)
    text = explain_oom(RUN_TIME, config=config, state_or_abstract=like)
    name = "frozen base" if rank else "frozen reference"
    assert (f"  {name} " in text) == (memory.frozen_bytes(config) > 0) == (rank > 0 or where == "on_the_fly")
    kept_for_it_alone = not rank and where == "on_the_fly"
    assert ("dpo.reference=precomputed (now on_the_fly)" in text) == kept_for_it_alone


def proposals(text: str) -> list[dict[str, str]]:
    lines = [line for line in text.split("\n") if re.match(r"  \d\. ", line)]
    return [dict(re.findall(r"(\w+\.\w+)=(\w+) \(now", line)) for line in lines]


def changed(config, keys: dict[str, str]):
    plain = config.to_dict()
    for name, value in keys.items():
        group, key = name.split(".")
        plain[group][key] = type(plain[group][key])(value)
    return from_config_dict(plain)


@pytest.mark.slow
def test_proposals_are_allowed_and_help_by_the_compilers_account():
    config, like, step = compiled((), model__remat="none")
    text = explain_oom(RUN_TIME, config=config, state_or_abstract=like, compiled_or_none=step)
    found = proposals(text)
    assert len(found) == 3
    assert {"model.remat"} in [x.keys() for x in found]

    def peak(compiled_step):
        analysis = compiled_step.memory_analysis()
        return analysis.temp_size_in_bytes + analysis.argument_size_in_bytes

    for keys in found:
        new = changed(config, keys)
        axes = tuple((axis, size) for axis, size in dataclasses.asdict(new.mesh).items() if size > 1)
        resolve_mesh(new, int(np.prod([size for _, size in axes])))
        overrides = {name.replace(".", "__"): value for name, value in keys.items() if not name.startswith("mesh")}
        overrides = {name: type(getattr_path(config, name))(value) for name, value in overrides.items()}
        overrides = {"model__remat": "none"} | overrides
        assert peak(compiled(axes, **overrides)[2]) < peak(step), keys


def getattr_path(config, name: str):
    group, key = name.split("__")
    return getattr(getattr(config, group), key)


def test_the_message_has_the_sizes_the_buffers_and_three_keys():
    config, like, step = compiled((), model__remat="none")
    text = explain_oom(
        RUN_TIME, config=config, state_or_abstract=like, compiled_or_none=step, have=Available("cpu", 30 * GIB, 2 * GIB)
    )
    lines = text.split("\n")
    assert lines[0] == ("out of memory on a CPU device: 25.0 GiB were asked for at once, 2.0 GiB of 30.0 GiB were free")
    params = sum(size for name, size in memory.state_bytes(like).items() if name.startswith("params"))
    assert re.search(rf"  parameters +{params / 2**20:.1f} MiB   \S*layers\.w_\w+ ", text)
    assert re.search(rf"  optimizer state +{2 * params / 2**20:.1f} MiB .*mu\.layers\.w_", text)
    assert re.search(rf"  gradients, float32 +{params / 2**20:.1f} MiB   estimated", text)
    accumulated, *_, like_accumulated, _ = abstract(train__accumulation_steps=2)
    text_accumulated = explain_oom(RUN_TIME, config=accumulated, state_or_abstract=like_accumulated)
    assert re.search(rf"  gradients, float32 +{2 * params / 2**20:.1f} MiB   estimated", text_accumulated), (
        "and their sum"
    )
    for words in ("kept for the backward pass, 4 layers, model.remat=none", "attention scores"):
        assert words in text
    temporaries = step.memory_analysis().temp_size_in_bytes / 2**20
    assert re.search(rf"all temporaries of the compiled step +{temporaries:.1f} MiB   from the compiler", text)
    assert lines[-1].startswith("  Together that may not be enough")


def test_the_smallest_change_that_is_enough_is_proposed():
    config, *_, like, _ = abstract()

    def propose(megabytes):
        error = RuntimeError(f"Out of memory while trying to allocate {megabytes + 10}MiB")
        return proposals(
            explain_oom(error, config=config, state_or_abstract=like, have=Available("gpu", None, 10 * 2**20))
        )

    steps = {
        need: next((x["train.accumulation_steps"] for x in propose(need) if "train.accumulation_steps" in x), None)
        for need in (1, 60, 1000)
    }
    assert steps[1] == "2"
    assert steps[60] == "4"
    assert steps[1000] == "16"


def test_proposals_follow_what_is_large_and_what_is_possible(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)

    def keys(have=Available("tpu", 16 * GIB, 0), axes=(), **changes):  # noqa: B008
        config, *_, like, _ = abstract(axes, **changes)
        text = explain_oom(RUN_TIME, config=config, state_or_abstract=like, have=have)
        return text, [tuple(x) for x in proposals(text)]

    # Few tokens: the state is what fills the device.
    small = dict(train__batch_size=2, train__seq_len=16, model__remat="full")
    text, found = keys(**small)
    assert found[0] == ("mesh.fsdp",)
    assert "mesh.fsdp=2 (now 1) on 2 devices (now 1)" in text
    assert ("optim.moment_dtype",) in found[:2]
    assert ("model.remat",) not in found
    text, found = keys(axes=(("data", 2),), **small)
    assert "mesh.fsdp=2 (now 1), mesh.data=1 (now 2)" in text
    assert ("optim.moment_dtype",) not in keys(**small, optim__moment_dtype="bfloat16")[1]
    assert ("optim.moment_dtype",) not in keys(**small, optim__b2=0.999)[1], "refused with bfloat16"
    # A large vocabulary and a whole row's logits.
    assert ("loss.head_chunk",) in keys(model__vocab_size=65536, loss__head_chunk=128, model__remat="full")[1]
    # A GPU whose memory jax takes by its default share.
    assert "1. XLA_PYTHON_CLIENT_MEM_FRACTION=0.95" in keys(have=Available("gpu", 60 * GIB, 0))[0]
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert "MEM_FRACTION" not in keys(have=Available("gpu", 60 * GIB, 0))[0]


def test_the_compilers_capacity_counts_and_the_host_is_told_apart():
    config, *_, like, _ = abstract()
    error, *_ = TEXTS["tpu, compiler"]
    text = explain_oom(error, config=config, state_or_abstract=like, have=Available("tpu", 16 * GIB, 16 * GIB))
    assert text.startswith("out of memory on a TPU device: 23.5 GiB were asked for at once, it has 15.5 GiB\n")
    text = explain_oom(
        MemoryError("Unable to allocate"), config=config, state_or_abstract=like, have=Available("tpu", 1, 1)
    )
    assert "the host, not the accelerator" in text
    assert "data.workers=1 (now 2)" in text
    assert explain_oom(MemoryError(), config=config, state_or_abstract=like).startswith("out of memory on a CPU device")


SCRIPT = """
import resource, jax, numpy as np
from mixtral_jax.config import RunError
from mixtral_jax.memory import explain_oom
from mixtral_jax.optim import make_optimizer
from mixtral_jax.plan import aot
from mixtral_jax.sharding import place, replicated
from mixtral_jax.stages import STAGES
from mixtral_jax.step import abstract_state, make_train_step
from tests.helpers import on_mesh, random_batch, tiny

LENGTH = 16384
config, mesh = on_mesh(
    tiny(train__seq_len=LENGTH, model__max_seq_len=LENGTH, train__batch_size=1, model__attention="plain")
)
optimizer = make_optimizer(config.optim, 1)
like, shardings = abstract_state(config, optimizer, mesh)
state = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), like)
step = jax.jit(
    make_train_step(config, optimizer, STAGES["pretrain"].loss),
    donate_argnums=0,
    out_shardings=(shardings, replicated(mesh)),
)
batch = place(random_batch(config), mesh)
resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))
with jax.set_mesh(mesh):
    compiled = step.lower(state, batch).compile()
    try:
        jax.block_until_ready(compiled(state, batch))
    except Exception as error:
        print(type(error).__name__, error)
        print(explain_oom(error, config=config, state_or_abstract=state, compiled_or_none=compiled))
"""


def test_a_train_step_that_really_runs_out_of_memory():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    raised, headline, *rest = done.stdout.splitlines()
    assert "RESOURCE_EXHAUSTED" in raised
    assert re.match(r"out of memory on a CPU device: [\d.]+ GiB were asked for at once, it has 6\.0 GiB", headline)
    assert any("attention scores of a layer, 1 x 4 heads x 16384 x 16384" in line for line in rest)
    assert any("from the compiler" in line for line in rest)
    assert any(line.startswith("  1. model.remat=") for line in rest), done.stdout


def test_every_remat_policy_has_an_estimate():
    """An explanation must not fail itself."""
    config, *_ = abstract()
    kept = {}
    for remat in typing.get_args(typing.get_type_hints(ModelConfig)["remat"]):
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
        kept[remat] = sum(memory.activations(changed).values())
    assert len(set(kept.values())) == len(kept)


def test_errors_of_ours_are_not_taken_for_it():
    config, *_, like, _ = abstract()
    for error in (UserError("x"), RunError("out of memory on a CPU device")):
        assert explain_oom(error, config=config, state_or_abstract=like) is None
