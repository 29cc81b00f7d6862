"""Every mistake in a configuration is refused before anything is allocated, with both numbers and the fix."""

import copy
import importlib
from pathlib import Path

import pytest

from configs.common import base, parse_arg
from mixtral_jax.config import UserError, from_config_dict, key_list, resolve_mesh
from tests.helpers import tiny

CONFIGS = sorted(
    path.stem
    for path in (Path(__file__).parent.parent / "configs").glob("*.py")
    if path.stem not in ("__init__", "common")
)


def test_the_list_of_keys_is_frozen():
    """A new key costs every reader: add it here on purpose, with its line in configs/common.py. The budget is 90: SFT, DPO and LoRA took ten."""
    frozen = (Path(__file__).parent / "golden" / "config_keys.txt").read_text().split()
    assert key_list() == frozen
    assert len(frozen) <= 90


def test_base_has_every_key_and_no_other():
    assert [f"{group}.{key}" for group, keys in base().items() for key in keys] == sorted(key_list())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("arg", [None, "tiny"])
def test_every_config_is_valid_and_says_what_it_is(name, arg):
    module = importlib.import_module(f"configs.{name}")
    config = from_config_dict(module.get_config(arg))
    assert "train.py --config=configs/" in module.__doc__
    if arg == "tiny":
        resolve_mesh(config, 8)
        assert config.model.num_layers * config.model.d_model**2 < 1e5


MISTAKES = [
    ("model.num_expert", 8, ["unknown key model.num_expert", "model.num_experts"]),
    ("model.d_model", "512", ["model.d_model", "'512'", "int"]),
    ("model.d_model", 512.0, ["model.d_model", "512.0", "int"]),
    ("model.router_bias", 1, ["model.router_bias", "bool"]),
    ("model.remat", "some", ["model.remat", "some", "outputs"]),
    ("model.attention", "flash", ["model.attention", "flash", "chunked"]),
    ("model.num_heads", 30, ["30", "num_kv_heads=8", "24 or 32"]),
    ("model.experts_per_token", 9, ["9", "num_experts=8"]),
    ("model.head_dim", 127, ["127", "even"]),
    ("model.num_layers", 0, ["num_layers=0", "at least 1"]),
    ("train.seq_len", 65536, ["65536", "32768"]),
    ("train.accumulation_steps", 3, ["256", "3", "255 or 258"]),
    ("train.stage", "finetune", ["finetune", "pretrain"]),
    ("optim.name", "adam", ["adam", "adamw"]),
    ("optim.b2", 1.0, ["optim.b2=1.0", "[0, 1)"]),
    ("optim.schedule", "warmup_stable_decay", ["decay_steps=0"]),
    ("optim.warmup_steps", 2000, ["2000", "1000"]),
    ("loss.balance_weight", -0.1, ["-0.1", "negative"]),
    ("loss.bias_update_rate", 0.001, ["router_bias"]),
    ("data.source", "jsonl", ["data.path"]),
    ("data.heldout_fraction", 0.0, ["heldout_fraction=0.0"]),
    ("data.tokenizer", "", ["data.tokenizer", "mistral-v1"]),
    ("model.rope_theta", 0.0, ["rope_theta=0.0"]),
    ("optim.final_lr_ratio", 2.0, ["final_lr_ratio=2.0"]),
]


@pytest.mark.parametrize(("key", "value", "words"), MISTAKES, ids=[f"{key}={value}" for key, value, _ in MISTAKES])
def test_mistakes_are_explained(key, value, words):
    plain = copy.deepcopy(base().to_dict())
    group, name = key.split(".")
    plain[group][name] = value
    with pytest.raises(UserError) as error:
        from_config_dict(plain)
    for word in words:
        assert word in str(error.value)


def test_attention_that_does_not_fit_the_model_is_refused():
    for name, words in (("cudnn", r"model\.dtype=float32.*bfloat16"), ("splash", r"head_dim=8; .*128 wide")):
        with pytest.raises(UserError, match=words):
            tiny(model__attention=name)


def test_a_missing_key_is_named():
    plain = base().to_dict()
    del plain["optim"]["eps"]
    with pytest.raises(UserError, match=r"missing optim\.eps"):
        from_config_dict(plain)


MESHES = [
    (dict(mesh__fsdp=1, mesh__tensor=2, model__d_ff=47), 2, ["d_ff=47", "mesh.tensor=2", "46 or 48"]),
    (dict(mesh__fsdp=3), 8, ["3 devices", "8", "-1"]),
    (dict(mesh__fsdp=-1, mesh__expert=3), 8, ["multiple of 3", "8"]),
    (dict(mesh__fsdp=-1, mesh__data=-1), 8, ["mesh.data and mesh.fsdp"]),
    (dict(mesh__fsdp=0), 8, ["mesh.fsdp=0"]),
    (dict(mesh__fsdp=1, mesh__expert=6), 6, ["num_experts=8", "mesh.expert=6", "1, 2, 4, 8"]),
    (dict(mesh__fsdp=1, mesh__tensor=4), 4, ["num_kv_heads=2", "mesh.tensor=4", "1, 2"]),
    (dict(mesh__fsdp=3), 3, ["d_model=32", "mesh.fsdp=3", "30 or 33"]),
    (dict(mesh__fsdp=8, train__batch_size=12), 8, ["12", "8", "multiple of 8"]),
    (
        dict(mesh__fsdp=4, train__accumulation_steps=4),
        4,
        ["train.batch_size=8", "accumulation_steps=4", "multiple of 16"],
    ),
    (dict(mesh__context=4, train__seq_len=30), 4, ["seq_len=30", "2 * mesh.context = 8", "24 or 32"]),
    (
        dict(mesh__context=2, train__seq_len=64, model__attention="splash", model__head_dim=128),
        2,
        ["seq_len=64", "128 * 2 * mesh.context = 512", "to 512"],
    ),
    (
        dict(mesh__context=2, model__attention="cudnn", model__dtype="bfloat16"),
        2,
        ["cudnn", "mesh.context=2", "model.attention=chunked"],
    ),
    (dict(mesh__tensor=2, model__vocab_size=129, mesh__fsdp=1), 2, ["vocab_size=129", "2", "128 or 130"]),
]


@pytest.mark.parametrize(("changes", "devices", "words"), MESHES, ids=[str(changes) for changes, *_ in MESHES])
def test_impossible_meshes_are_explained(changes, devices, words):
    with pytest.raises(UserError) as error:
        resolve_mesh(tiny(**changes), devices)
    for word in words:
        assert word in str(error.value)


def test_the_mesh_fills_in_what_is_left():
    assert resolve_mesh(tiny(mesh__fsdp=-1, mesh__expert=2), 8).mesh.fsdp == 4


def test_config_arguments_are_typed():
    got = parse_arg("big,layers=3,rate=0.5,name=x", big=False, layers=1, rate=1.0, name="y")
    assert got.to_dict() == {"big": True, "layers": 3, "rate": 0.5, "name": "x"}
    for arg, word in (
        ("tinny", "tinny"),
        ("layers=x", "int"),
        ("tiny=maybe", "true or false"),
        ("tiny,layers=2", "alone"),
    ):
        with pytest.raises(ValueError, match=word):
            parse_arg(arg, tiny=False, layers=1)
