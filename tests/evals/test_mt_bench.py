"""MT-Bench's answers: FastChat's format and temperatures, turns that see the answers before them, and interruptions."""

import collections
import json

import jax
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.data import encode_chat
from mixtral_jax.data.tokenizer import ByteTokenizer
from mixtral_jax.evals import mt_bench, pages
from mixtral_jax.evals.mt_bench import answer_all, answer_line, conversation, model_id_of, room, temperature
from mixtral_jax.evals.mt_bench_questions import QUESTIONS, read_questions
from mixtral_jax.evals.settings import Settings
from mixtral_jax.evals.subject import Subject
from mixtral_jax.evals.work import Work
from mixtral_jax.generate import Continuation
from mixtral_jax.models import mixtral
from tests.helpers import on_mesh, shard, tiny

TOKENIZER = ByteTokenizer()
ASKED = [
    {"question_id": 81, "category": "writing", "turns": ["Say A.", "And B."]},
    {"question_id": 82, "category": "math", "turns": ["1 + 1?", "And + 1?"], "reference": ["2", "3"]},
    {"question_id": 83, "category": "stem", "turns": ["Why?"]},
    {"question_id": "x", "category": "coding", "turns": ["Loop.", "Again."], "required_temperature": 0.3},
]


class Stub:
    """Answers with the length of what it has read, and remembers everything."""

    def __init__(self, after: int | None = None):
        self.read, self.left = [], after

    def __call__(self, contexts, rooms, sampling, message):
        assert message
        for i, (context, tokens) in reversed(list(enumerate(zip(contexts, rooms)))):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left = None if self.left is None else self.left - 1
            self.read.append((tuple(context), tokens, sampling.temperature))
            yield i, Continuation(f" read {len(context)} \n", [1, 2, 3], "eos" if len(context) % 2 else "length")


def answered(stub, work, questions=ASKED, limit=10_000, most=100):
    answer_all(questions, TOKENIZER, stub, limit, most, work)
    return [answer_line(question, "me", "key", work) for question in questions]


def context_of(*said) -> tuple[int, ...]:
    roles = ("user", "assistant")
    return tuple(encode_chat(TOKENIZER, [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]))


def test_lines_are_fastchats():
    lines = answered(Stub(), Work(None, "x", "key"))
    assert [line["question_id"] for line in lines] == [81, 82, 83, "x"]
    for line, question in zip(lines, ASKED):
        assert list(line) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
        (choice,) = line["choices"]
        assert choice["index"] == 0
        assert len(choice["turns"]) == len(question["turns"])
        assert all(isinstance(answer, str) and answer == answer.strip() for answer in choice["turns"])
        assert line["model_id"] == "me"
        assert line["tstamp"] > 1.7e9
    assert len({line["answer_id"] for line in lines}) == 4
    again = answered(Stub(), Work(None, "x", "key"))
    assert [line["answer_id"] for line in again] == [line["answer_id"] for line in lines]
    work = Work(None, "x", "key")
    answered(Stub(), work)
    assert answer_line(ASKED[0], "other", "key", work)["answer_id"] != lines[0]["answer_id"]


def test_the_second_turn_has_read_the_first_answer():
    stub = Stub()
    lines = answered(stub, Work(None, "x", "key"))
    read = {context for context, _, _ in stub.read}
    assert len(read) == 7
    for question, line in zip(ASKED, lines):
        first, *later = line["choices"][0]["turns"]
        asked = context_of(question["turns"][0])
        assert asked in read
        assert first == f"read {len(asked)}"
        if later:
            again = context_of(question["turns"][0], first, question["turns"][1])
            assert again in read
            assert later == [f"read {len(again)}"]


def test_temperatures_are_fastchats():
    stub = Stub()
    answered(stub, Work(None, "x", "key"))
    heat = {context: heat for context, _, heat in stub.read}
    for question, want in zip(ASKED, (0.7, 0.0, 0.1, 0.3)):
        assert heat[context_of(question["turns"][0])] == want
    assert sorted(heat.values()) == [0, 0, 0.1, 0.3, 0.3, 0.7, 0.7]
    wanted = dict(writing=0.7, roleplay=0.7, extraction=0, math=0, coding=0, reasoning=0, stem=0.1, humanities=0.1)
    for category, want in (wanted | {"arena-hard-200": 0, "something else": 0.7}).items():
        assert temperature({"category": category}) == want


def test_an_empty_answer_is_left_out_of_the_conversation():
    said = conversation(ASKED[0], [""])
    assert [message["role"] for message in said] == ["user", "user"]
    assert encode_chat(TOKENIZER, said) == list(context_of("Say A.\n\nAnd B."))


def test_room_is_shared_with_the_turns_to_come():
    context, later = [0] * 100, "And B."
    asked = len(context_of(later))
    for limit, want in (
        (10_000, 256),
        (100 + asked + 2 * 256, 256),
        (100 + asked + 2 * 256 - 1, 192),
        (100 + asked + 2 * 63 + 1, 63),
        (100 + asked, 0),
        (50, 0),
    ):
        assert room(TOKENIZER, context, [later], limit, 256) == want
    assert room(TOKENIZER, context, [], 100 + 70, 256) == 64


def test_what_does_not_fit_is_an_empty_answer_and_counted():
    work = Work(None, "x", "key")
    long = ASKED[0] | {"question_id": 84, "turns": ["x" * 200, "short"]}
    stub = Stub()
    lines = answered(stub, work, [long, ASKED[0]], limit=200)
    assert lines[0]["choices"][0]["turns"] == ["", ""]
    assert all(lines[1]["choices"][0]["turns"])
    assert all(len(context) + tokens <= 200 for context, tokens, _ in stub.read)
    figures = mt_bench._figures([long, ASKED[0]], work)
    assert figures["answers"] == 4
    assert figures["empty_share"] == 0.5
    assert figures["cut_share"] >= 0.5
    assert figures["mean_tokens"] == 1.5


def test_an_interrupted_one_goes_on_and_answers_nothing_twice(tmp_path):
    want = answered(Stub(), Work(None, "x", "key"))
    read = collections.Counter()
    for after in (0, 1, 2, 3):
        stub = Stub(after)
        with pytest.raises(KeyboardInterrupt), Work(tmp_path, "x", "key") as work:
            answered(stub, work)
        read.update(stub.read)
    stub = Stub()
    with Work(tmp_path, "x", "key") as work:
        got = answered(stub, work)
    read.update(stub.read)
    assert [line | {"tstamp": 0} for line in got] == [line | {"tstamp": 0} for line in want]
    assert set(read.values()) == {1}
    assert len(read) == 7
    with Work(tmp_path, "x", "key") as work:  # the same number, another question
        changed = [ASKED[0] | {"turns": ["Say C.", "And D, please."]}]
        assert answered(Stub(), work, changed)[0]["choices"] != got[0]["choices"]


def test_our_own_questions_are_in_the_format(tmp_path):
    own = read_questions("")
    assert len(own) == len(QUESTIONS)
    assert all(len(question["turns"]) == 2 for question in own)
    assert {question["category"] for question in own} == mt_bench.TEMPERATURES.keys() - {"arena-hard-200"}
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps(question) + "\n\n" for question in own))
    assert read_questions(str(path)) == json.loads(json.dumps(own))
    assert read_questions(str(path), 2) == json.loads(json.dumps(own[:2]))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: this is no JSON"),
        ("[1]", "line 2: a question is a JSON object .* and this is a list"),
        ('{"category": "a", "turns": ["x"]}', "line 2: question_id is missing"),
        ('{"question_id": 2, "turns": ["x"]}', "line 2: category is missing"),
        ('{"question_id": 2, "category": "a"}', "line 2: turns is missing"),
        ('{"question_id": true, "category": "a", "turns": ["x"]}', "line 2: question_id is true"),
        ('{"question_id": 2, "category": 3, "turns": ["x"]}', "line 2: category is 3"),
        ('{"question_id": 2, "category": "a", "turns": "x"}', "line 2: turns is"),
        ('{"question_id": 2, "category": "a", "turns": []}', "at least one text"),
        ('{"question_id": 2, "category": "a", "turns": ["x", " "]}', "none that is empty"),
        (
            '{"question_id": 2, "category": "a", "turns": ["x"], "required_temperature": -1}',
            "required_temperature is -1",
        ),
        (json.dumps(ASKED[0]), "line 2: question_id 81 is that of line 1"),
    ],
)
def test_a_line_that_is_no_question_is_refused_by_its_number(tmp_path, line, words):
    path = tmp_path / "question.jsonl"
    path.write_text(f"{json.dumps(ASKED[0])}\n{line}\n")
    with pytest.raises(UserError, match=words) as caught:
        mt_bench.check(tiny(), Settings(mt_bench_questions=str(path)))
    assert str(path) in str(caught.value)


def test_what_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "empty").write_text("\n")
    for name, words in (("none", "cannot be read"), ("empty", "holds 0 questions")):
        with pytest.raises(UserError, match=words):
            mt_bench.check(tiny(), Settings(mt_bench_questions=str(tmp_path / name)))
    with pytest.raises(UserError, match="--mt_bench_tokens=0"):
        mt_bench.check(tiny(), Settings(mt_bench_tokens=0))


def test_a_folder_that_cannot_be_written_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="kept in unfinished: make room or correct --out"):
        mt_bench.write_lines(tmp_path / "file" / "x.jsonl", [], "unfinished")


@pytest.mark.parametrize(
    ("name", "model_id"),
    [
        ("runs/demo/sft, step 40", "demo-sft-step-40"),
        ("/a/b/c/run.1, step 7", "c-run.1-step-7"),
        ("hf:Mixtral-8x7B-Instruct-v0.1", "Mixtral-8x7B-Instruct-v0.1"),
        ("gs://bucket/a run", "bucket-a-run"),
        ("..", "model"),
    ],
)
def test_names_of_models_are_names_of_files(name, model_id):
    assert model_id_of(name) == model_id


def measured(folder, questions, **mesh):
    config, devices = on_mesh(
        tiny(model__vocab_size=258, model__num_layers=1, model__max_seq_len=192, model__init_std=0.4), **mesh
    )
    subject = Subject(
        name="runs/x, step 3",
        config=config,
        model=shard(mixtral.init(config.model, jax.random.key(0)), devices),
        mesh=devices,
        tokenizer=TOKENIZER,
        settings=Settings(mt_bench_questions=str(questions), mt_bench_tokens=8, batch_tokens=1024),
        open_corpus=lambda: None,
        note=lambda line: None,
        folder=folder / "unfinished",
    )
    with jax.set_mesh(devices):
        return json.loads(json.dumps(dict(mt_bench.mt_bench(subject))))


def test_a_model_answers_into_a_file_the_same_on_a_mesh(tmp_path):
    """Sampled answers too, for a row's random numbers are its own."""
    path = tmp_path / "question.jsonl"
    path.write_text("".join(f"{json.dumps(question)}\n" for question in ASKED[:1]))
    found, lines = [], []
    for name, mesh in (("a", {}), ("b", dict(context=2, data=2))):
        results = measured(tmp_path / name, path, **mesh)
        assert results.pop("file") == "mt_bench/model_answer/x-step-3.jsonl"
        written = (tmp_path / name / "mt_bench/model_answer/x-step-3.jsonl").read_text().splitlines()
        lines.append([json.loads(line) | {"tstamp": 0} for line in written])
        found.append(results)
        assert (tmp_path / name / "mt_bench/question.jsonl").read_text() == path.read_text()
    assert found[0] == found[1]
    assert lines[0] == lines[1]
    assert any(lines[0][0]["choices"][0]["turns"]), "it should say something for the test to compare"
    assert found[0]["questions"] == 1
    assert found[0]["answers"] == 2
    assert [question["answers"] for question in found[0]["first"]] == [line["choices"][0]["turns"] for line in lines[0]]
    table, first = mt_bench.report({"x": found[0], "y": found[1]})
    assert "8.30" in table.note
    assert [row[:3] for row in table.rows] == [[name, of, 2] for name in "xy" for of in ("all", "writing")]
    assert first.plain.count("Say A.") == 1
    assert first.plain.count("[y] ") == 2


def test_a_report_escapes_what_a_model_says(tmp_path):
    nasty = "<script>alert(1)</script>\n\x1b[31m"
    figures = {"answers": 1, "mean_tokens": 1.0, "cut_share": 0.0, "empty_share": 0.0}
    first = [ASKED[2] | {"answers": [nasty]}]
    results = figures | {"questions": 1, "categories": {"stem": figures}, "first": first}
    pages.write(tmp_path, "x", {"<m>": {"mt_bench": results}}, {})
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\n\\x1b[31m" in page
    assert "\x1b" not in page
