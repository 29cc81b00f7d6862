"""A Mixtral made of a dense model: copies without noise compute what the dense model does."""

import json

import jax
import numpy as np
import pytest

from mixtral_jax.convert.__main__ import main
from mixtral_jax.models.attention import Places, visible
from mixtral_jax.models.layers import apply_rope, rms_norm, rope_table
from mixtral_jax.sharding import named_leaves
from tests.convert import sources
from tests.convert.test_round_trip import restore
from tests.golden import reference

SHAPE = reference.BASE


def upcycled(source, target, *rest):
    assert main(["upcycle", f"--from={source}", f"--to={target}", "--experts=4", *rest]) == 0
    return restore(target)[1]


def dense_logits(t: dict, tokens: np.ndarray) -> np.ndarray:
    """The dense model, straight from its file's tensors: one FFN, no router. float32 [B, T, V]."""
    b, length = tokens.shape
    n, g, h = SHAPE["num_heads"], SHAPE["num_kv_heads"], SHAPE["head_dim"]
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    rope = rope_table(positions, h, SHAPE["rope_theta"])
    places = Places(np.ones_like(tokens), positions, positions[0])
    seen = np.asarray(visible(places, places, 0))
    x = t["model.embed_tokens.weight"][tokens]
    for i in range(SHAPE["num_layers"]):
        w = {name.removeprefix(f"model.layers.{i}."): a for name, a in t.items()}
        y = rms_norm(x, w["input_layernorm.weight"], 1e-5)
        q, k, v = (
            (y @ w[f"self_attn.{c}_proj.weight"].T).reshape(b, length, count, h) for c, count in zip("qkv", (n, g, g))
        )
        q, k = np.asarray(apply_rope(q, *rope)), np.asarray(apply_rope(k, *rope))
        k, v = (np.repeat(np.asarray(a), n // g, axis=2) for a in (k, v))
        scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(h)
        probabilities = jax.nn.softmax(np.where(seen[:, None], scores, -1e30), axis=-1)
        out = np.einsum("bnts,bsnh->btnh", probabilities, v).reshape(b, length, n * h)
        x = x + out @ w["self_attn.o_proj.weight"].T
        y = rms_norm(x, w["post_attention_layernorm.weight"], 1e-5)
        hidden = jax.nn.silu(y @ w["mlp.gate_proj.weight"].T) * (y @ w["mlp.up_proj.weight"].T)
        x = x + hidden @ w["mlp.down_proj.weight"].T
    return np.asarray(rms_norm(x, t["model.norm.weight"], 1e-5) @ t["lm_head.weight"].T)


def our_logits(model) -> np.ndarray:
    tokens = reference.batch(SHAPE)["tokens"]
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return np.asarray(jax.jit(lambda m: m(tokens, positions, np.ones_like(tokens))[0])(model))


@pytest.mark.parametrize("kind", ["mistral", "llama"])
def test_without_noise_the_logits_are_the_dense_models(tmp_path, kind):
    source, arrays, _ = sources.dense(tmp_path / "dense", kind)
    model = upcycled(source, tmp_path / "run")
    want = dense_logits(arrays, reference.batch(SHAPE)["tokens"])
    np.testing.assert_allclose(our_logits(model), want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_noise_makes_experts_differ_and_seeds_repeat(tmp_path):
    source, arrays, _ = sources.dense(tmp_path / "dense")
    names = ("layers.w_gate_EDF", "layers.w_router_DE")
    runs = []
    for k, seed in enumerate((0, 0, 1)):
        leaves = named_leaves(upcycled(source, tmp_path / f"run{k}", "--noise=0.1", f"--seed={seed}"))
        runs.append({name: np.asarray(leaves[name]) for name in names})
    first, second, third = runs
    gate = first["layers.w_gate_EDF"]
    copy = arrays["model.layers.0.mlp.gate_proj.weight"].T
    for e in range(4):
        assert 0.09 < (gate[0, e] - copy).std() / copy.std() < 0.11
    assert not np.array_equal(gate[0, 0], gate[0, 1])
    assert 0.01 < first["layers.w_router_DE"].std() < 0.03
    for n in names:
        np.testing.assert_array_equal(first[n], second[n])
        assert not np.array_equal(first[n], third[n])


def test_a_tied_head_is_the_embedding(tmp_path):
    source, arrays, config = sources.dense(tmp_path / "dense", "llama")
    del arrays["lm_head.weight"]
    source = sources.write(tmp_path / "tied", arrays, config | {"tie_word_embeddings": True}, shards=1)
    leaves = named_leaves(upcycled(source, tmp_path / "run"))
    np.testing.assert_array_equal(leaves["head_DV"], arrays["model.embed_tokens.weight"].T)


def test_the_rope_frequencies_of_old_llama_files_are_no_weights(tmp_path):
    source, arrays, config = sources.dense(tmp_path / "dense", "llama")
    want = our_logits(upcycled(source, tmp_path / "run"))
    old = arrays | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(2)}
    source = sources.write(tmp_path / "old", old, config, shards=2)
    np.testing.assert_array_equal(our_logits(upcycled(source, tmp_path / "again")), want)


def test_mistakes_are_explained(tmp_path, capsys):
    source, _, _ = sources.dense(tmp_path / "dense")
    for arguments, text in (
        (["--experts_per_token=9"], "--experts_per_token=9"),
        (["--noise=-1"], "--noise=-1"),
        (["--router_std=0"], "--router_std=0"),
    ):
        assert main(["upcycle", f"--from={source}", f"--to={tmp_path / 'run'}", *arguments]) == 2
        assert text in capsys.readouterr().err
    mixtral = sources.mixtral(tmp_path / "mixtral")
    assert main(["upcycle", f"--from=hf:{mixtral}", f"--to={tmp_path / 'run'}"]) == 2
    assert "upcycle reads mistral and llama" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["mistral", "llama"])
def test_the_logits_are_those_of_transformers_dense_model(tmp_path, kind):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    source, _, _ = sources.dense(tmp_path / "dense", kind)
    config = json.loads((source / "config.json").read_text())
    names = {"mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}
    (source / "config.json").write_text(json.dumps(config | {"architectures": [names[kind]]}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    with torch.no_grad():
        want = theirs(torch.tensor(reference.batch(SHAPE)["tokens"]).long()).logits.numpy()
    got = our_logits(upcycled(source, tmp_path / "run"))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
