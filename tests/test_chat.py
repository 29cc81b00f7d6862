"""Chat: the answer as a message, and the loop on a terminal. Ids are tested in data/test_chat_ids.py."""

import io
from pathlib import Path

import jax.numpy as jnp
import mistral_common
import pytest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mixtral_jax.checkpoint import Checkpoints
from mixtral_jax.config import UserError
from mixtral_jax.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, load_tokenizer
from mixtral_jax.generate import encode_chat, generate, reply
from mixtral_jax.generate.__main__ import main
from mixtral_jax.workdir import store_run
from tests.convert import test_export_parity as varied
from tests.test_decode import byte_model
from tests.test_sampling import scripted

DATA = Path(mistral_common.__file__).parent / "data"
TEXTS = [
    "Hello",
    "How?",
    " two  spaces ",
    "",
    "a <s> and [INST] [/INST] in the text</s>",
    "def f(x):\n\treturn  x\n",
    "日本語 und naïve 😀👍🏽",
    "\n\n",
    "▁",
    "0.5 % of\u00a0it",
]


@pytest.fixture(scope="module")
def v1():
    return load_tokenizer("mistral-v1", "")


@pytest.fixture(scope="module")
def mistral():
    return MistralTokenizer.v1()


def talk(*turns: str) -> list[dict]:
    """`user text`, `assistant text` ... as messages."""
    return [dict(zip(("role", "content"), turn.split(" ", 1))) for turn in turns]


def test_the_tokenizer_has_mistral_commons_ids(v1, mistral):
    encode = mistral.instruct_tokenizer.tokenizer.encode
    sources = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))[:8]]
    for text in [*TEXTS, *varied.TEXTS, *varied.texts(), *sources]:
        assert v1.encode(text) == encode(text, bos=False, eos=False), repr(text[:200])


def test_a_tokenizer_of_a_later_format_is_refused_by_the_command(tmp_path, capsys):
    """Before weights are read: here there are none."""
    later = next(path for path in DATA.iterdir() if path.name.endswith(".model.v7"))
    (tmp_path / "checkpoints" / "1" / "params").mkdir(parents=True)
    SentencePieceTokenizer(later.read_bytes(), later.name).save(tmp_path / "tokenizer")
    assert main([f"--checkpoint={tmp_path}", "--chat"]) == 2
    assert "format v7 or later" in capsys.readouterr().err


def drained(pieces):
    """The pieces of a generator, and what it returned."""
    found = []
    while True:
        try:
            found.append(next(pieces))
        except StopIteration as end:
            return found, end.value


def test_an_answer_is_a_text_of_its_own(v1, monkeypatch):
    """The space that the tokenizer puts before every text is none of the answer, but of a continuation it is."""
    _, model = byte_model()
    messages, said = talk("system Be brief.", "user Hello"), "  Hi there 日本 "
    tokens = [*v1.encode(said), v1.eos_id]
    scripted(monkeypatch, [tokens])
    pieces, done = drained(reply(model, v1, messages, max_tokens=40))
    assert "".join(pieces) == done.text == said
    (continued,) = generate(model, v1, [encode_chat(v1, messages)], max_tokens=40)
    assert continued.text == " " + said
    # What was said, said again as a message, is the tokens that were made.
    longer = encode_chat(v1, [*messages, {"role": "assistant", "content": done.text}, *talk("user And?")])
    assert longer[: len(encode_chat(v1, messages) + tokens)] == encode_chat(v1, messages) + tokens


def test_an_answer_takes_the_room_there_is():
    _, model = byte_model()  # of 128 positions
    messages = talk("user " + "x" * 100)
    context = encode_chat(ByteTokenizer(), messages)
    pieces, done = drained(reply(model, ByteTokenizer(), messages, max_tokens=512))
    assert done.reason == "length"
    assert len(done.tokens) == len(pieces) == 128 - len(context)
    with pytest.raises(UserError, match=r"/reset"):
        drained(reply(model, ByteTokenizer(), talk("user " + "x" * 120), max_tokens=512))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A stored run of the byte model."""
    folder = tmp_path_factory.mktemp("run")
    config, model = byte_model()
    store_run(folder, config.to_dict())
    ByteTokenizer().save(folder / "tokenizer")
    checkpoints = Checkpoints(folder)
    checkpoints.save(3, model, {"count": jnp.zeros(())}, {})
    checkpoints.close()
    return folder


def answer(messages: list[dict], n: int) -> str:
    return drained(reply(byte_model()[1], ByteTokenizer(), messages, max_tokens=n))[1].text


def test_the_command_answers_prompts_once(run, capsys):
    command = [
        f"--checkpoint={run}",
        "--chat",
        "--system=S",
        "--prompt=a",
        "--prompt=bc",
        "--max_tokens=6",
        "--stacked",
    ]
    assert main(command) == 0
    want = [answer(talk("system S", f"user {text}"), 6) for text in ("a", "bc")]
    assert capsys.readouterr().out == f"{want[0]}\n{'-' * 40}\n{want[1]}\n"


def test_the_loop_remembers_and_forgets(run, capsys, monkeypatch):
    lines = ["one", "", "two", "/help", "/reset", "one", "x" * 200, "/quit", "never"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    assert main([f"--checkpoint={run}", "--chat", "--system=S", "--max_tokens=5", "--stacked"]) == 0
    first = answer(talk("system S", "user one"), 5)
    messages = [*talk("system S", "user one"), {"role": "assistant", "content": first}, *talk("user two")]
    second = answer(messages, 5)
    out, err = capsys.readouterr()
    assert out == f"{first}\n{second}\n{first}\n\n"
    assert "commands are /reset and /quit" in err
    assert "a new conversation" in err
    assert "max_seq_len is 128" in err


def test_an_answer_cut_short_stays_in_the_conversation(monkeypatch, capsys):
    from mixtral_jax.generate import terminal

    def speak(weights, tokenizer, messages, **settings):
        heard.append([m["content"] for m in messages])
        yield "half an "
        if len(heard) == 1:
            raise KeyboardInterrupt
        yield "answer"

    heard: list = []
    monkeypatch.setattr(terminal, "reply", speak)
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
    terminal.converse(None, None, "")
    assert heard == [["a"], ["a", "half an ", "b"]]
    out, err = capsys.readouterr()
    assert out == "half an \nhalf an answer\n"
    assert "cut short" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--prompt is missing"),
        (["--system=x", "--prompt=a"], "add --chat"),
        (["--chat", "--num_samples=2", "--temperature=1"], "needs a --prompt"),
        (["--chat", "--prompt=a", "--max_tokens=0"], "at least 1"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(arguments, words, capsys):
    assert main(["--checkpoint=none", *arguments]) == 2
    assert words in capsys.readouterr().err
