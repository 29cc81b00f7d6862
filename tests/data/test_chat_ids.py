"""Token ids of conversations are mistral-common's, for the tokenizers of 8x7B (v1) and 8x22B (v3); weights beside them."""

import random
from pathlib import Path

import mistral_common
import numpy as np
import pytest
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.messages import FinetuningAssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mixtral_jax.config import UserError
from mixtral_jax.data.chat import encode_chat, encode_conversation
from mixtral_jax.data.conversations import Dropped, parse_conversation
from mixtral_jax.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, load_tokenizer

DATA = Path(mistral_common.__file__).parent / "data"
FILES = {
    "v1": DATA / "tokenizer.model.v1",
    "v2": DATA / "mistral_instruct_tokenizer_240216.model.v2",
    "v3": DATA / "mistral_instruct_tokenizer_240323.model.v3",
}
KINDS = {"user": UserMessage, "assistant": FinetuningAssistantMessage, "system": SystemMessage}
TEXTS = [
    "Hello",
    "How?",
    " two  spaces ",
    "trailing   ",
    "   ",
    "",
    "<s>",
    "a <s> and [INST] [/INST] in the text</s>",
    "[INST] [TOOL_CALLS] [IMG] [/INST]",
    "def f(x):\n\treturn  x\n",
    "日本語 und naïve 😀👍🏽",
    "\n\n",
    "line\r\nline \t",
    "▁",
    "0.5 % of\u00a0it\u200b\u2028",
    "\0 \x1b[0m \ufeff",
]


@pytest.fixture(scope="module", params=["v1", "v3"])
def version(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(version):
    return load_tokenizer(str(FILES[version]), "")


@pytest.fixture(scope="module")
def serving(version):
    return MistralTokenizer.from_file(str(FILES[version]), mode=ValidationMode.test)


@pytest.fixture(scope="module")
def finetuning(version):
    return MistralTokenizer.from_file(str(FILES[version]), mode=ValidationMode.finetuning)


def talk(*turns: str) -> list[dict]:
    """`user text`, `assistant text` ... as messages."""
    return [dict(zip(("role", "content"), turn.split(" ", 1))) for turn in turns]


def theirs(mistral, messages) -> list[int] | None:
    """mistral-common's ids; None where it refuses."""
    try:
        said = [KINDS[m["role"]](**{k: m[k] for k in ("content", "weight") if k in m}) for m in messages]
        return mistral.encode_chat_completion(ChatCompletionRequest(messages=said)).tokens
    except MistralCommonException:
        return None


def ours(encode, tokenizer, messages):
    try:
        return encode(tokenizer, messages)
    except UserError:
        return None


def conversation(rng: random.Random, length: int, regular: bool) -> list[dict]:
    """Messages of any roles, or of `regular` ones: a system prompt perhaps, then questions and answers in turn."""
    roles = rng.choices(("user", "assistant", "system"), (4, 4, 1), k=length)
    if regular:
        roles = ["system"] * rng.randint(0, 1) + ["user", "assistant"] * (length // 2)
    messages = []
    for role in roles:
        text = rng.choice(TEXTS) + rng.choice(["", " "]) + rng.choice(TEXTS)
        messages.append({"role": role, "content": rng.choice([text, rng.choice(TEXTS)])})
        if role == "assistant" and rng.random() < 0.3:
            messages[-1]["weight"] = rng.choice([0, 1])
    return messages


def answer_first(messages) -> bool:
    """mistral-common puts an empty question before it; ours refuses that."""
    spoken = [m["role"] for m in messages if m["role"] != "system"]
    return bool(spoken) and spoken[0] == "assistant"


def test_the_published_ids():
    messages = talk("user Hello", "assistant Hi there", "user How?")
    head = [1, 733, 16289, 28793, 22557, 733, 28748, 16289, 28793, 15359, 736, 2]
    v1 = encode_chat(load_tokenizer("mistral-v1", ""), messages)
    assert v1 == [*head, 733, 16289, 28793, 1602, 28804, 733, 28748, 16289, 28793]
    v3 = encode_chat(load_tokenizer(str(FILES["v3"]), ""), messages)
    assert v3 == [1, 3, 23325, 4, 16127, 1504, 2, 3, 2370, 29572, 4]


def test_training_ids_are_those_of_mistral_common(tokenizer, finetuning):
    rng = random.Random(0)
    same = refused = 0
    for i in range(5000):
        messages = conversation(rng, rng.randint(1, 7), regular=i % 2 == 0)
        expected, found = theirs(finetuning, messages), ours(encode_conversation, tokenizer, messages)
        if answer_first(messages):
            expected = None
        assert (found and found[0]) == expected, messages
        same, refused = same + (found is not None), refused + (found is None)
        if found:
            ids, weights = found
            assert len(ids) == len(weights)
            assert weights.dtype == np.float32
            assert ids.count(1) == 1
    assert same > 1500
    assert refused > 1500


def test_prompts_are_those_of_mistral_common(tokenizer, serving):
    rng = random.Random(1)
    same = refused = 0
    for i in range(3000):
        messages = [*conversation(rng, rng.randint(0, 6), regular=i % 2 == 0), *talk("user last")][:7]
        for m in messages:
            m.pop("weight", None)
        expected = None if answer_first(messages) else theirs(serving, messages)
        assert ours(encode_chat, tokenizer, messages) == expected, messages
        same, refused = same + (expected is not None), refused + (expected is None)
    assert same > 1000
    assert refused > 250


def test_weights_begin_where_the_prompt_ends(tokenizer, serving, finetuning):
    """By mistral-common's own prompts: the ids of a turn are those between two of them."""
    rng = random.Random(2)
    for _ in range(200):
        messages = [m for m in conversation(rng, 6, regular=True) if m["role"] != "system"]
        for m in messages:
            m["content"] = m["content"].strip(" ") or "x"
            m.pop("weight", None)
        said = [rng.choice([0.0, 0.5, 1.0, 2.0]) for _ in range(3)]
        weighted = [m | {"weight": said[i // 2]} if i % 2 else m for i, m in enumerate(messages)]
        ids, weights = encode_conversation(tokenizer, weighted)
        expected = np.zeros(len(ids), np.float32)
        for turn, weight in enumerate(said):
            prompt = theirs(serving, messages[: 2 * turn + 1])
            whole = theirs(finetuning, messages[: 2 * turn + 2])
            assert whole[: len(prompt)] == prompt
            expected[len(prompt) : len(whole)] = weight
            assert whole[-1] == tokenizer.eos_id
        np.testing.assert_array_equal(weights, expected)


def test_the_prompt_is_a_strict_prefix_of_what_is_trained(tokenizer):
    rng = random.Random(3)
    for _ in range(100):
        messages = conversation(rng, 6, regular=True)
        messages = [
            m | {"content": m["content"].strip(" ") or "y"} if m["role"] == "assistant" else m for m in messages
        ]
        messages[-1].pop("weight", None)
        prompt, (ids, weights) = encode_chat(tokenizer, messages[:-1]), encode_conversation(tokenizer, messages)
        assert ids[: len(prompt)] == prompt
        assert len(ids) > len(prompt) + 1
        assert (weights[len(prompt) :] == 1).all()
        assert ids[-1] == tokenizer.eos_id


def test_neighbours_of_other_weights_stay_apart(tokenizer, finetuning):
    for weights in ((0, 1), (1, 1), (1, None)):
        answers = [{"role": "assistant", "content": "a", "weight": w} for w in weights]
        messages = [*talk("user q"), *answers]
        ids, found = encode_conversation(tokenizer, messages)
        assert ids == theirs(finetuning, messages)
        assert ids.count(tokenizer.eos_id) == 1 + (weights[0] != weights[1])
        assert found[-1] == 1
        assert (found == 0).sum() >= (2 if weights[0] == 0 else 1)


def test_parts_of_a_message_are_joined_as_mistral_common_joins_them(tokenizer, finetuning):
    rng = random.Random(5)
    for _ in range(200):
        messages = conversation(rng, 4, regular=True)
        for m in messages:
            texts = rng.choices(TEXTS, k=rng.randint(1, 3)) if rng.random() < 0.5 else [m["content"]]
            m["content"] = [{"type": "text", "text": text} for text in texts]
        expected, parsed = theirs(finetuning, messages), parse_conversation({"messages": messages}, "text")
        if expected is None or isinstance(parsed, Dropped):
            assert not isinstance(parsed, list)
        else:
            assert encode_conversation(tokenizer, parsed)[0] == expected


def test_v2_has_the_ids_of_v3():
    """Its file is told from v3's by nothing that conversations without tools need."""
    v2, v3 = (load_tokenizer(str(FILES[name]), "") for name in ("v2", "v3"))
    mistral = MistralTokenizer.from_file(str(FILES["v2"]), mode=ValidationMode.finetuning)
    rng = random.Random(4)
    for _ in range(100):
        messages = conversation(rng, 6, regular=True)
        found = ours(encode_conversation, v2, messages)
        assert (found and found[0]) == theirs(mistral, messages)
        again = ours(encode_conversation, v3, messages)
        assert (found and found[0]) == (again and again[0])


def test_a_tokenizer_of_a_later_format_is_refused():
    later = next(path for path in DATA.iterdir() if path.name.endswith(".model.v7"))
    tokenizer = SentencePieceTokenizer(later.read_bytes(), later.name)
    with pytest.raises(UserError, match="format v7 or later"):
        encode_chat(tokenizer, talk("user Hello"))


def test_bytes_speak_v1():
    tokenizer = ByteTokenizer()
    ids, weights = encode_conversation(tokenizer, talk("system S", "user q <s>", "assistant a</s>"))
    assert ids == [256, *b"[INST] S\n\nq <s> [/INST]a</s>", 257]
    assert weights.tolist() == [0] * 24 + [1] * 6


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "roles of messages are none"),
        (talk("assistant hm"), r"messages\[0\] is an answer before any question"),
        (talk("user a"), "end with the assistant"),
        (talk("user a", "assistant "), r"messages\[1\].content, an answer, is empty"),
        (
            talk("user a", "assistant b", "system s", "assistant c"),
            r"messages\[2\], a system prompt, follows an answer",
        ),
        (talk("user a", "tool x", "assistant c"), r"messages\[1\].role is 'tool'"),
        (talk("system s", "assistant c"), r"messages\[1\] is an answer before any question"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, words):
    with pytest.raises(UserError, match=words):
        encode_conversation(ByteTokenizer(), messages)
