"""Generation: the cached path against full forwards, meshes against one device, batches against single rows, and transformers."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.checkpoint import Checkpoints
from mixtral_jax.config import UserError
from mixtral_jax.data.tokenizer import ByteTokenizer
from mixtral_jax.generate import Sampling, generate, sample
from mixtral_jax.generate.__main__ import main
from mixtral_jax.generate.engine import steps
from mixtral_jax.models import decode as decode_module
from mixtral_jax.models import lora, mixtral
from mixtral_jax.models.decode import _lies_ready, decode, prefill, prepare
from mixtral_jax.workdir import store_run
from tests.golden import reference
from tests.helpers import on_mesh, shard, tiny
from tests.test_parity import ours

LENGTHS = (5, 1, 11, 3, 8)  # a ragged batch
FORMS = {"stacked": lambda model: model, "prepared": prepare}


@jax.jit
def forward(model, tokens_BT):
    """The full forward pass of training, the oracle."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
    return model(tokens_BT, positions_BT, jnp.ones_like(tokens_BT))[0]


def full_logits(model, rows: list[list[int]], width: int) -> np.ndarray:
    """Logits [rows, width, V]; those after a row's end mean nothing."""
    padded = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return np.asarray(forward(model, padded))


@functools.cache
def parity_model(name: str):
    config, model, _ = ours(name)
    return config, jax.tree.map(jnp.asarray, model)


@functools.cache
def byte_model():
    """Random weights with the byte tokenizer's vocabulary (and more ids than it has), for text."""
    config = tiny(model__vocab_size=264, model__max_seq_len=128, model__init_std=0.3)
    return config, mixtral.init(config.model, jax.random.key(1))


def random_rows(vocab_size: int, lengths=LENGTHS, seed=0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, n).tolist() for n in lengths]


def greedy(weights, rows, n: int, vocab_size: int) -> list[list[int]]:
    """Greedy tokens of all rows through the loop that `generate` uses."""
    active = np.ones(len(rows), bool)
    made = steps(weights, rows, active, max_tokens=n, sampling=Sampling(), seed=0, vocab_size=vocab_size)
    return np.stack(list(made), axis=1).tolist()


FORMS_HERE = FORMS | {"picked": lambda model: prepare(model, stacked=True)}  # on one device


# 2 rows go through the prepared experts one by one, 5 are grouped (kernels/separate.py:FEW_ROWS).
@pytest.mark.parametrize(("form", "rows"), [("stacked", 5), ("prepared", 5), ("prepared", 2), ("picked", 2)])
@pytest.mark.parametrize("name", ["mixtral", "window_top3"])
def test_cached_logits_equal_the_full_forward_at_every_step(name, form, rows):
    config, model = parity_model(name)
    n, width = 12, 24
    start = np.asarray(LENGTHS[:rows], np.int32)
    texts = random_rows(config.model.vocab_size, (width,) * rows)
    want = full_logits(model, texts, width)
    tokens = np.full((rows, 11), 7, np.int32)  # whatever pads a prompt changes nothing
    for row, text in enumerate(texts):
        tokens[row, : start[row]] = text[: start[row]]
    weights = FORMS_HERE[form](model)
    logits, cache = prefill(weights, tokens, start, width)
    for i in range(n + 1):
        at = start + i
        np.testing.assert_allclose(logits, want[np.arange(rows), at - 1], rtol=0, atol=1e-5, err_msg=f"step {i}")
        if i < n:
            token = np.asarray([text[p] for text, p in zip(texts, at, strict=True)], np.int32)
            logits, cache = decode(weights, cache, token, np.ones(rows, bool))
    assert name != "window_top3" or config.model.sliding_window < width, "the window must have something to hide"


# 3 rows are multiplied by Eigen; 9 rows, or more than 1,024 positions, by XLA's own choice (models/decode.py:EIGEN_ROWS).
@pytest.mark.parametrize(
    ("together", "rows", "size"),
    [((1, 9), 3, 10), ((2, 9), 3, 10), ((4, 9), 3, 10), ((8, 9), 3, 10), ((9, 2), 9, 10), ((4, 9), 3, 1025)],
)
def test_decoding_some_layers_at_a_time_equals_the_full_forward(monkeypatch, together, rows, size):
    """5 layers, in programs of so many; the last has fewer. Keys and values are overwritten where they are, without a copy."""
    monkeypatch.setattr("mixtral_jax.models.decode.LAYERS_TOGETHER", together)
    config = tiny(model__num_layers=5)
    model = mixtral.init(config.model, jax.random.key(0))
    texts = random_rows(config.model.vocab_size, (10,) * rows)
    want, prepared = full_logits(model, texts, 10), prepare(model)
    _, cache = prefill(prepared, np.asarray(texts, np.int32)[:, :6], np.full(rows, 6, np.int32), size)
    calls = []
    for name in ("_layers_by_eigen", "_layers_by_default"):
        by = getattr(decode_module, name)
        monkeypatch.setattr(
            decode_module, name, lambda blocks, *rest, by=by: calls.append(len(blocks)) or by(blocks, *rest)
        )
    for at in range(6, 10):
        held = cache
        logits, cache = decode(prepared, held, np.asarray(texts, np.int32)[:, at], np.ones(rows, bool))
        np.testing.assert_allclose(logits, want[:, at], rtol=0, atol=1e-5)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(held.keys_values))
    assert [len(part) for part in cache.keys_values] == [5, 5]
    assert max(calls) == min(together[rows > decode_module.EIGEN_ROWS], 5)
    assert sum(calls) == 4 * 5


def test_a_step_does_not_copy_the_cache():
    """XLA:CPU turns a cache that has its axes in another order than the products, whole, at every step."""
    config = tiny()
    prepared = prepare(mixtral.init(config.model, jax.random.key(0)))
    rows, size, g, h = 3, 37, config.model.num_kv_heads, config.model.head_dim
    _, cache = prefill(prepared, np.ones((rows, 8), np.int32), np.full(rows, 8, np.int32), size)
    step = decode_module._decode_at_once.lower(prepared, cache, np.ones(rows, np.int32), np.ones(rows, bool)).compile()
    made = re.findall(rf"%(\S*) = f32\[{rows},{g},(?:{size},{h}|{h},{size})\]", step.as_text())
    assert made
    assert not [name for name in made if "copy" in name or "transpose" in name]


def test_decoding_inside_a_callers_jit_is_part_of_its_program():
    """Where parts with options of their own for the compiler cannot be; jax refuses those in a trace."""
    config = tiny()
    prepared = prepare(mixtral.init(config.model, jax.random.key(0)))
    texts = np.asarray(random_rows(config.model.vocab_size, (8,) * 3), np.int32)
    _, cache = prefill(prepared, texts[:, :7], np.full(3, 7, np.int32), 8)
    inside, _ = jax.jit(decode)(prepared, cache, texts[:, 7], np.ones(3, bool))
    outside, _ = decode(prepared, cache, texts[:, 7], np.ones(3, bool))
    np.testing.assert_allclose(inside, outside, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_greedy_equals_an_argmax_loop_over_full_forwards(form):
    config, model = parity_model("wide_heads")
    v = config.model.vocab_size
    rows = random_rows(v)
    longer = [list(row) for row in rows]
    for _ in range(20):
        logits = full_logits(model, longer, 32)
        for i, row in enumerate(longer):
            row.append(int(logits[i, len(row) - 1].argmax()))
    got = greedy(FORMS[form](model), rows, 20, v)
    assert got == [row[-20:] for row in longer]
    assert len({token for row in got for token in row}) > 10, "one token again and again proves little"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("axes", [dict(expert=4, tensor=2), dict(fsdp=4, expert=2)], ids=str)
def test_the_text_does_not_depend_on_the_mesh(axes, form):
    config, model = byte_model()
    prompts = ["the same text", "on", "any mesh, with five prompts", "for a batch", "that does not divide"]
    settings = dict(max_tokens=24, seed=3, sampling=Sampling(temperature=0.7, top_p=0.95))
    want = generate(model, ByteTokenizer(), prompts, **settings)
    config, mesh = on_mesh(config, **axes)
    with jax.set_mesh(mesh):
        got = generate(FORMS[form](shard(model, mesh)), ByteTokenizer(), prompts, **settings)
    assert got == want


def sixty_fours(**overrides):
    """A model whose parts all begin at multiples of 64 bytes, as real ones do; XLA copies what does not."""
    config = tiny(**overrides)
    return mixtral.init(config.model, jax.random.key(0))


def test_on_one_cpu_the_prepared_weights_are_the_models_own_memory(monkeypatch):
    model = sixty_fours()
    views = prepare(model)
    first, second = (views.slots[1][e][0].unsafe_buffer_pointer() for e in (0, 1))
    whole = model.layers.w_gate_EDF[...]
    at = whole.unsafe_buffer_pointer()
    assert at <= first < second < at + whole.nbytes
    assert views.blocks[1].w_q_DNH[...].unsafe_buffer_pointer() != views.blocks[0].w_q_DNH[...].unsafe_buffer_pointer()
    monkeypatch.setattr("mixtral_jax.models.decode._lies_ready", lambda layers: False)
    copies = prepare(model)
    assert jax.tree.structure(views) == jax.tree.structure(copies)
    jax.tree.map(np.testing.assert_array_equal, views, copies)
    assert not at <= copies.slots[1][0][0].unsafe_buffer_pointer() < at + whole.nbytes


def test_prepared_weights_outlive_their_model():
    """A training step donates the parameters: what was prepared out of them must not change under it."""
    model = sixty_fours()
    views = prepare(model)
    want = jax.tree.map(np.array, views.slots)
    model = jax.jit(lambda model: jax.tree.map(lambda a: a + 1, model), donate_argnums=0)(model)
    jax.tree.map(np.testing.assert_array_equal, views.slots, want)
    again = jax.jit(lambda model: jax.tree.map(lambda a: a + 1, model), donate_argnums=0)(model)
    assert model.layers.w_gate_EDF[...].is_deleted(), "and without views it is donated as ever"
    del again, model
    jax.tree.map(np.testing.assert_array_equal, views.slots, want)


@pytest.mark.parametrize(
    ("overrides", "ready"), [({}, True), (dict(model__dtype="bfloat16"), False), (dict(lora__rank=2), False)]
)
def test_views_are_for_what_needs_no_cast_and_no_merging(overrides, ready):
    config = tiny(**overrides)
    model = mixtral.init(config.model, jax.random.key(0))
    if config.lora.rank:
        model = lora.attach(model, lora.init(config.model, config.lora, jax.random.key(1)))
    assert _lies_ready(model.layers) == ready


def test_stacked_experts_are_for_one_device():
    config, model = byte_model()
    config, mesh = on_mesh(config, expert=2)
    with jax.set_mesh(mesh), pytest.raises(UserError, match=r"one device and the mesh has 2"):
        prepare(shard(model, mesh), stacked=True)


def test_prepared_experts_lie_on_the_devices_that_use_them():
    config, model = byte_model()
    config, mesh = on_mesh(config, expert=4, tensor=2)
    with jax.set_mesh(mesh):
        weights = prepare(shard(model, mesh))
    c = config.model
    assert len(weights.slots) == c.num_layers
    assert len(weights.slots[0]) == c.num_experts // 4
    for w in weights.slots[0][0]:
        assert w.addressable_shards[0].data.size == c.d_model * c.d_ff // 2
    # Global expert s * E/n + i is slot i of shard s.
    slots = [np.asarray(slot[2]) for slot in weights.slots[1]]
    for e in range(c.num_experts):
        shard_, i = divmod(e, c.num_experts // 4)
        np.testing.assert_array_equal(slots[i][shard_], model.layers.w_down_EFD[...][1, e])


def test_an_inactive_row_goes_to_no_expert_and_stays_where_it_is():
    config, model = parity_model("mixtral")
    rows = random_rows(config.model.vocab_size, (4, 4))
    _, cache = prefill(model, np.asarray(rows, np.int32), np.full(2, 4, np.int32), 8)
    _, cache = decode(model, cache, np.zeros(2, np.int32), np.asarray([True, False]))
    assert cache.length_B.tolist() == [5, 4]


def test_bfloat16_follows_its_own_full_forward():
    config = tiny(model__dtype="bfloat16", model__init_std=0.3)
    model = mixtral.init(config.model, jax.random.key(0))
    (row,) = random_rows(config.model.vocab_size, (12,))
    (want,) = full_logits(model, [row], 12)
    weights = prepare(model)
    logits, cache = prefill(weights, np.asarray([row[:6]], np.int32), np.asarray([6], np.int32), 12)
    assert cache.keys_values[0][0].dtype == jnp.bfloat16
    for i in range(6, 12):
        # Two roundings of bfloat16 (2^-8 each), on the scale of the logits.
        np.testing.assert_allclose(logits[0], want[i - 1], atol=2**-6 * np.abs(want).max())
        logits, cache = decode(weights, cache, np.asarray([row[i]], np.int32), np.ones(1, bool))


@pytest.mark.slow
def test_decoding_equals_the_full_forward_at_real_width():
    """One layer of 4 experts, 4096 x 14336: prefill, then row by row (2 rows) and grouped (5), against the forward pass of training.

    Tolerance: sums over 14,336 products in float32 differ by the order of their terms.
    """
    wide = dict(d_model=4096, num_heads=32, num_kv_heads=8, head_dim=128, d_ff=14336, num_experts=4, num_layers=1)
    config = tiny(model__vocab_size=512, **{f"model__{name}": value for name, value in wide.items()})
    rng = np.random.default_rng(0)

    def weight(path, like):
        if "norm" in jax.tree_util.keystr(path):
            return jnp.ones(like.shape)
        return jnp.asarray(rng.standard_normal(like.shape, np.float32) * np.float32(0.02))

    model = jax.tree_util.tree_map_with_path(weight, mixtral.abstract(config.model))
    prepared = prepare(model)
    for rows in (2, 5):
        texts = random_rows(512, (10,) * rows, seed=rows)
        want = full_logits(model, texts, 10)
        start = np.asarray([7, 5, 6, 7, 4][:rows], np.int32)
        logits, cache = prefill(prepared, np.asarray(texts, np.int32)[:, :7], start, 10)
        for i in range(3):
            error = np.abs(logits - want[np.arange(rows), start + i - 1]).max()
            assert error < 1e-4 * np.abs(want).max(), (rows, i)
            token = np.asarray([text[at + i] for text, at in zip(texts, start, strict=True)], np.int32)
            logits, cache = decode(prepared, cache, token, np.ones(rows, bool))


def test_a_row_alone_equals_the_row_in_a_batch():
    _, model = byte_model()
    prompts = ["alone", "or together with others of other lengths", "alone"]
    settings = dict(max_tokens=20, seed=5, sampling=Sampling(temperature=1.0, top_k=50))
    together = generate(model, ByteTokenizer(), prompts, **settings)
    (alone,) = generate(model, ByteTokenizer(), prompts[:1], **settings)
    assert together[0] == alone
    assert together[2] != alone, "the same prompt twice is two samples"
    settings["seed"] = 6
    assert generate(model, ByteTokenizer(), prompts[:1], **settings) != [alone]


def test_samples_of_training_keep_the_end_of_a_long_prompt():
    _, model = byte_model()
    prompt = "x" * 500 + "the end"
    text = sample(model, ByteTokenizer(), [prompt], max_tokens=8, temperature=0.0, seed=0)
    again = sample(model, ByteTokenizer(), [prompt[100:]], max_tokens=8, temperature=0.0, seed=0)
    assert text == again


def test_the_command_continues_prompts_of_a_stored_run(tmp_path, capsys):
    config, model = byte_model()
    store_run(tmp_path, config.to_dict())
    ByteTokenizer().save(tmp_path / "tokenizer")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, model, {"count": jnp.zeros(())}, {})
    checkpoints.close()
    command = [f"--checkpoint={tmp_path}", "--prompt=def ", "--prompt=x", "--max_tokens=6", "--mesh=expert=2,fsdp=-1"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    want = generate(model, ByteTokenizer(), ["def ", "x"], max_tokens=6)
    assert out == f"def {want[0].text}\n{'-' * 40}\nx{want[1].text}\n"
    assert "step 3" in err
    assert "tokens/s" in err
    for wrong, words in (
        ("--top_p=0", "top_p=0"),
        ("--mesh=experts=2", "axes are"),
        ("--mesh=expert=--2", "'expert=--2' is no AXIS=SIZE"),
        ("--seed=99999999999999999999", "--seed=99999999999999999999 must lie between"),
        ("--seed=-1", "--seed=-1 must lie between"),
        ("--step=4", "there: 3"),
        ("--max_tokens=999", "max_seq_len=128"),
        ("--num_samples=2", "temperature"),
    ):
        assert main([*command, wrong]) == 2
        assert words in capsys.readouterr().err


def transformers_generate(name: str, rows: list[list[int]], n: int):
    """Greedy tokens and each step's logits of transformers, for a batch padded on the left (its convention)."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.golden.make_goldens import build

    model = build(reference.LIVE[name]).eval()
    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    out = model.generate(
        input_ids=tokens,
        attention_mask=mask,
        max_new_tokens=n,
        min_new_tokens=n,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, width:].tolist(), torch.stack(out.logits, dim=1).numpy()


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "lengths"), [*((name, LENGTHS) for name in reference.LIVE), *((name, (9,)) for name in reference.SHAPES)]
)
@pytest.mark.filterwarnings("default")
def test_greedy_equals_transformers_generate(name, lengths):
    n = 256
    config, model = parity_model(name)
    rows = random_rows(config.model.vocab_size, lengths, seed=4)
    want, logits = transformers_generate(name, rows, n)
    got = greedy(prepare(model), rows, n, config.model.vocab_size)
    same = 0
    for row, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        differ = [i for i in range(n) if mine[i] != theirs[i]]
        same += differ[0] if differ else n
        if differ:
            i = differ[0]
            margin = abs(float(logits[row, i, theirs[i]] - logits[row, i, mine[i]]))
            print(f"row {row} parts at token {i}: {mine[i]} against {theirs[i]}, logits {margin:.1e} apart")
            assert margin <= 1e-5
    different = len(set(np.ravel(want)))
    print(f"{name}: {same} of {n * len(rows)} tokens alike, {different} different ones")
    assert different > 10, "one token again and again proves little"
