"""Records of DPO: every format there is, where the prompt ends, and what is wrong with a record."""

import random
import re

import pytest

from mixtral_jax.data.bad_rows import Unreadable
from mixtral_jax.data.chat import encode_conversation
from mixtral_jax.data.conversations import Dropped
from mixtral_jax.data.pairs import Pair, parse_pair
from mixtral_jax.data.tokenizer import ByteTokenizer
from tests.data.test_conversations import SYSTEM, TALK, answer, user


def pair(prompt, chosen, rejected):
    return Pair(prompt, prompt + chosen, prompt + rejected)


Q, A, B = [user("q")], [answer("a")], [answer("b")]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, pair(Q, A, B)),
        ({"prompt": Q, "chosen": A, "rejected": B}, pair(Q, A, B)),
        ({"prompt": [SYSTEM, *Q], "chosen": A, "rejected": B, "score": 1.5}, pair([SYSTEM, *Q], A, B)),
        ({"prompt": "q", "chosen": A, "rejected": B}, pair(Q, A, B)),
        ({"prompt": "q", "chosen": Q + A, "rejected": Q + B}, pair(Q, A, B)),
        ({"prompt": "q", "chosen": [SYSTEM, *Q, *A], "rejected": [SYSTEM, *Q, *B]}, pair([SYSTEM, *Q], A, B)),
        ({"prompt": Q, "chosen": Q + A, "rejected": Q + B}, pair(Q, A, B)),
        ({"chosen": Q + A, "rejected": Q + B}, pair(Q, A, B)),
        ({"prompt": None, "chosen": Q + A, "rejected": Q + B}, pair(Q, A, B)),
        # What both say stays whole: the cut is before the answer that differs.
        (
            {"chosen": [*TALK, user("r"), answer("b")], "rejected": [*TALK, user("r"), answer("c")]},
            Pair(
                [*TALK, user("r")],
                [user("q"), answer("a", weight=0.0), user("r"), answer("b")],
                [user("q"), answer("a", weight=0.0), user("r"), answer("c")],
            ),
        ),
        # Where questions differ, before the answers that led to them.
        (
            {"chosen": [*TALK, user("r"), answer("b")], "rejected": [*TALK, user("s"), answer("b")]},
            pair(Q, [*A, user("r"), answer("b")], [*A, user("s"), answer("b")]),
        ),
        # Answers that are neighbours are one message: the cut does not part them.
        ({"chosen": [*Q, *A, answer("x")], "rejected": [*Q, *A, answer("y")]}, pair(Q, [*A, answer("x")], [*A, answer("y")])),
        ({"chosen": [*Q, *A], "rejected": [*Q, *A, user("r"), answer("b")]}, pair(Q, A, [*A, user("r"), answer("b")])),
    ],
)  # fmt: skip
def test_every_format_is_read(record, expected):
    assert parse_pair(record) == expected


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: one A: yes", "Q: one A: no", "Q: one A:"),  # the space before a word is the word's
        ("Q: one A:yes", "Q: one A:no", "Q: one A:"),
        ("Human: a\n\nAssistant: same b", "Human: a\n\nAssistant: same c", "Human: a\n\nAssistant: same"),
        ("abc", "abcd", "ab"),  # something is left of each
        ("ab c", "ab cd", "ab "),
        ("日本x", "日本y", "日本"),
    ],
)
def test_strings_without_a_prompt_are_cut_where_trl_cuts_them(chosen, rejected, prompt):
    found = parse_pair({"chosen": chosen, "rejected": rejected})
    assert found.prompt == [user(prompt)]
    assert prompt + found.chosen[-1]["content"] == chosen
    assert prompt + found.rejected[-1]["content"] == rejected


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        ({"prompt": "q", "chosen": "", "rejected": ""}, "empty"),
        ({"prompt": Q, "chosen": [], "rejected": []}, "empty"),
        ({"chosen": "", "rejected": ""}, "empty"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "identical"),
        ({"chosen": "a", "rejected": "a"}, "identical"),
        ({"chosen": Q + A, "rejected": Q + A}, "identical"),
        ({"prompt": "q", "chosen": Q + A, "rejected": Q + A}, "identical"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "no_trained_token"),
        ({"prompt": "q", "chosen": " ", "rejected": "b"}, "no_trained_token"),
        ({"prompt": Q, "chosen": A, "rejected": []}, "no_trained_token"),
        ({"prompt": Q, "chosen": A, "rejected": [answer("b", weight=0)]}, "no_trained_token"),
    ],
)
def test_what_has_nothing_to_compare_is_dropped_by_rule(record, rule):
    assert parse_pair(record) == Dropped(rule)


BAD = {
    "no rejected": ({"prompt": "q", "chosen": "a"}, "no key 'rejected'; it has 'prompt', 'chosen'"),
    "null": ({"prompt": "q", "chosen": None, "rejected": "b"}, r"no key 'chosen'; .*'chosen' \(null\)"),
    "nothing": ({}, "no key 'chosen'; it has none"),
    "a conversation": ({"messages": TALK}, "train.stage=sft"),
    "mixed": ({"prompt": "q", "chosen": "a", "rejected": B}, "types str and list"),
    "mixed with the prompt": ({"prompt": Q, "chosen": "a", "rejected": "b"}, "'prompt' is of type list"),
    "numbers": ({"prompt": "q", "chosen": 1, "rejected": 2}, "types int and int"),
    "scores": ({"prompt": "q", "chosen": {"a": 1}, "rejected": {"b": 1}}, "types dict and dict"),
    "prompt a number": ({"prompt": 3, "chosen": A, "rejected": B}, "prompt is of type int"),
    "nothing in common": ({"chosen": "a", "rejected": "b"}, "do not begin alike"),
    "one is empty, no prompt": ({"chosen": "", "rejected": "b"}, "do not begin alike"),
    "other questions": ({"chosen": Q + A, "rejected": [user("x"), *B]}, "same question"),
    "another prompt": ({"prompt": "x", "chosen": Q + A, "rejected": Q + B}, "'prompt' is not in what they have in common"),
    "one is whole": ({"prompt": "q", "chosen": Q + A, "rejected": B}, "same question"),
    "the user last": ({"prompt": Q, "chosen": [*A, user("r")], "rejected": B}, r"roles of prompt \+ chosen"),
    "a prompt that ends with an answer": ({"prompt": TALK, "chosen": A, "rejected": B}, "prompt ends with an answer"),
    "no question": ({"prompt": [SYSTEM], "chosen": A, "rejected": B}, "an answer before any question"),
    "role bot": ({"prompt": Q, "chosen": [{"role": "bot", "content": "a"}], "rejected": B}, r"chosen\[0\]\.role is 'bot'"),
    "no content": ({"prompt": Q, "chosen": A, "rejected": [{"role": "assistant"}]}, r"rejected\[0\] has no content"),
    "a surrogate": ({"prompt": "q", "chosen": "\ud800", "rejected": "b"}, "'chosen' holds a lone surrogate"),
    "weight NaN": ({"prompt": Q, "chosen": [answer("a", weight=float("nan"))], "rejected": B}, r"chosen\[0\]\.weight"),
    "tools": ({"prompt": "q", "chosen": "a", "rejected": "b", "tools": [{}]}, "'tools'"),
    "an empty answer": ({"prompt": Q, "chosen": [*A, user("r"), answer("")], "rejected": B}, r"chosen\[3\]\.content.*empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(name):
    record, words = BAD[name]
    found = parse_pair(record)
    assert isinstance(found, Unreadable)
    assert re.search(words, found.reason), found.reason


def test_the_prompt_is_the_beginning_of_both():
    """Random conversations that differ somewhere: no token of the prompt is trained, and both begin with it."""
    rng, tokenizer = random.Random(0), ByteTokenizer()
    found = 0
    for _ in range(500):
        turns = [message for _ in range(rng.randint(1, 3)) for message in (user(rng.choice("qr")), answer("a"))]
        other = [m | {"content": rng.choice("xyz")} if rng.random() < 0.3 else m for m in turns]
        parsed = parse_pair({"chosen": turns, "rejected": other})
        if not isinstance(parsed, Pair):
            continue
        found += 1
        both = [encode_conversation(tokenizer, messages) for messages in (parsed.chosen, parsed.rejected)]
        begin = [int(weights.argmax()) for _, weights in both]
        assert begin[0] == begin[1]
        assert both[0][0][: begin[0]] == both[1][0][: begin[1]]
        assert tokenizer.decode(both[0][0][: begin[0]]).endswith("[/INST]")
    assert found > 100
