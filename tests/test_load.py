"""Weights by any name: a workdir, one of its steps, hf:DIR; and each process reads what its own devices hold."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from mixtral_jax.checkpoint import Checkpoints, DamagedError, sealed
from mixtral_jax.config import UserError
from mixtral_jax.convert import layout, restore
from mixtral_jax.convert.__main__ import main as convert
from mixtral_jax.convert.foreign import Foreign
from mixtral_jax.convert.shards import Shards
from mixtral_jax.convert.transfer import Transfer
from mixtral_jax.evals import text_perplexity
from mixtral_jax.evals.rolling import DocumentScore
from mixtral_jax.evals.run import open_subject
from mixtral_jax.evals.scorer import Request, Scorer, total
from mixtral_jax.evals.settings import Settings
from mixtral_jax.generate import generate
from mixtral_jax.generate.__main__ import main as generate_main
from mixtral_jax.load import load, restore_weights, stored_corpus, stored_tokenizer
from mixtral_jax.models import lora, mixtral
from mixtral_jax.models.decode import prefill
from mixtral_jax.resolve import Checkpoint, parse_step, resolve_checkpoint
from mixtral_jax.sharding import named_leaves, tree_shardings
from mixtral_jax.workdir import store_run
from tests.convert import sources
from tests.convert.test_broken import CASES
from tests.convert.test_merge import base_model, lora_run, shape_keys
from tests.convert.test_round_trip import mistral_directory
from tests.golden import reference
from tests.helpers import on_mesh, tiny

MESHES = [dict(), dict(expert=2, tensor=2), dict(data=2, fsdp=2)]


def abstract(shape: dict, dtype=None, **axes):
    """The model of a shape of reference.py on a mesh, abstract; `router_bias` and others may stand among the axes."""
    changes = {f"model__{key}": axes.pop(key) for key in ("router_bias", "rope_theta") if key in axes}
    overrides = {f"model__{key}": value for key, value in shape.items()} | changes
    config, mesh = on_mesh(tiny(**overrides), **axes)
    shapes = mixtral.abstract(config.model)
    return jax.tree.map(
        lambda s, at: jax.ShapeDtypeStruct(s.shape, dtype or s.dtype, sharding=at),
        shapes,
        tree_shardings(shapes, mesh, shapes),
    )


def assert_holds(model, want: dict[str, np.ndarray], like) -> None:
    for name, leaf in named_leaves(model).items():
        assert leaf.dtype == named_leaves(like)[name].dtype
        assert leaf.sharding == named_leaves(like)[name].sharding
        np.testing.assert_array_equal(leaf, want[name].astype(leaf.dtype), err_msg=name)


# Every dimension divides by 8 devices somewhere.
SHAPE = reference.BASE | dict(num_heads=8, num_kv_heads=4)


def source(folder: Path, kind: str, dtype: str = "float32") -> Path:
    """SHAPE's weights as a directory of Hugging Face's or of Mistral's."""
    weights = reference.weights(SHAPE)
    if kind == "mistral":
        return mistral_directory(folder, sources.mistral_tensors(weights, SHAPE), SHAPE)
    return sources.write(folder, sources.tensors(weights), sources.config_json(SHAPE), dtype=dtype)


@pytest.fixture
def bytes_read(monkeypatch) -> list[int]:
    """What is read from files: bytes of each read."""
    found, original = [], Shards.read

    def read(self, name, index):
        part = original(self, name, index)
        found.append(part.nbytes)
        return part

    monkeypatch.setattr(Shards, "read", read)
    return found


@pytest.mark.parametrize(
    ("kind", "axes"), [*(("huggingface", axes) for axes in MESHES), ("mistral", dict(tensor=2))], ids=str
)
def test_hf_weights_arrive_on_any_mesh_and_every_byte_is_read_once(tmp_path, monkeypatch, bytes_read, kind, axes):
    monkeypatch.setattr(layout, "BLOCK_BYTES", 700)  # the model is small: several blocks of each tensor
    folder, like, want = source(tmp_path / "hf", kind), abstract(SHAPE, **axes), reference.weights(SHAPE)
    mesh = named_leaves(like)["head_DV"].sharding.mesh
    with jax.set_mesh(mesh):  # as in a training run
        model = restore_weights(f"hf:{folder}", like)
        assert jax.sharding.get_abstract_mesh() == mesh.abstract_mesh
    assert_holds(model, want, like)
    # What is whole on several devices is read once, and what is cut is read in its parts.
    assert sum(bytes_read) == sum(a.nbytes for a in want.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_halves_become_exactly_what_is_asked_for(tmp_path, dtype):
    folder = source(tmp_path / "hf", "huggingface", dtype)
    kind = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    want = {name: a.astype(kind).astype(np.float32) for name, a in reference.weights(SHAPE).items()}
    like = abstract(SHAPE)
    assert_holds(restore_weights(f"hf:{folder}", like), want, like)
    like = abstract(SHAPE, dtype=ml_dtypes.bfloat16)
    assert_holds(restore_weights(f"hf:{folder}", like), want, like)


def test_only_the_parts_that_local_devices_hold_are_read(tmp_path, bytes_read, monkeypatch):
    folder, like = source(tmp_path / "hf", "huggingface"), abstract(SHAPE, expert=4, tensor=2)
    leaf = named_leaves(like)["layers.w_gate_EDF"]
    whole = restore._held(leaf)
    assert len(whole) == 8
    mine = {part: devices for part, devices in whole.items() if devices[0].id < 2}
    with Transfer("load", 1) as transfer:
        pieces = restore._fill(Foreign(folder), "layers.w_gate_EDF", leaf, mine, transfer)
    for piece, (part, devices) in zip(pieces, mine.items(), strict=True):
        index = tuple(slice(*bounds) for bounds in part)
        np.testing.assert_array_equal(piece, reference.weights(SHAPE)["layers.w_gate_EDF"][index])
        assert piece.devices() == set(devices)
    assert sum(bytes_read) == reference.weights(SHAPE)["layers.w_gate_EDF"].nbytes // 4


def test_a_shard_that_is_no_range_of_rows_and_columns_is_refused():
    size = layout.sizes(tiny().model)
    part = ((0, 2), (0, 32), (0, 4), (0, 4))  # half of each head
    with pytest.raises(ValueError, match="cut along H"):
        list(layout.shard_blocks("layers.w_q_DNH", "NH D", size, part))


def test_a_router_bias_that_files_do_not_have_is_zero(tmp_path, caplog):
    folder, like = source(tmp_path / "hf", "huggingface"), abstract(SHAPE, router_bias=True, expert=2)
    with caplog.at_level("INFO", "mixtral_jax"):
        model = restore_weights(f"hf:{folder}", like)
    want = reference.weights(SHAPE) | {"layers.router_bias_E": np.zeros((2, 4), np.float32)}
    assert_holds(model, want, like)
    assert "starts at zero" in caplog.text


def test_another_model_is_refused_with_names_and_numbers(tmp_path):
    folder = source(tmp_path / "hf", "huggingface")
    with pytest.raises(UserError, match=re.escape("experts.{e}.w1.weight): there (2, 4, 32, 48), here (2, 4, 32, 40)")):
        restore_weights(f"hf:{folder}", abstract(SHAPE | dict(d_ff=40)))
    assert convert(["import", f"--from={folder}", f"--to={tmp_path / 'run'}"]) == 0
    for spec in (f"hf:{folder}", tmp_path / "run"):
        with pytest.raises(UserError, match=r"model.rope_theta: there 1000000.0, here 10000.0"):
            restore_weights(spec, abstract(SHAPE, rope_theta=1e4))


def two_steps(workdir: Path, **overrides) -> Path:
    """A run with checkpoints 2 and 10 of SHAPE's weights, the later ones doubled."""
    config = tiny(**{f"model__{key}": value for key, value in SHAPE.items()}, **overrides)
    workdir.mkdir()
    store_run(workdir, config.to_dict())
    like = mixtral.abstract(config.model)
    leaves = [reference.weights(SHAPE)[name] for name in named_leaves(like)]
    checkpoints = Checkpoints(workdir, keep=2)
    for step, factor in ((2, 1), (10, 2)):
        model = jax.tree.unflatten(jax.tree.structure(like), [jax.numpy.asarray(factor * a) for a in leaves])
        checkpoints.save(
            step,
            model,
            {"count": jax.numpy.zeros(())},
            {"identity": {"corpus": f"text {step}"}, "heldout_loss": float(factor)},
        )
    checkpoints.close()
    return workdir


def test_a_run_is_named_by_its_workdir_or_a_folder_of_a_step(tmp_path):
    workdir, like = two_steps(tmp_path / "run"), abstract(SHAPE, fsdp=2, tensor=2, expert=2)
    want = reference.weights(SHAPE)
    assert resolve_checkpoint(workdir) == Checkpoint(workdir, 10)
    assert resolve_checkpoint(workdir, 2) == resolve_checkpoint(workdir / "checkpoints" / "2") == Checkpoint(workdir, 2)
    assert_holds(restore_weights(str(workdir / "checkpoints" / "2"), like), want, like)
    assert_holds(restore_weights(str(workdir), like), {name: 2 * a for name, a in want.items()}, like)
    assert resolve_checkpoint(workdir, parse_step("best")) == Checkpoint(workdir, 2), "the lowest held-out loss"
    assert parse_step("12") == 12
    with pytest.raises(UserError, match="--step=newest"):
        parse_step("newest")
    assert stored_corpus(resolve_checkpoint(workdir, 2)) == "text 2"
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["10", "2"]


@pytest.mark.parametrize("damage", ["truncated", "no metadata"])
def test_a_damaged_checkpoint_of_ours_is_explained(tmp_path, damage):
    workdir = two_steps(tmp_path / "run")
    params = workdir / "checkpoints" / "10" / "params"
    if damage == "truncated":
        largest = max((path for path in params.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:100])
    else:
        (params / "_METADATA").unlink()
    with pytest.raises(UserError, match=r"checkpoints/10.* is damaged or incomplete"):
        restore_weights(str(workdir), abstract(SHAPE))


def test_weights_that_are_not_what_was_saved_are_refused(tmp_path):
    """Whatever the disk did: here the metadata says so, because a flipped bit usually breaks the compression first."""
    workdir = two_steps(tmp_path / "run")
    path = workdir / "checkpoints" / "10" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    saved = meta["arrays"]["params"]["final_norm_D"]["fingerprint"]
    meta["arrays"]["params"]["final_norm_D"]["fingerprint"] = saved[::-1]
    path.write_text(json.dumps(sealed(meta)))
    with pytest.raises(DamagedError, match=r"step 10 is damaged: final_norm_D are not what was saved"):
        restore_weights(str(workdir), abstract(SHAPE))
    assert_holds(
        restore_weights(str(workdir), abstract(SHAPE, dtype="bfloat16")),
        {name: 2 * a for name, a in reference.weights(SHAPE).items()},
        abstract(SHAPE, dtype="bfloat16"),
    )


def test_load_takes_all_three_kinds(tmp_path):
    folder = source(tmp_path / "hf", "huggingface")
    assert convert(["import", f"--from={folder}", f"--to={tmp_path / 'run'}"]) == 0
    for spec in (f"hf:{folder}", str(tmp_path / "run"), str(tmp_path / "run" / "checkpoints" / "0")):
        config, model, mesh = load(spec, {"expert": 4, "tensor": 2})
        assert config.model.num_heads == 8
        assert config.loss.balance_weight == 0.04
        assert mesh.shape["expert"] == 4
        for name, want in reference.weights(SHAPE).items():
            np.testing.assert_array_equal(named_leaves(model)[name], want, err_msg=name)
        assert stored_corpus(resolve_checkpoint(spec)) is None


def test_the_tokenizer_lies_beside_the_weights_and_generation_takes_both(tmp_path, capsys):
    shape = SHAPE | dict(vocab_size=32000)
    folder = sources.write(tmp_path / "hf", sources.tensors(reference.weights(shape)), sources.config_json(shape))
    checkpoint = resolve_checkpoint(f"hf:{folder}")
    with pytest.raises(UserError, match=r"has no tokenizer.model"):
        stored_tokenizer(checkpoint)
    assert generate_main([f"--checkpoint={checkpoint}", "--prompt=Hello"]) == 2
    (folder / "tokenizer.model").write_bytes(sources.tokenizer_bytes(tmp_path / "v1"))
    tokenizer = stored_tokenizer(checkpoint)
    assert tokenizer.encode("Hello") == [22557]
    capsys.readouterr()
    assert generate_main([f"--checkpoint={checkpoint}", "--prompt=Hello", "--max_tokens=6", "--stacked"]) == 0
    config, model, mesh = load(checkpoint, {"fsdp": 8})
    assert config.data.tokenizer == "mistral-v1"
    with jax.set_mesh(mesh):
        (done,) = generate(model, tokenizer, ["Hello"], max_tokens=6)
    assert capsys.readouterr().out == f"Hello{done.text}\n"


def test_files_of_others_are_evaluated_in_modest_batches_and_nothing_is_said_of_their_training(tmp_path, monkeypatch):
    """The defaults of training are a cluster's: a million tokens in a batch; and name a text that others never saw."""
    shape = SHAPE | dict(vocab_size=32000)
    folder = sources.write(tmp_path / "hf", sources.tensors(reference.weights(shape)), sources.config_json(shape))
    (folder / "tokenizer.model").write_bytes(sources.tokenizer_bytes(tmp_path / "v1"))
    monkeypatch.setattr("mixtral_jax.evals.run.FOREIGN_TOKENS", 512)
    found, _ = open_subject(resolve_checkpoint(f"hf:{folder}"), Settings(text=("stdlib",), limit=1), None)
    assert found.scorer.rows(found.mesh, 64) * 64 == 512 * found.mesh.size
    monkeypatch.setattr(text_perplexity, "score_documents", lambda *_: [DocumentScore(2.0, 1, 1, 1)])
    assert "trained_on" not in dict(text_perplexity.perplexity(found))
    run = dataclasses.replace(found, own_text=True)
    assert "trained_on" in dict(text_perplexity.perplexity(run))


def test_names_that_mean_nothing_are_explained(tmp_path):
    folder, workdir = source(tmp_path / "hf", "huggingface"), two_steps(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    for spec, step, words in (
        (tmp_path / "none", None, "no directory"),
        (f"hf:{tmp_path / 'none'}", None, "no directory"),
        (tmp_path / "empty", None, r"no checkpoint \(there: none\)"),
        (f"hf:{tmp_path / 'empty'}", None, "holds no weights"),
        (f"hf:{workdir}", None, "named without it"),
        (folder, None, f"write hf:{folder}"),
        (f"hf:{folder}", 3, "has no steps"),
        (workdir, 3, r"no checkpoint of step 3 \(there: 2, 10\)"),
        (workdir / "checkpoints" / "2", 3, "leave one of them out"),
    ):
        with pytest.raises(UserError, match=words):
            resolve_checkpoint(spec, step)


@pytest.mark.parametrize("backend", ["megablox", "tokamax"])
def test_the_kernels_of_another_machine_are_left_there(tmp_path, backend):
    """A GPU refuses the TPU's, the GPU's need a package, and interpreting the TPU's on a CPU takes minutes."""
    kernels = dict(model__dtype="bfloat16", model__attention="cudnn", model__expert_backend=backend)
    workdir = two_steps(tmp_path / "run", **kernels)
    config, *_ = load(str(workdir), {"fsdp": 8})
    assert (config.model.attention, config.model.expert_backend) == ("auto", "auto")


def test_no_token_is_dropped_for_what_shares_its_batch(tmp_path):
    """A bounded buffer is for training: what a model gives for a text must not depend on batch and mesh."""
    bounded = dict(model__dispatch="ragged", model__buffer_factor=0.25, model__init_std=0.4)
    workdir = two_steps(tmp_path / "run", **bounded)
    tokens = np.random.default_rng(0).integers(4, 100, (8, 16), dtype=np.int32)
    losses = []
    for axes in ({"fsdp": 8}, {"expert": 4, "fsdp": 2}):
        config, model, mesh = load(str(workdir), axes)
        with jax.set_mesh(mesh):
            scorer = Scorer(config)
            losses.append([total(each)[0] for _, each in scorer(model, [Request(row[:1], row[1:]) for row in tokens])])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_matrices_come_in_the_dtype_that_decoding_multiplies_in(tmp_path):
    """A float32 checkpoint of a model that computes in bfloat16: half of the memory, and not a bit of the logits."""
    workdir = two_steps(tmp_path / "run", model__dtype="bfloat16")
    tokens, logits = np.asarray([[1, 5, 9, 3]], np.int32), {}
    for for_decoding in (False, True):
        _, model, _ = load(str(workdir), {"fsdp": 8}, for_decoding=for_decoding)
        for name, leaf in named_leaves(model).items():
            matrix = name not in ("layers.w_router_DE", "final_norm_D") and not name.endswith("norm_D")
            assert leaf.dtype == ("bfloat16" if matrix and for_decoding else "float32"), name
        here = jax.tree.map(np.asarray, model)
        logits[for_decoding] = np.asarray(prefill(here, tokens, np.full(1, 4, np.int32), 8)[0])
    np.testing.assert_array_equal(logits[True], logits[False])


def test_a_lora_run_is_loaded_merged_on_any_mesh(tmp_path):
    """In float32, from the base as it was frozen in bfloat16; what has no adapters is what the base stores."""
    folder = source(tmp_path / "hf", "huggingface")
    changes = dict(model__dtype="bfloat16")
    base = lora.freeze(base_model(tiny(**shape_keys(), **changes)))
    config, adapters = lora_run(tmp_path / "run", f"hf:{folder}", base, **changes)
    _, model, mesh = load(str(tmp_path / "run"), {"fsdp": 2, "expert": 2, "tensor": 2})
    assert dict(mesh.shape) == dict(data=1, fsdp=2, expert=2, context=1, tensor=2)
    want = named_leaves(lora.merge(base, adapters, mixtral.abstract(config.model)))
    held = named_leaves(model)
    for name, leaf in named_leaves(model).items():
        assert leaf.dtype == np.float32, name
        if "w_" in name:
            np.testing.assert_allclose(leaf, want[name], atol=1e-6 * np.abs(want[name]).max(), err_msg=name)
    np.testing.assert_array_equal(held["head_DV"], reference.weights(SHAPE)["head_DV"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_later_stage_starts_from_a_lora_runs_weights(tmp_path, dtype):
    """restore_weights is what train.init_from calls; here of a LoRA run whose base is a LoRA run, in two dtypes."""
    folder = source(tmp_path / "hf", "huggingface")
    config, first = lora_run(tmp_path / "first", f"hf:{folder}", base_model(tiny(**shape_keys())))
    once = lora.merge(base_model(config), first)
    _, second = lora_run(tmp_path / "second", str(tmp_path / "first"), once, seed=1, lora__targets=("experts",))
    want, like = named_leaves(lora.merge(once, second)), abstract(SHAPE, dtype=dtype, tensor=2)
    rounding = 2**-8 if dtype == "bfloat16" else 0
    for name, leaf in named_leaves(restore_weights(str(tmp_path / "second"), like)).items():
        assert (leaf.dtype, leaf.sharding) == (dtype, named_leaves(like)[name].sharding), name
        scale = np.abs(want[name]).max()
        np.testing.assert_allclose(leaf.astype(np.float32), want[name], rtol=rounding, atol=1e-6 * scale, err_msg=name)


def test_a_base_that_is_not_the_one_of_the_training_is_refused(tmp_path):
    folder = source(tmp_path / "hf", "huggingface")
    base = base_model(tiny(**shape_keys()))
    lora_run(tmp_path / "run", f"hf:{folder}", base)
    restore_weights(str(tmp_path / "run"), abstract(SHAPE))
    like = mixtral.abstract(tiny(**shape_keys()).model)
    other = [leaf * (1.01 if name == "layers.w_up_EDF" else 1) for name, leaf in named_leaves(base).items()]
    lora_run(tmp_path / "run", f"hf:{folder}", jax.tree.unflatten(jax.tree.structure(like), other), step=4)
    with pytest.raises(
        UserError, match=rf"step 4 holds adapters .* hf:{folder} has other weights now: layers.w_up_EDF\."
    ):
        restore_weights(str(tmp_path / "run"), abstract(SHAPE))
    restore_weights(str(tmp_path / "run" / "checkpoints" / "3"), abstract(SHAPE))
    folder.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=rf"train.init_from=hf:{folder} cannot be read: .* no directory"):
        load(str(tmp_path / "run"))


@pytest.mark.slow
def test_a_random_base_is_the_same_on_every_mesh(tmp_path):
    base = mixtral.init(tiny(**shape_keys(), model__max_seq_len=128).model, jax.random.key(7))
    _, adapters = lora_run(tmp_path / "run", "", base, train__seed=7)
    want = named_leaves(lora.merge(base, adapters))
    model = restore_weights(str(tmp_path / "run"), abstract(SHAPE, fsdp=2))
    for name, leaf in named_leaves(model).items():
        np.testing.assert_allclose(leaf, want[name], atol=1e-6 * np.abs(want[name]).max(), err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_broken_files_are_explained_when_they_are_loaded(tmp_path, case):
    damage, expected = CASES[case]
    folder = sources.mixtral(tmp_path / "hf")
    damage(folder)
    with pytest.raises(UserError) as error:
        load(f"hf:{folder}", {"fsdp": 8})
    for text in expected:
        assert text in str(error.value)


PROCESS = """
import sys
import jax, numpy as np
port, rank, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, rank, initialization_timeout=60)
from mixtral_jax.convert.shards import Shards
from mixtral_jax.generate import generate
from mixtral_jax.generate.__main__ import main as generate_main
from mixtral_jax.load import load
from mixtral_jax.sharding import named_leaves
from tests.golden import reference
from tests.test_load import SHAPE
read, original = {}, Shards.read
def counted(self, name, index):
    part = original(self, name, index)
    read[name] = read.get(name, 0) + part.nbytes
    return part
Shards.read = counted
_, model, mesh = load(f"hf:{folder}", {"expert": 4, "tensor": 2})
assert mesh.size == 8 and len(mesh.local_devices) == 4
for name, leaf in named_leaves(model).items():
    assert len(leaf.addressable_shards) == 4
    for shard in leaf.addressable_shards:
        np.testing.assert_array_equal(shard.data, reference.weights(SHAPE)[name][shard.index], err_msg=name)
experts = {int(name.split("experts.")[1].split(".")[0]) for name in read if "experts." in name}
print("experts", sorted(experts), "bytes", sum(read.values()))
"""


@pytest.mark.slow
def test_each_of_two_processes_reads_its_own_experts(tmp_path):
    folder = source(tmp_path / "hf", "huggingface")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(port), str(rank), str(folder)],
            env=environment,
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = []
    for process in both:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        said.append(out)
    assert "experts [0, 1]" in said[0]
    assert "experts [2, 3]" in said[1]
    weights = reference.weights(SHAPE)
    experts = sum(a.nbytes for name, a in weights.items() if "EDF" in name or "EFD" in name)
    for text in said:  # half of the experts, and of the rest no more than all
        assert int(text.split("bytes ")[1]) <= experts // 2 + sum(a.nbytes for a in weights.values()) - experts
