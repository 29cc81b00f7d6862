"""Records of SFT: every format there is, and what is wrong with a record is said with its key."""

import random
import re

import pytest

from mixtral_jax.data.bad_rows import Unreadable
from mixtral_jax.data.chat import encode_conversation
from mixtral_jax.data.conversations import Dropped, before_answers, parse_conversation, prompt_text
from mixtral_jax.data.tokenizer import ByteTokenizer


def user(content, **more):
    return {"role": "user", "content": content, **more}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "S"}
TALK = [user("q"), answer("a")]


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": TALK}, TALK),
        ({"messages": TALK, "prompt": "x", "text": "y"}, TALK),
        ({"messages": TALK, "tools": [], "id": 3}, TALK),
        ({"messages": [SYSTEM, user("", name="N"), answer("a", tool_calls=None)]}, [SYSTEM, user(""), answer("a")]),
        ({"messages": [user("q", weight=0), answer("a", weight=1)]}, [user("q", weight=0.0), answer("a", weight=1.0)]),
        ({"messages": [user("q", weight=None), answer("a", weight=None)]}, TALK),
        ({"messages": [user(parts("a", "", "b")), answer(parts("c"))]}, [user("a\n\nb"), answer("c")]),
        ({"prompt": "q", "completion": "a"}, TALK),
        ({"prompt": "q", "completion": "a", "messages": None}, TALK),
        ({"prompt": [SYSTEM, user("q")], "completion": [answer("a")]}, [SYSTEM, *TALK]),
        (
            {"prompt": [*TALK, user("r")], "completion": [answer("b"), user("s"), answer("c")]},
            [user("q"), answer("a", weight=0.0), user("r"), answer("b"), user("s"), answer("c")],
        ),
        ({"text": "plain <s> text"}, "plain <s> text"),
        ({"text": "plain", "prompt": None}, "plain"),
    ],
)
def test_every_format_is_read(record, expected):
    assert parse_conversation(record, "text") == expected


def test_the_key_of_plain_text_is_the_sources():
    assert parse_conversation({"body": "x", "text": "y"}, "body") == "x"


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        ({"messages": []}, "empty"),
        ({"messages": [user(""), answer("")]}, "empty"),
        ({"text": ""}, "empty"),
        ({"prompt": "", "completion": ""}, "empty"),
        ({"prompt": [], "completion": []}, "empty"),
        ({"messages": [user("q"), answer("")]}, "no_trained_token"),
        ({"messages": [user("q"), answer(" \n ")]}, "no_trained_token"),
        ({"messages": [user("q"), answer("a", weight=0)]}, "no_trained_token"),
        ({"messages": [user("q"), answer("a", weight=1e-60)]}, "no_trained_token"),
        ({"messages": [user("q"), answer("a", weight=0), user("r"), answer(" ")]}, "no_trained_token"),
        ({"prompt": "q", "completion": ""}, "no_trained_token"),
    ],
)
def test_what_has_nothing_to_train_is_dropped_by_rule(record, rule):
    assert parse_conversation(record, "text") == Dropped(rule)


BAD = {
    "no key": ({"body": "x"}, r"no key 'messages', 'prompt' and 'completion', or 'text'.*it has 'body'"),
    "nothing": ({}, "it has none"),
    "all null": ({"messages": None}, r"it has 'messages' \(null\)"),
    "a pair": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "has 'prompt' but no 'completion'"),
    "an implicit pair": ({"chosen": "a", "rejected": "b"}, "train.stage=dpo"),
    "messages a string": ({"messages": "q"}, "messages is of type str"),
    "messages a dict": ({"messages": {"role": ["user"]}}, "messages is of type dict"),
    "message a string": ({"messages": ["q"]}, r"messages\[0\] is of type str"),
    "message null": ({"messages": [user("q"), None]}, r"messages\[1\] is of type NoneType"),
    "no role": ({"messages": [{"content": "q"}]}, r"messages\[0\] has no role; it has 'content'"),
    "no content": ({"messages": [user("q"), {"role": "assistant"}]}, r"messages\[1\] has no content"),
    "role bot": ({"messages": [user("q"), {"role": "bot", "content": "a"}]}, r"messages\[1\]\.role is 'bot'"),
    "role tool": ({"messages": [user("q"), {"role": "tool", "content": "a"}]}, r"messages\[1\]\.role is 'tool'"),
    "role a list": ({"messages": [{"role": ["user"], "content": "q"}]}, r"messages\[0\]\.role is \['user'\]"),
    "role null": ({"messages": [{"role": None, "content": "q"}]}, r"messages\[0\]\.role is None"),
    "content a number": ({"messages": [user(3), answer("a")]}, r"'messages\[0\]\.content' is of type int"),
    "content null": ({"messages": [user("q"), answer(None)]}, r"'messages\[1\]\.content' is of type NoneType"),
    "content a dict": ({"messages": [user({"text": "q"}), answer("a")]}, "is of type dict"),
    "an image": ({"messages": [user([{"type": "image_url"}]), answer("a")]}, r"content\[0\] is of type 'image_url'"),
    "a part of no text": (
        {"messages": [user([{"type": "text"}]), answer("a")]},
        r"content\[0\]\.text' is of type None",
    ),
    "a part that is a string": ({"messages": [user(["q"]), answer("a")]}, r"content\[0\] is of type 'str'"),
    "a surrogate": ({"messages": [user("\ud800"), answer("a")]}, r"'messages\[0\]\.content' holds a lone surrogate"),
    "a surrogate in text": ({"text": "x\udfff"}, "'text' holds a lone surrogate at character 1"),
    "text a list": ({"text": ["x"]}, "'text' is of type list"),
    "the answer first": ({"messages": [answer("a"), *TALK]}, r"messages\[0\] is an answer before any question"),
    "no answer": ({"messages": [user("q")]}, "end with the assistant"),
    "the user last": ({"messages": [*TALK, user("r")]}, "roles of messages are user, assistant, user"),
    "a system prompt only": ({"messages": [SYSTEM]}, "roles of messages are system"),
    "a system prompt after an answer": ({"messages": [*TALK, SYSTEM, answer("b")]}, r"messages\[2\], a system prompt"),
    "an empty answer among others": ({"messages": [user("q"), answer(""), *TALK]}, r"messages\[1\]\.content.*is empty"),
    "weight negative": ({"messages": [user("q"), answer("a", weight=-1)]}, r"messages\[1\]\.weight is -1"),
    "weight NaN": ({"messages": [user("q"), answer("a", weight=float("nan"))]}, r"weight is nan"),
    "weight infinite": ({"messages": [user("q"), answer("a", weight=float("inf"))]}, r"weight is inf"),
    "weight of 1e39": ({"messages": [user("q"), answer("a", weight=1e39)]}, r"weight is 1e\+39"),
    "weight huge": ({"messages": [user("q"), answer("a", weight=10**400)]}, r"weight is 1000"),
    "weight a string": ({"messages": [user("q"), answer("a", weight="1")]}, r"messages\[1\]\.weight is of type str"),
    "weight true": ({"messages": [user("q"), answer("a", weight=True)]}, r"weight is of type bool"),
    "weight of a question": (
        {"messages": [user("q", weight=1), answer("a")]},
        r"messages\[0\]\.weight is 1 .*the user",
    ),
    "tools": ({"messages": TALK, "tools": [{"type": "function"}]}, "'tools', which are not supported"),
    "a call": ({"messages": [user("q"), answer("", tool_calls=[{"id": "1"}])]}, r"messages\[1\]\.tool_calls"),
    "no completion": ({"prompt": "q"}, "has 'prompt' but no 'completion'"),
    "no prompt": ({"completion": "a", "prompt": None}, "has 'completion' but no 'prompt'"),
    "mixed": ({"prompt": "q", "completion": [answer("a")]}, "types str and list"),
    "mixed the other way": ({"prompt": [user("q")], "completion": "a"}, "types list and str"),
    "numbers": ({"prompt": 1, "completion": 2}, "prompt is of type int"),
    "a prompt that ends with an answer": ({"prompt": TALK, "completion": [answer("b")]}, "prompt ends with an answer"),
    "a completion of the user's": ({"prompt": [SYSTEM], "completion": TALK}, r"completion\[0\]\.role is 'user'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(name):
    record, words = BAD[name]
    found = parse_conversation(record, "text")
    assert isinstance(found, Unreadable)
    assert re.search(words, found.reason), found.reason


def test_whatever_is_read_can_be_encoded():
    """Records put together at random: a reason, a rule, or one BOS, EOS last and an answer's tokens trained."""
    rng, tokenizer = random.Random(0), ByteTokenizer()
    values = ["q", "", " ", None, 3, [], {}, parts("a", "b"), "<s>"]
    roles = ["system", "user", "assistant", "user", "assistant", "bot", None]
    read = 0
    for _ in range(4000):
        messages = [
            {"role": r, "content": rng.choice(["q", "a", rng.choice(values)])}
            for r in rng.choices(roles, (1, 4, 4, 1, 1, 0.2, 0.2), k=rng.randint(0, 5))
        ]
        if rng.random() < 0.7:
            messages = [user("q"), *messages, answer("x", weight=rng.choice([0, 1, None, -1]))]
        parsed = parse_conversation({"messages": messages}, "text")
        if isinstance(parsed, list):
            ids, weights = encode_conversation(tokenizer, parsed)
            assert ids[0] == 256
            assert ids.count(256) == 1
            assert ids[-1] == 257
            assert weights.any()
            assert weights[0] == 0
            read += 1
    assert 300 < read < 3700


def test_the_prompt_is_what_comes_before_the_first_trained_answer():
    conversation = [SYSTEM, user("q"), answer("a", weight=0.0), user("r"), answer("b"), user("s"), answer("c")]
    assert before_answers(conversation) == conversation[:4]
    texts = {prompt_text(before) for before in (conversation[:2], conversation[:4], conversation[1:4])}
    assert len(texts) == 3
    # Neighbours and the place of the system prompt make no difference to the ids, nor to this.
    same = [[SYSTEM, user("a\n\nb")], [SYSTEM, user("a"), user("b")], [user("a"), user(""), user("b"), SYSTEM]]
    assert len({prompt_text(messages) for messages in same}) == 1
    assert prompt_text([user("a"), user("b")]) != prompt_text([user("a"), SYSTEM, user("b")])
