"""Majority votes over several sampled answers to one question."""

import collections
import re

SAID = re.compile(
    r"[Ff]inal [Aa]nswer:?\s*[Tt]he final answer is:?\s*(.*?)(?:\.\s*I hope|\.?\s*$)", re.DOTALL | re.MULTILINE
)
LAYOUT = re.compile(r"\\(?:left|right|!|,|;|:|quad|text\{ *\}|displaystyle)|\$|\s")


def mathematics(answers, _docs):
    """Of each question's answers to MATH the first whole one whose final answer most of them give."""
    return [_winner(list(each)) for each in answers]


def _winner(texts: list[str]) -> str:
    finals = [final(text) for text in texts]
    votes = collections.Counter(each for each in finals if each)
    if not votes:
        return texts[0]
    # Of equally many votes that which came first.
    best = max(votes, key=lambda each: (votes[each], -finals.index(each)))
    return texts[finals.index(best)]


def final(text: str) -> str:
    r"""What a solution ends with, without layout: "\dfrac{1}{2}" and "$ \frac12 $" are not told apart by it; "" if none."""
    said = SAID.search(text)
    found = said[1] if said else _boxed(text)
    found = LAYOUT.sub("", found).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    found = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", found)
    inner = _boxed(found)
    return (inner or found).rstrip(".")


def _boxed(text: str) -> str:
    r"""What stands in the last \boxed{...}, braces balanced; "" if there is none."""
    at = text.rfind("\\boxed{")
    if at < 0:
        return ""
    start, depth = at + len("\\boxed{"), 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if not depth:
            return text[start:i]
    return ""
