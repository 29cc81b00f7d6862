"""Routing statistics: as planted, as recounted by hand, and the same on every mesh, in every batch and after an interruption."""

import itertools
import json
import math

import jax
import numpy as np
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.convert.__main__ import main
from mixtral_jax.data.tokenizer import ByteTokenizer
from mixtral_jax.evals import routing
from mixtral_jax.evals import routing_counts as counting
from mixtral_jax.evals.settings import Settings
from mixtral_jax.evals.subject import Subject
from mixtral_jax.load import load
from mixtral_jax.models import mixtral
from mixtral_jax.models.routing import choices
from tests.convert import sources
from tests.golden import reference
from tests.helpers import on_mesh, shard, tiny

E, WIDTH = 8, 32
COUNTS = ("tokens", "pairs", "documents", "choice_LKE", "together_LEE", "first_repeats_L", "any_repeats_L")


class Numbers(ByteTokenizer):
    """Text is ids, "3 14 15"."""

    vocab_size, bos_id, eos_id = 64, 62, 63

    def encode(self, text):
        return [int(word) if word.isdigit() else 0 for word in text.split()]

    def encode_array(self, text):
        return np.array(self.encode(text), np.int64)

    def decode(self, ids):
        return " ".join(map(str, ids))

    def continuation(self, context_ids, new_ids):
        return " ".join(map(str, new_ids))


def spelled(documents) -> list[str]:
    return [" ".join(map(str, ids)) for ids in documents]


def random_text(seed=0, vocabulary=range(60), lengths=(1, 0, 70, 9, 31, 40)) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.choice(list(vocabulary), n).tolist() for n in lengths]


def measured(monkeypatch, texts, model=None, folder=None, settings=None, mesh=None, **changes):
    """Results on {domain: documents as ids}; the config, and the model that was measured."""
    config, devices = on_mesh(tiny(model__vocab_size=64, **changes), **(mesh or {}))
    if model is None:
        model = mixtral.init(config.model, jax.random.key(0))
        # A steep router: near-ties, which rounding decides, are rare.
        model.layers.w_router_DE[...] = model.layers.w_router_DE[...] * 20
    found = results_of(monkeypatch, texts, config, shard(model, devices), devices, folder, settings)
    return found, config, model


def results_of(monkeypatch, texts, config, model, devices, folder=None, settings=None):
    monkeypatch.setattr(routing, "domains", lambda _: {name: spelled(text) for name, text in texts.items()})
    with jax.set_mesh(devices):
        subject = Subject(
            name="a model",
            config=config,
            model=model,
            mesh=devices,
            tokenizer=Numbers(),
            settings=settings or Settings(),
            open_corpus=lambda: None,
            note=print,
            folder=folder,
        )
        return dict(routing.routing(subject))


def planted(first, second):
    """A model whose every layer sends token v to first[v], then second[v], wherever it stands."""
    config = tiny(model__vocab_size=64).model
    model = mixtral.init(config, jax.random.key(0))
    layers = model.layers
    layers.w_o_NHD[...], layers.w_down_EFD[...] = layers.w_o_NHD[...] * 0, layers.w_down_EFD[...] * 0
    embedding_VD = np.zeros((64, config.d_model), np.float32)
    embedding_VD[np.arange(len(first)), first] = 2
    embedding_VD[np.arange(len(second)), second] = 1
    model.embedding_VD[...] = jax.numpy.asarray(embedding_VD)
    layers.w_router_DE[...] = jax.numpy.broadcast_to(jax.numpy.eye(config.d_model, E), layers.w_router_DE.shape)
    return model


def windows_by_hand(ids, width):
    whole = [Numbers.bos_id, *ids]
    return [whole[at : at + width] for at in range(0, len(whole), width)]


def recounted(texts, index_of, layers, k, e=E, width=WIDTH):
    """The statistics in plain Python; index_of(window) gives [layer][token][choice]."""
    found = {
        "tokens": 0,
        "pairs": 0,
        "documents": 0,
        "choice_LKE": [[[0] * e for _ in range(k)] for _ in range(layers)],
        "together_LEE": [[[0] * e for _ in range(e)] for _ in range(layers)],
        "first_repeats_L": [0] * layers,
        "any_repeats_L": [0] * layers,
    }
    for ids in texts:
        found["documents"] += bool(ids)
        for number, window in enumerate(windows_by_hand(ids, width) if ids else []):
            chosen = index_of(window)
            text = range(number == 0, len(window))
            found["tokens"] += len(text)
            found["pairs"] += max(len(text) - 1, 0)
            for layer in range(layers):
                before = None
                for t in text:
                    now = list(chosen[layer][t])
                    for i, expert in enumerate(now):
                        found["choice_LKE"][layer][i][expert] += 1
                    for a, b in itertools.product(now, repeat=2):
                        found["together_LEE"][layer][a][b] += 1
                    if before is not None:
                        found["first_repeats_L"][layer] += before[0] == now[0]
                        found["any_repeats_L"][layer] += bool(set(before) & set(now))
                    before = now
    return found


def from_logits(model, k, width=WIDTH):
    """Each window alone: experts in the order of the logits, by sorting."""
    run = jax.jit(lambda *row: choices(model, *row).logits_BTE)

    def index_of(window):
        row = np.zeros((3, 1, width), np.int32)
        row[:, 0, : len(window)] = window, np.arange(len(window)), np.ones(len(window))
        logits = np.asarray(run(*row))[:, 0, : len(window)]
        return np.argsort(-logits, -1, kind="stable")[..., :k].tolist()

    return index_of


def only_counts(found):
    return {name: {key: each[key] for key in COUNTS} for name, each in found["domains"].items()}


@pytest.mark.parametrize("k", [1, 2, 3])
def test_statistics_equal_a_recount_from_logits(monkeypatch, k):
    # Once with windows of such different lengths that batches are of different widths.
    width = 160 if k == 2 else WIDTH
    texts = (
        {"one": random_text(lengths=(1, 170, 0, 30, 100)), "two": random_text(1, range(5))}
        if k == 2
        else {"one": random_text()}
    )
    wide = dict(model__max_seq_len=160, train__seq_len=160, train__batch_size=1) if k == 2 else {}
    found, config, model = measured(monkeypatch, texts, model__experts_per_token=k, **wide)
    for name, text in texts.items():
        want = recounted(text, from_logits(model, k, width), config.model.num_layers, k, width=width)
        got = found["domains"][name]
        assert {key: got[key] for key in COUNTS} == want, name
        for layer in found["shown_layers"]:
            assert found[f"{name}/layer {layer}/first_repetition"] == want["first_repeats_L"][layer] / want["pairs"]
            assert found[f"{name}/layer {layer}/any_repetition"] == want["any_repeats_L"][layer] / want["pairs"]
        assert 0 < want["first_repeats_L"][0] < want["pairs"]
    if k == 1:
        assert got["first_repeats_L"] == got["any_repeats_L"]
        np.testing.assert_allclose(got["first_baseline_L"], got["any_baseline_L"])
    json.dumps(found)


def test_planted_routing_is_reported_as_planted(monkeypatch):
    """Token v goes to v % 8, then to the next; an expert's typical tokens are its own."""
    first = [v % 8 for v in range(60)]
    text = [[0, 0, 8, 1, 2, 4], [5], [3] * 70 + [11] * 70]
    found, _, _ = measured(monkeypatch, {"planted": text}, planted(first, [(v + 1) % 8 for v in first]))
    got = found["domains"]["planted"]
    assert (got["tokens"], got["documents"]) == (147, 3)
    # BOS and 140 tokens are 5 windows: 31, 32, 32, 32, 13 of text.
    assert got["pairs"] == 5 + 30 + 31 * 3 + 12
    assert got["windows"] == 6
    for layer in range(2):
        assert got["choice_LKE"][layer] == [[3, 1, 1, 140, 1, 1, 0, 0], [0, 3, 1, 1, 140, 1, 1, 0]]
        assert got["first_repeats_L"][layer] == 2 + 135
        assert got["any_repeats_L"][layer] == 4 + 135, "8 and 1 share expert 1, 1 and 2 expert 2"
        together = np.zeros((8, 8), int)
        for a, n in enumerate([3, 1, 1, 140, 1, 1]):
            together[a, a + 1] = together[a + 1, a] = n
            together[a, a] += n
            together[a + 1, a + 1] += n
        np.testing.assert_array_equal(got["together_LEE"][layer], together)
    typical = found["typical_tokens"]["0"]
    assert [[t["token"] for t in row] for row in typical] == [[], [], [], [3, 11], [], [], [], []], (
        "others are too rare"
    )
    assert all(t["count"] == t["here"] == 70 for t in typical[3])
    snippet = found["snippets"]["planted"]
    assert snippet == {"pieces": ["3"] * 31, "first": {"0": [3] * 31, "1": [3] * 31}}, "the longest start of a document"


def test_uniform_routing_gives_the_baselines(monkeypatch):
    """Each ordered pair of experts has one token, and tokens are drawn at random."""
    pairs = list(itertools.permutations(range(E), 2))
    text = random_text(3, range(len(pairs)), (300,) * 60)
    found, _, _ = measured(monkeypatch, {"uniform": text}, planted(*zip(*pairs)))
    got = found["domains"]["uniform"]
    assert found["random_first_repetition"] == 1 / 8
    assert found["random_any_repetition"] == pytest.approx(1 - 6 / 8 * 5 / 7)
    for kind, want in (("first", 1 / 8), ("any", 1 - 6 / 8 * 5 / 7)):
        repetition, error = got[f"{kind}_repeats_L"][0] / got["pairs"], got[f"{kind}_error_L"][0]
        # Windows are as independent as tokens here.
        assert error == pytest.approx(math.sqrt(want * (1 - want) / got["pairs"]), rel=0.15)
        assert abs(repetition - want) < 4 * error
        assert got[f"{kind}_baseline_L"][0] == pytest.approx(want, abs=0.002)
    share_E = np.sum(got["choice_LKE"][0], 0) / (2 * got["tokens"])
    assert (np.abs(share_E - 1 / 8) < 4 * np.array(got["share_error_LE"][0])).all()
    together_EE = np.array(got["together_LEE"][0])
    off = ~np.eye(E, dtype=bool)
    np.testing.assert_allclose((together_EE / counting.expected_together(together_EE).clip(1))[off], 1, atol=0.15)


def test_meshes_and_batches_change_nothing(monkeypatch):
    texts = {"one": random_text(), "two": random_text(1, range(5))}
    want, _, _ = measured(monkeypatch, texts)
    for mesh in (dict(tensor=2, fsdp=4), dict(context=2, expert=4)):
        got, _, _ = measured(monkeypatch, texts, mesh=mesh, settings=Settings(batch_tokens=64))
        assert got == want


def test_an_interrupted_evaluation_goes_on(monkeypatch, tmp_path):
    texts = {"one": random_text(), "two": random_text(1)}
    settings = Settings(batch_tokens=64, seed=1)
    whole, _, model = measured(monkeypatch, texts, settings=settings)
    run, ran = routing.Runner._run, []

    def counted(*arguments):
        if len(ran) == stop:
            raise KeyboardInterrupt
        ran.append(arguments)
        return run(*arguments)

    monkeypatch.setattr(routing.Runner, "_run", counted)
    stop = 3
    with pytest.raises(KeyboardInterrupt):
        measured(monkeypatch, texts, model, tmp_path, settings)
    stop = None
    again, _, _ = measured(monkeypatch, texts, model, tmp_path, settings)
    assert again == whole
    batches = len(ran)
    # All is finished; nothing of it is taken for other weights, text or layers.
    again, _, _ = measured(monkeypatch, texts, model, tmp_path, settings)
    assert again == whole
    assert len(ran) == batches
    other = mixtral.init(model.config, jax.random.key(5))
    found, _, _ = measured(monkeypatch, texts, other, tmp_path, settings)
    assert only_counts(found) != only_counts(whole)
    assert len(ran) == 2 * batches
    measured(monkeypatch, {"one": texts["two"]}, model, tmp_path, settings)
    assert len(ran) > 2 * batches


def test_text_is_cut_and_bounded(monkeypatch):
    text = random_text(lengths=(40, 40, 40))
    found = routing.read(iter(spelled(text)), Numbers(), 70, WIDTH)
    assert (found.documents, found.tokens) == (2, 70)
    assert [len(each.tokens) for each in found.windows] == [32, 9, 31]
    assert [each.uncounted for each in found.windows] == [1, 0, 1]
    assert found.windows[1].tokens.tolist() == text[0][31:]
    assert routing.read(iter(spelled(text)), Numbers(), 1000, WIDTH, documents=1).tokens == 40


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(routing_layers=(0, 2)), "--routing_layers=2 and the model has 2 layers.*give 0 to 1"),
        (Settings(routing_tokens=1), "--routing_tokens=1; .*at least 2"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        routing.check(tiny(), settings)


def test_a_domain_without_neighbours_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"the domain short has 2 tokens in 2 documents .* no two in a row"):
        measured(monkeypatch, {"short": [[1], [2]]})


def test_shown_layers():
    assert [routing.shown_layers(n, Settings()) for n in (1, 2, 3, 32)] == [[0], [0, 1], [0, 1, 2], [0, 15, 31]]
    assert routing.shown_layers(32, Settings(routing_layers=(5, 1))) == [1, 5]


@pytest.mark.parity
@pytest.mark.parametrize("name", ["mixtral", "deep_top4_of_16"])
def test_statistics_equal_a_recount_from_transformers(monkeypatch, tmp_path, name):
    """From its router logits of each token, of the exported model, one window at a time."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    shape = reference.LIVE[name]
    weights = reference.weights(shape)
    source = sources.write(tmp_path / "hf", sources.tensors(weights), sources.config_json(shape))
    assert main(["import", f"--from={source}", f"--to={tmp_path / 'run'}"]) == 0
    assert main(["export", f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'back'}"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", attn_implementation="eager", experts_implementation="eager"
    )
    k, e, layers = shape["experts_per_token"], shape["num_experts"], shape["num_layers"]
    margins = []

    def index_of(window):
        with torch.no_grad():
            out = theirs(input_ids=torch.tensor([window]), output_router_logits=True)
        logits = np.stack([each.numpy().reshape(len(window), e) for each in out.router_logits])
        ranked = -np.sort(-logits, -1)
        margins.append((ranked[..., :k] - ranked[..., 1 : k + 1]).min())
        return np.argsort(-logits, -1, kind="stable")[..., :k].tolist()

    config, model, mesh = load(str(tmp_path / "run"))
    texts = {"one": random_text(lengths=(300, 1, 70, 0, 9)), "two": random_text(1, range(5))}
    found = results_of(monkeypatch, texts, config, model, mesh)
    width = min(config.train.seq_len, config.model.max_seq_len)
    for domain, text in texts.items():
        want = recounted(text, index_of, layers, k, e, width)
        got = {key: found["domains"][domain][key] for key in COUNTS}
        assert got == want, f"{domain}; the smallest margin between choices is {min(margins):.1e}"
