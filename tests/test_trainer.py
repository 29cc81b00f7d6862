"""The train step and the loop: what must not change a result does not, and what must stop an update stops it."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from mixtral_jax import evals, trainer
from mixtral_jax import run as run_module
from mixtral_jax.config import UserError
from mixtral_jax.data import Batches, TokenFile, is_heldout, pack
from mixtral_jax.jsonl import read_jsonl
from mixtral_jax.losses import Totals
from mixtral_jax.models import mixtral
from mixtral_jax.optim import make_optimizer
from mixtral_jax.sharding import named_leaves
from mixtral_jax.stages import STAGES
from mixtral_jax.step import TrainState, make_train_step
from mixtral_jax.trainer import NonFiniteError
from tests.helpers import assert_trees_close, gradients, on_mesh, random_batch, tiny, train
from tests.processes import CLOCK

STEPS = 20


def run(batches=None, **overrides):
    config, mesh = on_mesh(tiny(train__steps=STEPS, **overrides))
    return train(config, mesh, batches or [random_batch(config, seed) for seed in range(STEPS)])


@functools.cache
def plain():
    return run()


def assert_same_run(got, want, skip=()):
    (state, log), (want_state, want_log) = got, want
    for step, (a, b) in enumerate(zip(log, want_log, strict=True)):
        for name in {"loss", "token_loss", "z_loss", "router_z_loss", "balance_loss", "gradient_norm"} - set(skip):
            assert a[name] == pytest.approx(b[name], rel=1e-5), f"step {step}: {name}"
    assert_trees_close(state.params, want_state.params, 1e-4)


VARIANTS = {
    "unrolled": dict(model__scan_layers=False),
    "remat_full": dict(model__remat="full"),
    "remat_outputs": dict(model__remat="outputs"),
    "remat_dots": dict(model__remat="dots"),
    "unrolled_remat": dict(model__scan_layers=False, model__remat="full"),
    "dense": dict(model__expert_backend="dense"),
}


@functools.cache
def plain_gradients():
    config, mesh = on_mesh(tiny())
    params = mixtral.init(config.model, jax.random.key(2))
    return params, gradients(config, mesh, params, random_batch(config))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_way_to_compute_has_the_same_gradients(changes):
    """Leaf by leaf to 1e-5 of each leaf's scale; the runs below compare 20 steps."""
    _, ((want, _), want_grads) = plain_gradients()
    config, mesh = on_mesh(tiny(**changes))
    other = mixtral.init(config.model, jax.random.key(2))
    (got, _), grads = gradients(config, mesh, other, random_batch(config))
    assert got == pytest.approx(want, rel=1e-5)
    # The trees differ in the configuration they carry: compare by name.
    assert_trees_close(named_leaves(grads), named_leaves(want_grads), 1e-5)


@pytest.mark.slow
def test_unrolled_layers_equal_scanned_layers():
    assert_same_run(run(model__scan_layers=False), plain())


@pytest.mark.parametrize(
    "policy", ["full", *(pytest.param(name, marks=pytest.mark.slow) for name in ("outputs", "dots"))]
)
def test_remat_changes_nothing(policy):
    assert_same_run(run(model__remat=policy), plain())


def test_blocks_equal_dense_over_training():
    assert_same_run(run(model__expert_backend="dense"), plain())


def test_four_accumulation_steps_equal_one():
    """Every term but the balance loss is linear in the batch; that one is nonlinear by nature, so it is off here."""
    one = run(loss__balance_weight=0.0)
    four = run(loss__balance_weight=0.0, train__accumulation_steps=4)
    assert_same_run(four, one, skip=["balance_loss"])
    for a, b in zip(four[1], one[1], strict=True):
        np.testing.assert_allclose(a["load_LE"], b["load_LE"], atol=1e-6)


@pytest.mark.slow
def test_four_accumulation_steps_equal_one_with_balance_when_micro_batches_are_alike():
    """Rows 4i to 4i + 3 are equal, so that each of the 4 micro-batches has the balance of the whole batch."""
    batches = []
    for seed in range(STEPS):
        batch = random_batch(tiny(), seed)
        batches.append({name: np.repeat(value[::4], 4, axis=0) for name, value in batch.items()})
    assert_same_run(run(batches, train__accumulation_steps=4), run(batches))


def test_balance_under_accumulation_is_the_token_weighted_mean_of_the_micro_batches():
    config, mesh = on_mesh(tiny(train__accumulation_steps=4))
    batch = random_batch(config)
    _, log = train(config, mesh, [batch])
    model = mixtral.init(config.model, jax.random.key(config.train.seed))
    values, tokens = [], []
    loss = jax.jit(lambda micro: STAGES["pretrain"].loss(model, micro, Totals.of(micro), config))
    for j in range(4):
        _, (terms, stats) = loss({name: value[j::4] for name, value in batch.items()})
        values.append(float(terms["balance_loss"]))
        tokens.append(float(stats.tokens[0]))
    assert len(set(np.round(values, 4))) > 1
    assert log[0]["balance_loss"] == pytest.approx(np.average(values, weights=tokens), rel=1e-5)


def documents(count=60, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 30, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = rng.integers(0, 128, offsets[-1]).astype(np.int32)
    return TokenFile(tokens, offsets, lengths * 3, [f"doc{i}" for i in range(count)])


def test_packed_rows_equal_one_document_per_row():
    """The same documents, packed or alone: the same losses (by total), router statistics and gradients."""
    file = documents()
    results = []
    for one_per_row in (False, True):
        plan = pack(file.lengths, 32, one_per_row=one_per_row)
        batch = Batches(file, plan, batch_size=plan.n_rows, seq_len=32, seed=0, shuffle=False).batch(0)
        assert (batch["segment_ids_BT"].max() > 1) is not one_per_row
        batch = {name: value for name, value in batch.items() if name != "documents"}
        config = tiny(train__batch_size=plan.n_rows)
        model = mixtral.init(config.model, jax.random.key(0))

        def loss(model, config=config, batch=batch):
            return STAGES["pretrain"].loss(model, batch, Totals.of(batch), config)

        results.append(jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(model)))
    ((packed, (terms, stats)), grads), ((alone, (want_terms, want_stats)), want_grads) = results
    assert packed == pytest.approx(alone, rel=1e-5)
    for name in terms:
        assert terms[name] == pytest.approx(want_terms[name], rel=1e-5), name
    np.testing.assert_array_equal(stats.count_E, want_stats.count_E)
    assert_trees_close(grads, want_grads, 1e-5)


def test_padding_changes_nothing():
    """More padding, rows and columns of it, filled with anything: no loss, metric or gradient moves."""
    config = tiny()
    batch = random_batch(config)
    wide = {name: np.pad(value, ((0, 3), (0, 9))) for name, value in batch.items()}
    pad = wide["segment_ids_BT"] == 0
    for name in ("tokens_BT", "targets_BT"):
        wide[name][pad] = 77
    model = mixtral.init(config.model, jax.random.key(0))

    def loss(model, batch):
        return STAGES["pretrain"].loss(model, batch, Totals.of(batch), config)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (got, (terms, stats)), grads = jax.device_get(step(model, wide))
    (want, (want_terms, want_stats)), want_grads = jax.device_get(step(model, batch))
    assert got == pytest.approx(want, rel=1e-6)
    for name in terms:
        assert terms[name] == pytest.approx(want_terms[name], rel=1e-6), name
    for got, want in zip(stats, want_stats, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    assert_trees_close(grads, want_grads, 1e-5)


def test_same_seed_twice_is_bitwise_equal():
    again, _ = run()
    state, _ = plain()
    for name, leaf in named_leaves(again).items():
        np.testing.assert_array_equal(leaf, named_leaves(state)[name], err_msg=name)


def test_a_non_finite_step_changes_nothing_and_stops_all_later_ones():
    config, mesh = on_mesh(tiny(train__steps=STEPS))
    batches = [random_batch(config, seed) for seed in range(4)]
    good, _ = train(config, mesh, batches[:2])
    batches[2]["loss_weights_BT"][0, 0] = np.inf
    state, log = train(config, mesh, batches)
    assert [bool(metrics["halted"]) for metrics in log] == [False, False, True, True]
    assert state.step == good.step == 2
    for tree, want in ((state.params, good.params), (state.opt_state, good.opt_state)):
        for name, leaf in named_leaves(tree).items():
            np.testing.assert_array_equal(leaf, named_leaves(want)[name], err_msg=name)


def test_a_batch_without_trained_tokens_has_loss_zero_and_finite_gradients():
    config, mesh = on_mesh(tiny())
    batch = {name: np.zeros_like(value) for name, value in random_batch(config).items()}
    _, log = train(config, mesh, [batch])
    assert log[0]["token_loss"] == 0
    assert log[0]["gradient_norm"] == 0
    assert not log[0]["halted"]


def test_router_bias_moves_by_counts_and_not_by_gradients():
    rate = 0.01
    config, mesh = on_mesh(tiny(model__router_bias=True, loss__bias_update_rate=rate))
    state, log = train(config, mesh, [random_batch(config)])
    bias_LE = named_leaves(state.params)["layers.router_bias_E"]
    np.testing.assert_allclose(bias_LE, rate * np.sign(1 / config.model.num_experts - log[0]["load_LE"]), atol=1e-7)


@pytest.mark.slow
def test_router_bias_balances_the_load():
    """Few distinct tokens crowd few experts; without a balance loss the bias alone spreads them."""
    batches = [random_batch(tiny(), seed) for seed in range(STEPS)]
    for batch in batches:
        batch["tokens_BT"] %= 8
    terms = dict(loss__balance_weight=0.0, loss__router_z_weight=0.0, optim__learning_rate=1e-6)
    _, without = run(batches, **terms)
    _, with_bias = run(batches, **terms, model__router_bias=True, loss__bias_update_rate=0.05)
    assert without[-1]["load_LE"].max() > 0.2, "the batch should be skewed for the test to say anything"
    assert with_bias[-1]["load_LE"].max() < 0.8 * without[-1]["load_LE"].max()


def test_the_compiled_step_does_not_grow_with_the_layers():
    """Compile time follows the size of the program; benchmarks/compile_time.py measures the seconds."""
    sizes = {}
    for layers in (4, 32):
        config, mesh = on_mesh(tiny(model__num_layers=layers, model__remat="full"))
        optimizer = make_optimizer(config.optim, config.train.steps)
        params = mixtral.abstract(config.model)
        state = TrainState(
            jax.ShapeDtypeStruct((), np.int32),
            params,
            jax.eval_shape(optimizer.init, params),
            jax.ShapeDtypeStruct((), bool),
        )
        step = make_train_step(config, optimizer, STAGES["pretrain"].loss)
        with jax.set_mesh(mesh):
            text = jax.jit(step).lower(state, random_batch(config)).as_text()
        sizes[layers] = text.count("\n")
    assert sizes[32] == sizes[4]


def fit(workdir, **overrides):
    cache = workdir.parent / "cache"
    defaults = dict(
        data__source="text",
        data__path=str(workdir.parent / "corpus"),
        data__cache_dir=str(cache),
        data__heldout_fraction=0.3,
        model__vocab_size=320,
        train__steps=6,
        train__checkpoint_every=4,  # step 6 is saved because it is the last
        train__eval_batches=1,
        train__eval_every=3,
        train__log_every=1,
    )
    config = tiny(**defaults | overrides)
    return trainer.fit(
        dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, fsdp=-1)),
        workdir,
        evals.heldout,
        evals.baselines,
    )


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"document number {i}: " + "the quick brown fox. " * (i + 3))
    return tmp_path


def test_fit_writes_everything_and_resumes_to_the_same_result(corpus, monkeypatch, capfd):
    final = fit(corpus / "straight")
    err = capfd.readouterr().err
    for word in ("parameters", "balance", "tok/s", "held-out", "sample at step", "bigram", "max/mean"):
        assert word in err, word
    assert set(final) >= {"loss", "bits_per_byte", "unigram_bits_per_byte", "bigram_bits_per_byte"}
    made = {path.name for path in (corpus / "straight").iterdir()}
    assert made >= {"checkpoints", "config.json", "tokenizer", "metrics.jsonl", "report.png"}
    assert (corpus / "straight" / "checkpoints" / "6").is_dir()
    heldout = [text for path in (corpus / "corpus").iterdir() if is_heldout(text := path.read_text(), 0.3)]
    assert final["tokens"] == sum(len(text) + 1 for text in heldout), (
        "the final evaluation reads every held-out byte and EOS"
    )

    lines = read_jsonl(corpus / "straight" / "metrics.jsonl")
    (session,) = (line for line in lines if line["kind"] == "session")
    steps = [line for line in lines if line["kind"] == "train"]
    productive = sum(line["step_seconds"] for line in steps)  # a line for every step
    elapsed = steps[-1]["time"] - session["time"] + session["start_up"]
    assert steps[-1]["goodput"] == pytest.approx(productive / elapsed, rel=0.05), "start-up counts as not productive"
    measured = sum(value for line in steps for name, value in line.items() if name.endswith("_seconds"))
    assert measured == pytest.approx(elapsed, rel=0.05), "the categories sum to the wall time"

    # Stop after step 5 (the newest checkpoint is of step 4), then start again: steps 5 and 6 are run once more.
    log = trainer._log

    def stop(run, step, *rest):
        values = log(run, step, *rest)
        if step == 5:  # its line is written, and its checkpoint is not
            raise KeyboardInterrupt
        return values

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_log", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(corpus / "stopped")
    again = fit(corpus / "stopped")
    assert again == final
    lines = [
        [
            {key: value for key, value in line.items() if key not in CLOCK}
            for line in map(json.loads, (corpus / name / "metrics.jsonl").read_text().splitlines())
            if line["kind"] != "session"
        ]
        for name in ("straight", "stopped")
    ]
    assert lines[0] == lines[1]
    before = (corpus / "stopped" / "metrics.jsonl").read_text()
    assert fit(corpus / "stopped") == {}, "a finished run is not evaluated again"
    assert (corpus / "stopped" / "metrics.jsonl").read_text() == before


def test_fit_refuses_to_continue_another_run(corpus, capfd):
    """Another model, optimizer, seed, split, batch or a past: refused with both values, and nothing is overwritten."""
    fit(corpus / "run")
    stored = (corpus / "run" / "config.json").read_text()
    for changes, words in (
        (dict(model__d_ff=40), "model.d_ff: checkpoint 48, now 40"),
        (dict(optim__name="muon", optim__b2=0.9), "optim.name: checkpoint adamw, now muon"),
        (dict(train__seed=7), "train.seed: checkpoint 0, now 7"),
        (dict(train__seq_len=16), "train.seq_len: checkpoint 32, now 16"),
        (dict(data__heldout_fraction=0.4), "corpus: checkpoint"),
        (dict(train__steps=5), "step 6, beyond train.steps=5"),
    ):
        with pytest.raises(UserError, match=f"(?s){words}"):
            fit(corpus / "run", **changes)
    assert (corpus / "run" / "config.json").read_text() == stored
    capfd.readouterr()
    assert fit(corpus / "run") == {}
    assert "this run is finished" in capfd.readouterr().err


def test_the_tokenizer_is_told_what_is_held_out(corpus, monkeypatch):
    """A tokenizer that is trained for the run must not see the run's own held-out documents."""

    def record(spec, cache_dir, heldout_fraction=None):
        raise UserError(f"held out: {heldout_fraction}")

    monkeypatch.setattr(run_module, "load_tokenizer", record)
    with pytest.raises(UserError, match=r"held out: 0\.3"):
        fit(corpus / "run")


def test_fit_refuses_a_workdir_that_is_a_file(corpus):
    (corpus / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used: File exists"):
        fit(corpus / "file")


def test_fit_names_step_and_documents_of_a_non_finite_loss(corpus):
    with pytest.raises(NonFiniteError, match=r"step [1-6]: loss (nan|inf).*\.txt"):
        fit(corpus / "run", optim__learning_rate=1e30, optim__clip_norm=0.0)
