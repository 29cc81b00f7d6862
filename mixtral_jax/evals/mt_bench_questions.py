"""Two-turn questions in FastChat's format: a file's, or a few of our own about Python's library, for want of a network."""

import json
from pathlib import Path
from typing import Any

from mixtral_jax.config import UserError

OWN = "our own"  # what stands for a file's name
QUESTIONS = (
    (
        "coding",
        "Write a Python function that takes a folder and returns the names and sizes of its five largest files, with pathlib.",
        "Now include files in subfolders, and skip files that vanish while you look at them.",
    ),
    (
        "coding",
        "Show how to count the words of a text file with collections.Counter and print the ten most frequent ones.",
        "Change it so that upper and lower case count as the same word and punctuation is left out.",
    ),
    (
        "reasoning",
        "In Python, a = [[]] * 3 is followed by a[0].append(1). What does print(a) show, and why?",
        "How would you make a list of three lists that do not share anything? Explain why that way works.",
    ),
    (
        "math",
        "math.gcd(84, 132) is called in Python. What does it return? Show each step of Euclid's algorithm.",
        "Use that result to find math.lcm(84, 132), and check that it is a multiple of both.",
    ),
    (
        "extraction",
        "From this line take the module, the function and the exception as a JSON object: 'json.loads raises JSONDecodeError if "
        "the text is not valid JSON.'",
        "Do the same for: 'ValueError comes out of statistics.mode? No: since version 3.8 statistics.mode raises StatisticsError "
        "only for empty data.' Add a key for the version.",
    ),
    (
        "writing",
        "Write a short message to a colleague that explains why a with statement is better than calling close() oneself.",
        "Shorten it to two sentences and add one example of a class of the standard library that is used that way.",
    ),
    (
        "stem",
        "Why does 0.1 + 0.2 == 0.3 give False in Python? Explain it for somebody who knows decimal fractions only.",
        "Which modules of the standard library help with that, and what does each of them cost?",
    ),
    (
        "humanities",
        "The module this prints a poem of principles. Choose one of them and discuss what it asks of a programmer.",
        "Give the strongest argument against that principle, and say which side you find more convincing.",
    ),
    (
        "roleplay",
        "Imagine that you are the garbage collector of a Python program. Describe your day.",
        "A reference cycle complains that you came late. Answer it.",
    ),
)


def read_questions(path: str, limit: int = 0) -> list[dict[str, Any]]:
    """Reads questions.

    Args:
        path: of a file with a question a line, as FastChat's question.jsonl; "": our own.
        limit: how many, the first ones; 0: all.

    Returns:
        {"question_id", "category", "turns": [text, ...]} and what else stands in the line, at least one.

    Raises:
        UserError: the file cannot be read, holds no question, or a line is none.
    """
    if not path:
        numbered = enumerate(QUESTIONS, 1)
        found = [{"question_id": i, "category": category, "turns": turns} for i, (category, *turns) in numbered]
        return found[: limit or None]
    try:
        lines = Path(path).expanduser().read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--mt_bench_questions={path} cannot be read: {error}; give FastChat's question.jsonl, or leave it out"
        ) from error
    found, places = [], {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        question = _question(f"{path}, line {number}", line)
        key = str(question["question_id"])
        if key in places:
            raise UserError(
                f"{path}, line {number}: question_id {key} is that of line {places[key]} too; give each question its own"
            )
        places[key] = number
        found.append(question)
    if not found:
        raise UserError(
            f"--mt_bench_questions={path} holds 0 questions; it needs at least one, as a JSON object in a line"
        )
    return found[: limit or None]


def _question(where: str, line: str) -> dict[str, Any]:
    """One line's question.

    Raises:
        UserError: naming the file, the line and what is wrong.
    """
    try:
        question = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: this is no JSON ({error}); write one question a line") from error
    wanted = '{"question_id": 81, "category": "writing", "turns": ["...", "..."]}'
    if not isinstance(question, dict):
        raise UserError(f"{where}: a question is a JSON object as {wanted}, and this is a {type(question).__name__}")
    for key, kinds in (("question_id", int | str), ("category", str), ("turns", list)):
        if key not in question:
            raise UserError(f"{where}: {key} is missing; write a question as {wanted}")
        if not isinstance(question[key], kinds) or isinstance(question[key], bool):
            raise UserError(f"{where}: {key} is {json.dumps(question[key])}; write a question as {wanted}")
    turns = question["turns"]
    if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise UserError(f"{where}: turns is {json.dumps(turns)}; it needs at least one text, and none that is empty")
    temperature = question.get("required_temperature", 0)
    if not isinstance(temperature, int | float) or isinstance(temperature, bool) or not 0 <= temperature < float("inf"):
        raise UserError(
            f"{where}: required_temperature is {json.dumps(temperature)}; it must be a number of at least 0"
        )
    return question
