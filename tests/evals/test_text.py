"""Labelled text, perplexity of documents, and perplexity by context: against counts by hand."""

import dataclasses
import json
import math
import re

import jax
import numpy as np
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.data.text import hash_position
from mixtral_jax.data.tokenizer import ByteTokenizer
from mixtral_jax.evals import context, text_perplexity
from mixtral_jax.evals.domains import domains
from mixtral_jax.evals.rolling import windows
from mixtral_jax.evals.settings import Settings
from mixtral_jax.evals.subject import Subject
from mixtral_jax.evals.work import Work
from mixtral_jax.models import mixtral
from tests.evals.test_perplexity import unigram
from tests.helpers import on_mesh, shard, tiny

TOKENIZER = ByteTokenizer()
TEXTS = {"a": ["one\ttwo\n\nthree", "x", "four " * 30], "b": ["five six seven eight " * 5, "\u00e9t\u00e9 " * 4]}


@pytest.fixture
def text(tmp_path):
    """--text of two domains, one of files and one of rows under another key."""
    for i, each in enumerate(TEXTS["a"]):
        (tmp_path / f"{i}.txt").write_text(each)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": each}) + "\n" for each in TEXTS["b"]))
    return (f"a=text:{tmp_path}", f"b=jsonl[body]:{tmp_path / 'b.jsonl'}")


def subject(settings, model=None, axes=None, folder=None, **keys) -> Subject:
    keys = dict(model__vocab_size=272, model__max_seq_len=128, train__seq_len=32, model__init_std=0.3) | keys
    config, mesh = on_mesh(tiny(**keys), **axes or {})
    model = shard(model or mixtral.init(config.model, jax.random.key(0)), mesh)
    return Subject("x", config, model, mesh, TOKENIZER, settings, None, print, folder=folder)


def results(evaluation, who: Subject) -> dict:
    with jax.set_mesh(who.mesh):
        return dict(evaluation(who))


def test_every_token_is_in_one_window_with_what_the_harness_reads_before_it():
    ids = list(range(100, 123))
    found = list(windows(ids, 1, 8))
    assert [list(each.context) for each in found] == [[1], [107], ids[14:16]]
    assert [list(each.continuation) for each in found] == [ids[:8], ids[8:16], ids[16:]]
    for n in range(1, 40):
        cut = list(windows(list(range(n)), 99, 8))
        assert [i for each in cut for i in each.continuation] == list(range(n))
        assert all(len(each.context) + len(each.continuation) - 1 <= 8 for each in cut)


def test_a_model_that_can_be_counted_is_right_to_the_sixth_digit(text):
    model, loss_V = unigram(tiny(model__vocab_size=272, model__max_seq_len=128, model__norm_eps=0.0))
    found = results(text_perplexity.perplexity, subject(Settings(text=text), model, model__norm_eps=0.0))
    everything = []
    for name, texts in TEXTS.items():
        nll = [sum(loss_V[i] for i in each.encode()) for each in texts]
        size, words = (
            sum(len(each.encode()) for each in texts),
            sum(len(re.split(r"\s+", each)) for each in texts),
        )
        assert found[f"{name}/loss"] == pytest.approx(sum(nll) / size, rel=1e-6)
        assert found[f"{name}/bits_per_byte"] == pytest.approx(sum(nll) / size / math.log(2), rel=1e-6)
        assert found[f"{name}/word_perplexity"] == pytest.approx(math.exp(sum(nll) / words), rel=2e-5)
        assert found[f"{name}/document_nll"] == pytest.approx(np.mean(nll), rel=1e-6)
        half = 1.96 * np.std(nll, ddof=1) / math.sqrt(len(nll))
        assert found[f"{name}/document_nll_high"] == pytest.approx(np.mean(nll) + half, rel=1e-4)
        assert (found[f"{name}/tokens"], found[f"{name}/bytes"], found[f"{name}/documents"]) == (size, size, len(texts))
        everything += nll
    assert found["document_nll"] == pytest.approx(np.mean(everything), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(sum(everything) / found["tokens"]), rel=1e-6)


def test_batches_and_meshes_change_nothing(text):
    want = results(text_perplexity.perplexity, subject(Settings(text=text)))
    for settings, axes in (
        (Settings(text=text, batch_tokens=64), {}),
        (Settings(text=text), dict(expert=4, tensor=2)),
        (Settings(text=text), dict(context=2, fsdp=4)),
    ):
        got = results(text_perplexity.perplexity, subject(settings, axes=axes))
        assert got == pytest.approx(want, rel=1e-5)


def test_a_limit_takes_the_first_documents(text):
    found = results(text_perplexity.perplexity, subject(Settings(text=text, limit=1)))
    assert found["documents"] == 2
    assert found["a/bytes"] == len(TEXTS["a"][0])


def test_an_interrupted_evaluation_goes_on_and_gives_the_same(text, tmp_path, monkeypatch):
    settings = Settings(text=text, batch_tokens=16)
    want = results(text_perplexity.perplexity, subject(settings))
    asked = []

    class Ends(KeyboardInterrupt):
        pass

    def stops(self, model, requests):
        asked.append(len(requests))
        if len(asked) == 3:
            raise Ends
        yield from score(self, model, requests)

    from mixtral_jax.evals.scorer import Scorer

    score = Scorer.__call__
    monkeypatch.setattr("mixtral_jax.evals.rolling.PIECE_BATCHES", 1)
    monkeypatch.setattr(Scorer, "__call__", stops)
    with pytest.raises(Ends):
        results(text_perplexity.perplexity, subject(settings, folder=tmp_path))
    before = len(asked)
    got = results(text_perplexity.perplexity, subject(settings, folder=tmp_path))
    assert got == want
    again = len(asked)
    assert again - before < 5, "what was scored before is not scored again"
    results(text_perplexity.perplexity, subject(settings, folder=tmp_path))
    assert len(asked) == again, "nothing is left to score"
    other = mixtral.init(subject(settings).config.model, jax.random.key(1))
    assert results(text_perplexity.perplexity, subject(settings, other, folder=tmp_path))["loss"] != want["loss"]


def killed_after(monkeypatch, evaluation, who: Subject, count: int) -> None:
    """Runs an evaluation that ends when so many pieces are in its file."""
    put, left = Work.put, [count]

    def ends(self, name, value):
        put(self, name, value)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Work, "put", ends)
        with pytest.raises(KeyboardInterrupt):
            results(evaluation, who)


@pytest.mark.parametrize("evaluation", [text_perplexity.perplexity, context.context])
def test_wherever_it_is_killed_the_figures_are_the_same_to_the_last_digit(evaluation, text, tmp_path, monkeypatch):
    """What was finished decides neither which requests share a batch nor how wide it is."""
    monkeypatch.setattr("mixtral_jax.evals.rolling.PIECE_BATCHES", 1)
    settings = Settings(text=text, batch_tokens=128, context_lengths=(16, 32))
    one = subject(settings)
    want = results(evaluation, one)
    for count in (1, 2):
        folder = tmp_path / f"killed{count}"
        killed_after(monkeypatch, evaluation, dataclasses.replace(one, folder=folder), count)
        assert results(evaluation, dataclasses.replace(one, folder=folder)) == want


def test_text_that_changed_is_scored_anew(text, tmp_path):
    """Under the same path; what is the same as before is not."""
    settings = Settings(text=text)
    before = subject(settings, folder=tmp_path / "out")
    old = results(text_perplexity.perplexity, before)
    (tmp_path / "1.txt").write_text("y and z")
    got = results(text_perplexity.perplexity, before)
    assert got == results(text_perplexity.perplexity, dataclasses.replace(before, folder=None))
    assert got["a/loss"] != old["a/loss"]
    assert got["b/loss"] == old["b/loss"]


def test_context_scores_the_same_tokens_with_more_before_them(tmp_path):
    """Against whole logits; a document of just the length counts, a shorter one does not."""
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, n))) for n in (40, 64, 90, 63)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    settings = Settings(text=(f"t=jsonl:{tmp_path}/t.jsonl",), context_lengths=(16, 32, 64))
    who = subject(settings)
    found = results(context.context, who)
    assert (found["documents"], found["scored_tokens"], found["lengths"]) == (2, 8, [16, 32, 64])
    model = mixtral.init(who.config.model, jax.random.key(0))
    for length in (16, 32, 64):
        losses = []
        for each in (texts[1], texts[2]):
            ids = list(each.encode())
            row = np.array([[TOKENIZER.bos_id, *ids[-length:]]], np.int32)
            assert row.shape[1] == length + 1
            logits_BTV, _ = model(row[:, :-1], np.arange(length)[None], np.ones((1, length), np.int32))
            log_probs = np.asarray(jax.nn.log_softmax(logits_BTV[0]))
            losses.append(-np.mean([log_probs[length - 8 + i, row[0, length - 7 + i]] for i in range(8)]))
        assert found[f"{length}/loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        half = 1.96 * np.std(losses, ddof=1) / math.sqrt(2)
        assert found[f"{length}/loss_high"] == pytest.approx(np.mean(losses) + half, rel=1e-4)
        if length == 16:
            shortest = np.array(losses)
            continue
        change = np.array(losses) - shortest
        assert found[f"{length}/change"] == pytest.approx(change.mean(), rel=1e-3)
        half = 1.96 * np.std(change, ddof=1) / math.sqrt(2)
        assert found[f"{length}/change_low"] == pytest.approx(change.mean() - half, rel=1e-3)
    got = results(context.context, subject(settings, axes=dict(context=2, fsdp=2)))
    assert got.pop("lengths") == [16, 32, 64]
    assert got == pytest.approx({name: value for name, value in found.items() if name != "lengths"}, rel=1e-5)
    assert "64" in context.report({"m": found})[0].rows[2][0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            dict(context_lengths=(16, 256)),
            "--context_lengths=256; it must lie between 2 and the model's max_seq_len=128",
        ),
        (dict(context_lengths=(1,)), "--context_lengths=1"),
        (dict(context_documents=0), "--context_documents=0"),
    ],
)
def test_lengths_that_cannot_be_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        context.check(tiny(model__max_seq_len=128), Settings(**settings))


def test_text_too_short_for_the_context_is_refused_with_both_numbers(text):
    with pytest.raises(
        UserError, match=r"no document has 256 tokens, the longest has 150; .*--context_lengths up to 150"
    ):
        results(context.context, subject(Settings(text=text, context_lengths=(64, 256)), model__max_seq_len=512))


def test_default_lengths_double_up_to_what_the_model_reads():
    assert context.lengths(tiny(model__max_seq_len=1024), Settings()) == [64, 128, 256, 512, 1024]
    assert context.lengths(tiny(model__max_seq_len=65536), Settings())[0::6] == [512, 32768]
    assert context.lengths(tiny(model__max_seq_len=100), Settings()) == [64, 100]


def test_the_standard_librarys_domains():
    """Of different kinds, the same each time, and held out where a run on the standard library holds out."""
    found = domains(Settings())
    assert list(found) == ["code", "docstrings", "comments", "reference", "tables", "characters"]
    texts = {name: list(domain) for name, domain in found.items()}
    assert texts == {name: list(domain) for name, domain in domains(Settings()).items()}
    assert all(sum(map(len, each)) > 30_000 for each in texts.values())
    code = "\n".join(texts["code"])
    assert "import " in code
    assert '"""' not in code.replace('\'"""\'', "") or code.count('"""') < 60
    assert not any(line.strip().startswith("#") for line in code.splitlines())
    assert "U+0041\tLu\tLATIN CAPITAL LETTER A" in texts["characters"][0]
    assert "decoding_table" in texts["tables"][0]
    config = tiny(data__source="stdlib", data__heldout_fraction=0.05)
    assert [found[name].trained(config) for name in ("code", "docstrings", "comments")] == [0, 0, 0]
    assert found["characters"].trained(config) is None
    assert found["code"].trained(tiny(data__source="stdlib", data__heldout_fraction=0.01)) > 0.5
    assert found["code"].trained(tiny(data__source="text", data__path="x")) is None


def test_the_language_reference_is_no_code(monkeypatch):
    """On a Python whose file of it has a hash among the first, it stays a domain of its own."""
    monkeypatch.setattr(
        "mixtral_jax.evals.domains.hash_position", lambda text: 0.0 if "\ntopics = {" in text else hash_position(text)
    )
    found = domains(Settings())
    assert not any("topics = {" in each for each in found["code"])
    assert len(list(found["reference"])) > 50


def test_rows_that_carry_their_label_make_a_domain_each(tmp_path):
    rows = [{"text": f"t{i}", "meta": {"set": ["x", "y"][i % 2]}} for i in range(5)]
    path = tmp_path / "pile.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = domains(Settings(text=(f"@meta.set=jsonl:{path}",)))
    assert {name: list(domain) for name, domain in found.items()} == {"x": ["t0", "t2", "t4"], "y": ["t1", "t3"]}
    path.write_text(path.read_text() + '{"text": "no label"}\n')
    with pytest.raises(UserError, match=r"pile.jsonl:6 has no meta.set and text"):
        domains(Settings(text=(f"@meta.set=jsonl:{path}",)))
    path.write_text('{"text": null, "meta": {"set": "x"}}\n')
    with pytest.raises(UserError, match=r"pile.jsonl:1 has no meta.set and text .*its text is no text but NoneType"):
        domains(Settings(text=(f"@meta.set=jsonl:{path}",)))
    path.write_text('{"text": "t", "meta": {"set": {"a": 1}}}\n')
    with pytest.raises(UserError, match=r"its label is no text but dict"):
        domains(Settings(text=(f"@meta.set=jsonl:{path}",)))


def test_a_label_is_read_from_the_file_again_and_not_kept(tmp_path):
    """Blank lines, letters of several bytes and several files between the rows."""
    rows = [{"body": f"\u00e9{i}", "kind": i % 3} for i in range(9)]
    for name, part in (("a", rows[:4]), ("b", rows[4:])):
        lines = [json.dumps(row, ensure_ascii=False) for row in part]
        (tmp_path / f"{name}.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    found = domains(Settings(text=(f"@kind=jsonl[body]:{tmp_path}",)))
    for _ in range(2):
        assert {name: list(each) for name, each in found.items()} == {
            str(k): [row["body"] for row in rows if row["kind"] == k] for k in range(3)
        }
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(UserError, match=r"a.jsonl was changed while it was read"):
        list(found["0"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (("nothing",), "--text=nothing: write NAME=SOURCE:PATH"),
        (("a=csv:x",), "--text=a=csv:x: write NAME=SOURCE:PATH"),
        (("a=text:/none/there",), "--text=a=text:/none/there: /none/there matches no file"),
        (("stdlib", "stdlib"), "two domains named code"),
        (("@x=text:eval.py",), "labels inside rows are read from jsonl"),
    ],
)
def test_text_that_means_nothing_is_refused(text, words):
    with pytest.raises(UserError, match=words):
        domains(Settings(text=text))


def test_the_standard_librarys_documents_are_joined_for_long_contexts(tmp_path):
    """Of 20,000 bytes there are few; of others' files only whole documents count."""
    who = subject(Settings(context_documents=12), model__max_seq_len=20_000)
    found = context._tails(who, 20_000)
    assert [len(ids) for ids in found] == [20_000] * 12
    assert len({tuple(ids) for ids in found}) == 12
    comments = list(domains(Settings())["comments"])
    assert max(len(each.encode()) for each in comments) < 20_000
    ends = [TOKENIZER.decode(ids)[-40:] for ids in found]
    assert any(each.endswith(end) for end in ends for each in comments), "comments took part too"
    for i, each in enumerate(("a" * 15_000, "b" * 15_000)):
        (tmp_path / f"{i}.txt").write_text(each)
    with pytest.raises(UserError, match="no document has 20000 tokens, the longest has 15000"):
        context._tails(dataclasses.replace(who, settings=Settings(text=(f"a=text:{tmp_path}",))), 20_000)
