"""Passkeys: prompts of exact lengths, oracles and guessers score as they must, what cannot be seen is not counted."""

import collections
import dataclasses
import itertools
import json
import math

import jax
import numpy as np
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, train_sentencepiece
from mixtral_jax.evals import passkey, passkey_prompts, passkey_report
from mixtral_jax.evals.passkey import Grid, Reader, measure
from mixtral_jax.evals.passkey_prompts import DIGITS, FILLER, OTHERS, ROOM, TASK, trials
from mixtral_jax.evals.scorer import Request
from mixtral_jax.evals.settings import Settings
from mixtral_jax.evals.subject import Subject
from mixtral_jax.evals.work import Work
from mixtral_jax.generate import sample
from mixtral_jax.models import mixtral
from tests.helpers import on_mesh, shard, tiny

GRID = Grid((512, 1024), (0.0, 0.5, 1.0), trials=4, seed=0, limit=1024, reach=math.inf)


@pytest.fixture(scope="module")
def pieces():
    """A SentencePiece model whose pieces hold several digits and letters."""
    rng = np.random.default_rng(0)
    texts = [f"{' '.join(FILLER)} {TASK} The pass key is {rng.integers(10**5)}." for _ in range(60)]
    return SentencePieceTokenizer(train_sentencepiece(texts, 420), "test")


@pytest.fixture(params=["bytes", "pieces"])
def tokenizer(request):
    return ByteTokenizer() if request.param == "bytes" else request.getfixturevalue("pieces")


def run(grid, reader, work=None, tokenizer=None):
    return dict(
        measure(grid, tokenizer or ByteTokenizer(), reader, Work(None, "passkey", "key") if work is None else work)
    )


def oracle(tokenizer=None) -> Reader:
    """Reads the key off the prompt itself."""
    tokenizer = tokenizer or ByteTokenizer()

    def read(trial) -> str:
        (key,) = set(filter(lambda word: word.isdecimal(), tokenizer.decode(trial.context).split()))
        return key

    def write(asked):
        yield from ((i, f" {read(trial)}. And more: 1") for i, trial in enumerate(asked))

    def score(asked):
        for i, trial in reversed(list(enumerate(asked))):
            yield i, [0.0 if number == read(trial) else -9.0 for number in (trial.key, *trial.others)]

    return Reader(write, score)


def guesser(seed=0) -> Reader:
    rng = np.random.default_rng(seed)
    return Reader(
        lambda asked: ((i, f" {rng.integers(10**4, 10**5)}") for i, _ in enumerate(asked)),
        lambda asked: ((i, rng.random(1 + OTHERS).tolist()) for i, _ in enumerate(asked)),
    )


def test_prompts_fill_their_length_as_whole_sentences_allow(tokenizer):
    grid = GRID._replace(lengths=(*range(400, 430), 1000))
    for length in grid.lengths:
        for trial in trials(tokenizer, grid, length):
            assert len(trial.context) + ROOM <= length
            assert trial.context[0] == tokenizer.bos_id
            text = tokenizer.decode(trial.context)
            assert text.startswith(TASK)
            assert text.endswith("The pass key is")
            assert text.count(trial.key) == 2
            line = next(line for line in text.split("\n") if trial.key in line)
            before, after = (sum(part.count(s) for s in FILLER) for part in text.split(line))
            if trial.depth == 0:  # and another sentence would be too many
                head, _, question = text.rpartition("\n")
                more = next(b for a, b in zip(FILLER, FILLER[1:] + FILLER) if head.endswith(a))
                assert len(tokenizer.encode(f"{head} {more}\n{question}")) + 1 + ROOM > length
            assert abs(before - trial.depth * (before + after)) <= 0.5
            assert trial.seeable
            assert len({trial.key, *trial.others}) == 1 + OTHERS
            assert {len(number) for number in (trial.key, *trial.others)} == {DIGITS}


def test_a_trial_depends_on_nothing_but_its_own_place(tokenizer):
    all_ = {trial.name: trial for length in GRID.lengths for trial in trials(tokenizer, GRID, length)}
    assert len({trial.key for trial in all_.values()}) == len(all_)
    other = GRID._replace(lengths=(512,), depths=(1.0, 0.5), trials=2)
    for trial in trials(tokenizer, other, 512):
        assert trial == all_[trial.name]
    assert trials(tokenizer, GRID._replace(seed=1), 512)[0].key != all_["512/0/0"].key


def test_an_answer_is_the_prompts_next_word(tokenizer):
    for number in ("10000", "98765"):
        answer = passkey_prompts.answer_tokens(tokenizer, number)
        assert len(answer) <= ROOM - 2, "two more tokens show where the number ends"
        asked = tokenizer.encode(passkey_prompts.QUESTION)
        assert tokenizer.continuation(asked, answer) == f" {number}"


def test_an_oracle_finds_every_key():
    found = run(GRID, oracle())
    assert found["accuracy"] == found["likelihood_accuracy"] == 1
    assert found["trials"] == 24
    assert found["unseeable"] == 0
    assert len(found["cells"]) == 6
    for cell in found["cells"].values():
        assert cell["accuracy"] == cell["likelihood_accuracy"] == cell["accuracy_high"] == 1
        assert cell["accuracy_low"] == pytest.approx(4 / (4 + 1.959963984540054**2))  # Wilson's for 4 of 4
        assert cell["log_prob_per_digit"] == 0


def test_a_guesser_scores_the_baseline():
    found = run(GRID._replace(lengths=(400,), depths=(0.5,), trials=1500), guesser())
    assert found["generation_baseline"] == 1 / 90_000
    assert found["likelihood_baseline"] == 0.1
    assert found["likelihood_accuracy_low"] < 0.1 < found["likelihood_accuracy_high"]
    assert found["likelihood_accuracy_high"] - found["likelihood_accuracy_low"] < 0.04
    assert found["accuracy"] <= 1 / 1500


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" 12345", "12345"),
        ("\n7 12345", "7"),
        ("12345.", "12345"),
        ("123456", "123456"),
        ("none", None),
        ("\u0663 4", "4"),
    ],
)
def test_the_first_number_counts(text, number):
    assert passkey.first_number(text) == number


def test_equals_are_not_found():
    flat = Reader(
        lambda asked: ((i, "") for i, _ in enumerate(asked)),
        lambda asked: ((i, [-1.0] * 10) for i, _ in enumerate(asked)),
    )
    assert run(GRID, flat)["likelihood_accuracy"] == 0


def test_a_key_that_is_cut_off_is_unseeable_and_not_a_miss():
    """Prompts longer than the model allows lose their left part, and the first keys with it."""
    asked = []

    def watched(reader):
        def write(some):
            asked.extend(some)
            return reader.write(some)

        return Reader(write, reader.score)

    found = run(GRID._replace(limit=600), watched(oracle()))
    assert found["cells"]["1024/0"] == {"trials": 0, "unseeable": 4}
    assert found["cells"]["1024/1"]["accuracy"] == found["accuracy"] == 1
    assert found["unseeable"] == 4 + found["cells"]["1024/0.5"]["unseeable"]
    assert found["trials"] + found["unseeable"] == 24
    for trial in asked:
        assert len(trial.context) + ROOM <= 600
        assert trial.context[0] == ByteTokenizer.bos_id
        assert f"{trial.key} is the pass key" in ByteTokenizer().decode(trial.context)


def test_the_limit_is_exact(tokenizer):
    """The first digit of the last mention just behind BOS is there; one token less and it is not."""
    (whole,) = trials(tokenizer, GRID._replace(depths=(0.0,), trials=1), 512)
    tokens = len(whole.context) + ROOM
    seen = [
        limit
        for limit in range(2, tokens + 1)
        if trials(tokenizer, GRID._replace(depths=(0.0,), trials=1, limit=limit), 512)[0].seeable
    ]
    (shortest,) = trials(tokenizer, GRID._replace(depths=(0.0,), trials=1, limit=seen[0]), 512)
    assert seen == list(range(seen[0], tokens + 1))
    assert tokenizer.decode(shortest.context).strip().startswith(f"{whole.key} is the pass key")


def test_nothing_seeable_is_told_without_shares():
    found = run(GRID._replace(limit=64), oracle())
    assert found["trials"] == 0
    assert found["unseeable"] == 24
    assert "accuracy" not in found
    table, by_length, plot = passkey_report.report({"small": found})
    assert table.rows[1][2] is None
    assert by_length.rows[0][2:] == [None, None]
    assert "Hatched" in plot.note


def test_what_a_sliding_window_cannot_carry_is_unseeable():
    """Against the model itself: beyond `reach` a token changes nothing, at it it does."""
    model_config = tiny(model__sliding_window=9, model__num_layers=2).model
    far = passkey_prompts.reach(model_config)
    assert far == 16
    model = mixtral.init(model_config, jax.random.key(0))

    @jax.jit
    def last_logits(tokens_BT):
        return model(tokens_BT, np.arange(32)[None], np.ones((1, 32), np.int32))[0][0, -1]

    tokens = np.arange(32)[None].astype(np.int32)
    for back, changes in ((far, True), (far + 1, False)):
        changed = tokens.copy()
        changed[0, 31 - back] = 99
        assert bool((last_logits(changed) != last_logits(tokens)).any()) == changes
    (trial,) = trials(ByteTokenizer(), GRID._replace(depths=(1.0,), trials=1), 512)
    text = ByteTokenizer().decode(trial.context)
    back = len(text) - 1 - text.rindex(trial.key)
    for reach, seeable in ((back, True), (back - 1, False)):
        (found,) = trials(ByteTokenizer(), GRID._replace(depths=(1.0,), trials=1, reach=reach), 512)
        assert found.seeable == seeable
    assert passkey_prompts.reach(tiny().model) == math.inf


@pytest.mark.parametrize("limit", [64, 700, 1024, 32768, 65536])
def test_default_lengths_double_up_to_the_limit_and_hold_the_frame(tokenizer, limit):
    lengths = passkey_prompts.default_lengths(tokenizer, limit)
    for length in lengths:
        trials(tokenizer, GRID._replace(trials=20, depths=(0.5,)), length)
    if limit == 64:
        assert len(lengths) == 1
    else:
        assert lengths[-1] == min(limit, 32768)
        assert all(2 * a in (b, b - 1) for a, b in itertools.pairwise(lengths))


def test_a_length_without_room_is_refused_with_what_it_needs(tokenizer):
    with pytest.raises(UserError, match=r"--passkey_lengths: 90 tokens .* give lengths of at least (\d+)") as caught:
        run(GRID._replace(lengths=(1024, 90)), oracle(tokenizer), tokenizer=tokenizer)
    needed = int(str(caught.value).rpartition(" ")[2])
    with pytest.raises(UserError) as early:
        passkey_prompts.refuse_short(tokenizer, GRID._replace(lengths=(1024, 90)))
    assert str(early.value) == str(caught.value)
    passkey_prompts.refuse_short(tokenizer, GRID._replace(lengths=(1024, needed), depths=(0.0,), trials=1))
    grid = GRID._replace(depths=(0.0,), trials=1)
    assert len(trials(tokenizer, grid, needed)) == 1
    with pytest.raises(UserError):
        trials(tokenizer, grid, needed - 10)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(passkey_lengths=(512, 0)), "--passkey_lengths: 0 tokens"),
        (dict(passkey_depths=(0.5, 1.5)), "--passkey_depths: 1.5"),
        (dict(passkey_depths=()), "at least one depth"),
        (dict(passkey_trials=0), "--passkey_trials=0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        passkey.check(tiny(), Settings(**settings))


def test_an_interrupted_one_goes_on_and_asks_nothing_twice(tmp_path):
    asked = collections.Counter()

    def cut(after):
        """The guesser, but gone after so many answers."""
        calls = 0

        def counted(answer, what):
            def answers(some):
                nonlocal calls
                for i, found in answer(some):
                    calls += 1
                    if calls > after:
                        raise KeyboardInterrupt
                    asked[some[i].name, what] += 1
                    yield i, found

            return answers

        by_name = Reader(
            lambda some: ((i, f" {trial.others[0]}") for i, trial in enumerate(some)),
            lambda some: ((i, [-float(n[-1]) for n in (t.key, *t.others)]) for i, t in enumerate(some)),
        )
        return Reader(counted(by_name.write, "w"), counted(by_name.score, "s"))

    want = run(GRID, cut(10**9))
    asked.clear()
    for after in (0, 5, 9, 20):
        with pytest.raises(KeyboardInterrupt), Work(tmp_path, "passkey", "key") as work:
            run(GRID, cut(after), work)
    with Work(tmp_path, "passkey", "key") as work:
        assert run(GRID, cut(10**9), work) == want
    assert len(asked) == 48
    assert set(asked.values()) == {1}


def subject(folder=None, settings=None, **mesh):
    config, devices = on_mesh(
        tiny(model__vocab_size=258, model__max_seq_len=512, model__num_layers=1, loss__head_chunk=64), **mesh
    )
    model = mixtral.init(config.model, jax.random.key(0))
    model.head_DV[...] = model.head_DV[...] * 5
    settings = settings or Settings(
        passkey_lengths=(440,), passkey_depths=(0.0, 1.0), passkey_trials=2, batch_tokens=4096
    )
    notes = []
    return Subject(
        name="test",
        config=config,
        model=shard(model, devices),
        mesh=devices,
        tokenizer=ByteTokenizer(),
        settings=settings,
        open_corpus=lambda: None,
        note=notes.append,
        folder=folder,
    )


def measured(whose) -> dict:
    with jax.set_mesh(whose.mesh):
        return json.loads(json.dumps(dict(passkey.passkey(whose))))


def test_a_model_answers_each_trial_by_itself():
    """In one batch as alone: what it writes, and its log-probabilities of the key and the others, each at its place."""
    whose = subject()
    grid = Grid((440,), (0.0, 1.0), trials=2, seed=0, limit=512, reach=math.inf)
    asked, reader = trials(whose.tokenizer, grid, 440), passkey.reader_of(whose)
    with jax.set_mesh(whose.mesh):
        written, scores = dict(reader.write(asked)), dict(reader.score(asked))
        for i, trial in enumerate(asked):
            (alone,) = sample(whose.model, whose.tokenizer, [trial.context], max_tokens=ROOM, temperature=0, seed=0)
            assert written[i] == alone
        requests = [
            Request(asked[2].context, passkey_prompts.answer_tokens(whose.tokenizer, number))
            for number in (asked[2].key, *asked[2].others)
        ]
        found = dict(whose.scorer(whose.model, requests))
    want = [float(found[i].log_probs.sum()) for i in range(1 + OTHERS)]
    np.testing.assert_allclose(scores[2], want, rtol=1e-5)
    assert len(set(want)) == 1 + OTHERS


@pytest.mark.slow
def test_a_model_is_asked_the_same_on_any_mesh_and_in_any_batch():
    want = measured(subject())
    settings = dataclasses.replace(subject().settings, batch_tokens=1024)
    got = measured(subject(settings=settings, context=2, data=2))
    for name in ("accuracy", "likelihood_accuracy", "trials", "lengths"):
        assert got[name] == want[name]
    for name, cell in want["cells"].items():
        for figure, value in cell.items():
            assert got["cells"][name][figure] == pytest.approx(value, abs=1e-5)
    assert want["trials"] == 4


def test_the_report_has_the_papers_figures_beside_ours():
    full, cut = run(GRID, oracle()), run(GRID._replace(limit=600), oracle())
    summary, by_length, *plots = passkey_report.report({"a": full, "b": cut})
    assert [row[0] for row in summary.rows] == ["the paper, Mixtral 8x7B", "a", "a", "b", "b"]
    assert summary.rows[1][2] == 100
    assert "trials of b" in summary.note
    assert "of a" not in summary.note
    assert [row[:3] for row in by_length.rows] == [[512, 100, 100], [1024, 100, 100]]
    assert [plot.title for plot in plots] == ["Passkey: a", "Passkey: b"]
    hatched = [
        sum(bool(patch.get_hatch()) for patch in axes.patches) for plot in plots for axes in plot.figure.axes[:2]
    ]
    assert hatched == [0, 0, *[sum(not cell["trials"] for cell in cut["cells"].values())] * 2]
    assert hatched[-1] >= 1
