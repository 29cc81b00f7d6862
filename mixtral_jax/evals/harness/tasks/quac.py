"""QuAC: questions of a conversation about a passage, whose answers are spans of it."""

import collections
import re
import string

from datasets import Dataset

NONE = "CANNOTANSWER"


def turns(dialogues: Dataset) -> Dataset:
    """One question a row, with the passage and the true turns before it."""
    rows = []
    for each in dialogues:
        answers = each["answers"]["texts"]
        said = each["orig_answers"]["texts"]
        for i, question in enumerate(each["questions"]):
            before = [{"question": q, "answer": a} for q, a in zip(each["questions"][:i], said[:i])]
            rows.append(
                {
                    "title": f"{each['wikipedia_page_title']}, {each['section_title']}",
                    "passage": each["context"].removesuffix(NONE).strip(),
                    "before": before,
                    "question": question,
                    "answers": answers[i],
                }
            )
    return Dataset.from_list(rows)


def prompt(doc: dict) -> str:
    """What the model continues with its answer."""
    turns = "".join(f"Q: {each['question']}\nA: {each['answer']}\n" for each in doc["before"])
    return (
        f"{doc['title']}\n\n{doc['passage']}\n\nThe questions are answered with words of the text, or with {NONE}.\n\n"
        f"{turns}Q: {doc['question']}\nA:"
    )


def judged(doc: dict, results: list[str]) -> dict[str, float]:
    """F1 of the words, with the nearest of the true answers."""
    return {"f1": max(f1(results[0], answer) for answer in doc["answers"])}


def f1(given: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words, without case, articles and punctuation."""
    a, b = _words(given), _words(answer)
    if not a or not b:
        return float(a == b)
    common = sum((collections.Counter(a) & collections.Counter(b)).values())
    return 2 * common / (len(a) + len(b))


def _words(text: str) -> list[str]:
    text = "".join(" " if letter in string.punctuation else letter for letter in text.lower())
    return re.sub(r"\b(a|an|the)\b", " ", text).split()
