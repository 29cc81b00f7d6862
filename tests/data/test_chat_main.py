"""The data command for conversations and pairs: previews, reports that a loop agrees with, and copies that validate clean."""

import collections
import json
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from mixtral_jax.data import Batches, corrected, open_batches, open_chat_corpus, pack
from mixtral_jax.data.__main__ import main
from mixtral_jax.data.mend import RULES, mend
from mixtral_jax.data.preview import preview_lines
from mixtral_jax.data.tokenizer import load_tokenizer
from tests.data.test_chat_ids import FILES

# ml_collections loads a config file by a function that Python 3.12 will no longer have.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
BYTES = load_tokenizer("bytes", "unused")


def user(content):
    return {"role": "user", "content": content}


def answer(content, **weight):
    return {"role": "assistant", "content": content, **weight}


def conversation(i):
    turns = [user(f"What is {i}?"), answer(f"A number, {i}.")]
    return {"messages": turns + [user("And more?"), answer("Nothing.", weight=0)] * (i % 3 == 0)}


def pair(i):
    return {"prompt": f"What is {i}?", "chosen": f"A number, {i}.", "rejected": "No idea."}


GOOD = {"sft": conversation, "dpo": pair}


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes rows (objects, or lines as they are) behind 40 good ones, and returns the flags."""

    def make(stage, *rows, good=40, name="rows.jsonl", **keys):
        lines = [json.dumps(GOOD[stage](i)).encode() for i in range(good)]
        lines += [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path = tmp_path / name
        path.write_bytes(b"\n".join(lines))
        values = {
            "train.stage": stage,
            "train.steps": 10,
            "train.batch_size": 4,
            "train.seq_len": 96,
            "optim.warmup_steps": 5,
            "data.source": "jsonl",
            "data.path": path,
            "data.cache_dir": tmp_path / "cache",
            "data.heldout_fraction": 0.2,
        }
        return ["--config=configs/tiny.py:tiny", *(f"--config.{key}={value}" for key, value in (values | keys).items())]

    return make


BAD = {
    "sft": [
        (b"{not json", "not JSON"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "messages[0].role is 'judge'"),
        ({"prompt": "A", "completion": 7}, "of types str and int"),
        ({"prompt": "A", "completion": "x" * 100}, "too_long, 117 positions"),
        ({"messages": []}, "empty"),
        ({"messages": [user("Q"), answer("A", weight=0)]}, "no_trained_token"),
    ],
    "dpo": [
        ([1], "a JSON list"),
        ({"prompt": "A", "chosen": "x"}, "no key 'rejected'"),
        ({"prompt": "A", "chosen": "x" * 50, "rejected": "y" * 50}, "too_long, 134 positions"),
        ({"prompt": "A", "chosen": "x", "rejected": "x"}, "identical"),
        ({"prompt": "A", "chosen": "", "rejected": "x"}, "no_trained_token"),
    ],
}


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_validate_names_every_row_that_is_left_out(write, stage, tmp_path, capsys):
    out = tmp_path / "report.json"
    flags = write(stage, *(row for row, _ in BAD[stage]))
    assert main([*flags, "--validate", f"--out={out}"]) == 2
    captured = capsys.readouterr()
    for number, (_, reason) in enumerate(BAD[stage], 41):
        (line,) = [line for line in captured.out.splitlines() if line.startswith(f"{tmp_path}/rows.jsonl:{number}: ")]
        assert reason in line
    report = json.loads(out.read_text())
    bad, dropped = report["bad_rows"]["total"], report["dropped"]["total"]
    assert (bad, dropped) == ((3, 3) if stage == "sft" else (2, 3))
    assert captured.err.startswith(f"error: {bad} rows cannot be read, and data.max_bad_rows=0")
    assert [row[1] for row in report["dropped"]["rows"]] == [why.split(",")[0] for _, why in BAD[stage][bad:]]
    counts = report["sources"]["jsonl"]
    unit = "conversations" if stage == "sft" else "pairs"
    rules = ("bad", "too_long", "empty", "no_trained_token", "identical")
    assert counts["rows"] == 40 + len(BAD[stage]) == counts[unit] + sum(counts[rule] for rule in rules)
    assert main([*flags, "--validate", f"--config.data.max_bad_rows={bad}"]) == 0
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_counts_are_those_of_the_corpus_and_its_batches(write, stage, tmp_path, make_data):
    out = tmp_path / "report.json"
    # One row occurs twice, another with other weights, which makes it another; rows that fill more than half of one.
    again = {"messages": [*conversation(0)["messages"][:3], answer("Nothing.", weight=1)]}
    flags = write(stage, GOOD[stage](0), *([again] if stage == "sft" else ()), *(long(stage, i) for i in range(9)))
    assert main([*flags, "--validate", f"--out={out}", "--tokens_per_second=96"]) == 0
    report = json.loads(out.read_text())
    data = make_data(source="jsonl", path=str(tmp_path / "rows.jsonl"), heldout_fraction=0.2)
    corpus = open_chat_corpus(data, BYTES, stage, 96, progress=False)
    unit, each = ("conversations", 1) if stage == "sft" else ("pairs", 2)
    for side, split in (("train", corpus.train), ("heldout", corpus.heldout)):
        found = report["sources"]["jsonl"][side]
        assert found[unit] == len(split.ids) // each
        assert found["tokens"] == len(split.tokens)
        assert found["trained_tokens"] == np.count_nonzero(split.weights)
        assert found["trained_share"] == found["trained_tokens"] / (len(split.tokens) - len(split.ids))
        assert found["document_tokens"]["max"] == split.lengths.max()
        assert found["document_tokens"]["p50"] == sorted(split.lengths)[(len(split.lengths) - 1) // 2]
    counted = corpus.report["sources"]["jsonl"]
    assert report["duplicates"] == counted["duplicates"] == 1
    assert report["sources"]["jsonl"]["longest"] == counted["longest"]
    batches = open_batches(data, corpus, BYTES, batch_size=4, seq_len=96, seed=0, pairs=stage == "dpo")
    (usage,) = batches.usage(10)
    run = report["run"]
    used = run["sources"]["jsonl"]
    assert (used["rows"], used["tokens"], used["epochs"]) == usage[1:]
    assert used["steps_per_epoch"] == pytest.approx(10 / usage.epochs)
    assert run["seconds"] == 10 * 4
    trained = sum(np.count_nonzero(batches.batch(k)["loss_weights_BT"]) for k in range(10))
    assert run["trained_tokens"] == pytest.approx(trained, rel=0.05)


def long(stage, i):
    """A row with one long answer."""
    keys = ("completion",) if stage == "sft" else ("chosen", "rejected")
    return {"prompt": f"Long {i}?"} | dict(zip(keys, ("x" * (30 + i), "")[: len(keys)])) | {keys[-1]: "y" * (20 + i)}


def test_prompts_and_turns(write, tmp_path):
    out = tmp_path / "report.json"
    cases = ["What is 1?", "what is 1?", "WHAT IS 1?", "WHAT is 1?", "what IS 1?", "What IS 1?"]
    spaces = ["What is 2?", "What  is 2?", "What is  2?", "What  is  2?", " What is 2?", "What is 2? "]
    rows = [{"prompt": spelling, "completion": str(i)} for i, spelling in enumerate(cases + spaces)]
    assert main([*write("sft", *rows, good=6), "--validate", f"--out={out}", "--config.data.heldout_fraction=0.5"]) == 0
    report = json.loads(out.read_text())
    assert report["prompts"]["train"] + report["prompts"]["heldout"] == 6 + len(rows) - 2
    assert report["prompts"]["both"] == 0
    assert report["prompts"]["nearly_both"] == 2
    splits = [report["sources"]["jsonl"][side] for side in ("train", "heldout")]
    assert sum(split["turns"] for split in splits) == 2 * (6 + len(rows)) + 2 * 2


def test_prompts_that_read_the_same_on_both_sides_are_found(write, tmp_path, monkeypatch):
    # The split is made to depend on more than the prompt, as a mistake in it would.
    sides = iter([i % 3 / 3 for i in range(1000)])
    monkeypatch.setattr("mixtral_jax.data.validate_chat.hash_position", lambda text: next(sides))
    out = tmp_path / "report.json"
    rows = [{"prompt": "Why?", "completion": str(i)} for i in range(6)]
    main([*write("sft", *rows, good=4), "--validate", f"--out={out}"])
    assert json.loads(out.read_text())["prompts"]["both"] == 1


def test_a_file_that_breaks_off_is_a_problem_and_the_rest_is_read(write, tmp_path, capsys):
    flags = write("sft", name="b.jsonl", **{"data.source": "parquet", "data.path": tmp_path})
    for name in "ac":
        pyarrow.parquet.write_table(pyarrow.table({"prompt": ["Q"], "completion": ["A"]}), tmp_path / f"{name}.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    out = tmp_path / "report.json"
    assert main([*flags, "--validate", f"--out={out}"]) == 2
    assert "a.parquet: not readable as Parquet" in capsys.readouterr().err
    assert json.loads(out.read_text())["sources"]["parquet"]["conversations"] == 1


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([{"messages": []}], {}, "none of its 1 rows is left for conversations (1 empty)"),
        ([conversation(3)], {"train.seq_len": 48}, "the longest has 71 positions and train.seq_len=48"),
        ([], {}, "there are no rows in it"),
        ([conversation(1)], {"data.heldout_fraction": 0.999999}, "has no training conversation"),
        ([conversation(1)], {"data.heldout_fraction": 1e-9}, "no conversation is held out"),
        ([conversation(1)], {"model.vocab_size": 200}, "258 ids and model.vocab_size=200"),
        ([conversation(1)], {"data.source": "text"}, "a text file has no conversations"),
    ],
)
def test_what_keeps_a_run_from_starting_is_a_problem(write, rows, changes, message, capsys):
    assert main([*write("sft", *rows, good=0, **changes), "--validate"]) == 2
    assert message in capsys.readouterr().err


def test_the_preview_marks_the_answers_of_pairs(write, tmp_path, make_data, capsys):
    assert main([*write("dpo"), "--preview=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    marks = [line.rpartition(", ")[2] for line in lines if line.startswith("---")]
    assert marks == ["chosen)", "rejected)"] * (len(marks) // 2)
    assert len(marks) >= 4
    at = next(i for i, line in enumerate(lines) if line.endswith("chosen)"))
    number = int(lines[at].partition("rows.jsonl:")[2].partition(" ")[0]) - 1
    assert lines[at + 1] == f"[[<BOS>]][[[INST] What is {number}? [/INST]]]A number, {number}.<EOS>"
    assert lines[at + 3].endswith("]]No idea.<EOS>")
    data = make_data(source="jsonl", path=str(tmp_path / "rows.jsonl"), heldout_fraction=0.2)
    corpus = open_chat_corpus(data, BYTES, "dpo", 96, progress=False)
    batch = open_batches(data, corpus, BYTES, batch_size=2, seq_len=96, seed=0, pairs=True).batch(0)
    coloured = "\n".join(preview_lines(batch, BYTES, colour=True))
    assert "\033[32mchosen\033[0m and \033[31mrejected\033[0m answers" in coloured
    assert "\033[31mNo idea.<EOS>\033[0m" in coloured
    assert "\033[32mA number, " in coloured


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_the_preview_shows_every_special_token(make_data, tmp_path, version):
    tokenizer = load_tokenizer(str(FILES[version]), "")
    turns = [user("Hello"), answer("Hi there"), answer("again", weight=0.5), user("How?"), answer("So.", weight=0)]
    (tmp_path / "corpus" / "a.jsonl").write_text(json.dumps({"messages": turns}) + "\n" + json.dumps(conversation(1)))
    data = make_data(source="jsonl", heldout_fraction=0.5)
    corpus = open_chat_corpus(data, tokenizer, "sft", 96, progress=False)
    shown = ""
    for split in (corpus.train, corpus.heldout):
        batch = Batches(split, pack(split.lengths, 96), batch_size=1, seq_len=96, seed=0).batch(0)
        shown += "\n".join(preview_lines(batch, tokenizer, colour=False)) + "\n"
    (line,) = [line for line in shown.splitlines() if "Hello" in line]
    wanted = "[[<BOS>]][[[INST] Hello [/INST]]]Hi there<EOS>again<EOS>[[[INST] How? [/INST]So.<EOS>]]"
    assert line.replace(" ", "") == wanted.replace(" ", "")  # v3 has no spaces round the markers
    assert ("[INST] and" in shown) == (version == "v3")  # in v1 they are no tokens of their own


SHAREGPT = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
MENDED = [  # stage, the row, what it becomes, the rules
    (
        "sft",
        {"conversations": SHAREGPT, "id": 7},
        {"id": 7, "messages": [user("Q"), answer("A")]},
        ["sharegpt", "role"],
    ),
    (
        "sft",
        {"conversations": SHAREGPT, "system": "S"},
        {"messages": [{"role": "system", "content": "S"}, user("Q"), answer("A")]},
        ["sharegpt", "role"],
    ),
    (
        "dpo",
        {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "B"}},
        {"prompt": [user("Q")], "chosen": [answer("A")], "rejected": [answer("B")]},
        ["sharegpt", "role"],
    ),
    (
        "sft",
        {"messages": [user("Q") | {"role": " Human"}, answer("A")]},
        {"messages": [user("Q"), answer("A")]},
        ["role"],
    ),
    ("sft", {"messages": [user("Q") | {"weight": 1}, answer("A")]}, {"messages": [user("Q"), answer("A")]}, ["weight"]),
    (
        "sft",
        {
            "messages": [
                {"role": "system", "content": ""},
                user("Q"),
                answer("A"),
                user("R"),
                answer(None),
                user(" "),
                answer("B"),
            ]
        },
        {"messages": [user("Q"), answer("A")]},
        ["empty_message"],
    ),
    (
        "sft",
        {"messages": [answer("Hi"), user("Q"), answer("A"), user("R")]},
        {"messages": [user("Q"), answer("A")]},
        ["leading_answer", "trailing_question"],
    ),
    ("sft", b'\xef\xbb\xbf{"prompt": "Q", "completion": "A"}', {"prompt": "Q", "completion": "A"}, ["bom"]),
    ("sft", {"messages": [user("Q"), user("R"), answer("A")]}, {"messages": [user("Q"), user("R"), answer("A")]}, []),
    ("sft", *[{"messages": [user("Q") | {"from": "human", "value": "R"}, answer("A")]}] * 2, []),
    ("dpo", pair(1), pair(1), []),
]
LEFT_OUT = [  # what no rule mends
    ("sft", b"{not json"),
    ("sft", b'{"prompt": "\xff", "completion": "A"}'),
    ("sft", {"messages": [user(7), answer("A")]}),
    ("sft", {"messages": [user("Q"), {"role": "tool", "content": "42"}, answer("A")]}),
    ("sft", {"messages": [user("Q"), answer("A", weight=-1)]}),
    ("sft", {"messages": [answer("A")]}),
    ("sft", {"messages": [user("Q"), answer("")]}),
    ("sft", {"messages": [user("Q"), answer(None, tool_calls=[1])]}),
    ("sft", {"messages": [user("Q"), 5]}),
    ("sft", {"messages": {"role": "user"}}),
    ("sft", {"prompt": "Q", "completion": "x" * 200}),
    ("sft", {"prompt": "Q", "completion": "\ud800"}),
    ("dpo", {"prompt": "Q", "chosen": "A"}),
    ("dpo", {"prompt": "Q", "chosen": "A", "rejected": "A"}),
    ("dpo", {"prompt": "Q", "chosen": "A", "rejected": ""}),
]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_corrected_copy_validates_clean(write, stage, tmp_path, capsys):
    fine = [(row, becomes, rules) for of, row, becomes, rules in MENDED if of == stage]
    lost = [row for of, row in LEFT_OUT if of == stage]
    flags = write(stage, *(row for row, _, _ in fine), *lost)
    before = (tmp_path / "rows.jsonl").read_bytes()
    copy, out = tmp_path / "new" / "copy.jsonl", tmp_path / "report.json"
    assert main([*flags, f"--write_corrected={copy}", f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in copy.read_text().splitlines()]
    assert lines == [GOOD[stage](i) for i in range(40)] + [becomes for _, becomes, _ in fine]
    report = json.loads(out.read_text())["corrected"]
    assert (report["rows"], report["kept"], report["left_out"]) == (
        40 + len(fine) + len(lost),
        40 + len(fine),
        len(lost),
    )
    assert report["rules"] == collections.Counter(rule for _, _, rules in fine for rule in rules)
    at = {f"{tmp_path}/rows.jsonl:{number}": rules for number, (_, _, rules) in enumerate(fine, 41) if rules}
    assert dict(report["rows_mended"]) == at
    assert [where for where, _ in report["rows_left_out"]] == [
        f"{tmp_path}/rows.jsonl:{number}" for number in range(41 + len(fine), 41 + len(fine) + len(lost))
    ]
    assert all(
        f"{where}: {'mended' if where in at else 'left out'}" in printed
        for where in (*at, *dict(report["rows_left_out"]))
    )
    assert main([*flags, f"--config.data.path={copy}", "--validate", f"--out={out}"]) == 0
    again = json.loads(out.read_text())
    assert again["problems"] == []
    assert again["bad_rows"]["total"] == again["dropped"]["total"] == 0
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    assert os.listdir(copy.parent) == ["copy.jsonl"]


def test_every_rule_is_tried_and_explained(capsys):
    assert {rule for *_, rules in MENDED for rule in rules} == set(RULES)
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(f"  {rule} " in out for rule in RULES)


def test_mending_twice_is_mending_once():
    for stage, row, *_ in MENDED:
        if isinstance(row, dict):
            kept = json.dumps(row)
            once, _ = mend(row, stage)
            assert mend(once, stage) == (once, [])
            assert json.dumps(row) == kept


def test_tables_are_corrected_too(write, tmp_path, monkeypatch):
    monkeypatch.setattr(corrected, "TICK_BYTES", 1)  # a part for every row group
    turns = [*SHAREGPT, {"from": "human", "value": "R"}]
    ours = [user("Q"), answer("A")]  # in one column, so that every message has four keys
    table = pyarrow.table({"conversations": [turns] * 20 + [ours] * 10 + [None], "score": [0.5] * 31})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    flags = write("sft", **{"data.source": "parquet", "data.path": tmp_path / "a.parquet"})
    copy, out = tmp_path / "copy.jsonl", tmp_path / "report.json"
    assert main([*flags, f"--write_corrected={copy}", f"--out={out}"]) == 0
    assert [json.loads(line) for line in copy.read_text().splitlines()] == [{"messages": [user("Q"), answer("A")]}] * 30
    assert json.loads(out.read_text())["corrected"]["rows_left_out"][0][0] == f"{tmp_path}/a.parquet:31"


@pytest.mark.parametrize(
    ("out", "changes", "message"),
    [
        ("rows.jsonl", {}, "is a file of data.path"),
        ("link.jsonl", {}, "is a file of data.path"),
        ("copy.jsonl", {"data.path": "{}"}, "would be read as part of data.path"),
        ("deep/copy.jsonl", {"data.path": "{}"}, "would be read as part of data.path"),
        ("rows2.jsonl", {"data.path": "{}/rows*"}, "would be read as part of data.path"),
        ("copy.jsonl", {"data.source": "stdlib"}, "with data.source=stdlib; it takes one source"),
        ("copy.jsonl", {"train.stage": "pretrain"}, "with train.stage=pretrain"),
        ("rows.jsonl/copy.jsonl", {}, "cannot be written"),
        ("copy.jsonl", {"train.seq_len": 8}, "none of the 40 rows is left"),
    ],
)
def test_where_no_copy_is_written(write, tmp_path, out, changes, message, capsys):
    changes = {key: str(value).format(tmp_path) for key, value in changes.items()}
    flags = write("sft", **changes)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "rows.jsonl")
    before = (tmp_path / "rows.jsonl").read_bytes()
    assert main([*flags, f"--write_corrected={tmp_path / out}"]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} <= {"rows.jsonl", "link.jsonl", "corpus", "cache"}


def test_a_mixture_has_no_copy(tmp_path, capsys):
    config = tmp_path / "mixed.py"
    config.write_text(
        "from configs import common\n"
        "def get_config(arg=None):\n"
        "    c = common.shrink(common.base())\n"
        "    c.train.stage = 'sft'\n"
        "    c.data.mixture = (dict(source='jsonl', path='a', weight=1.0), dict(source='stdlib', weight=1.0))\n"
        "    return c\n"
    )
    assert main([f"--config={config}", f"--write_corrected={tmp_path / 'copy.jsonl'}"]) == 2
    assert "with 2 sources; it takes one source" in capsys.readouterr().err


def test_a_copy_that_fails_midway_leaves_nothing_behind(write, tmp_path, monkeypatch):
    flags = write("sft")
    (tmp_path / "copy.jsonl").write_text("old")

    def fail(content):
        raise KeyboardInterrupt

    monkeypatch.setattr(corrected, "_line", fail)
    assert main([*flags, f"--write_corrected={tmp_path / 'copy.jsonl'}"]) == 130
    assert (tmp_path / "copy.jsonl").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "copy.jsonl"}


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_build_counts_conversations(write, stage, capsys):
    assert main(["build", *write(stage)]) == 0
    train, heldout = (
        line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("train", "held"))
    )
    assert int(train[1]) + int(heldout[2]) == (40 if stage == "sft" else 80)


def test_a_report_needs_something_to_report(write, capsys):
    assert main([*write("sft"), "--preview=1", "--out=report.json"]) == 2
    assert "--out=report.json without --validate" in capsys.readouterr().err
