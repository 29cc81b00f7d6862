"""Answers to MT-Bench's questions (Zheng et al., arXiv 2306.05685) in FastChat's format; judging them is FastChat's.

A question has several turns, mostly two. Each is asked in the instruct format of data/chat.py, after the earlier turns and the
model's own answers to them. FastChat's temperatures hold: a question is sampled as its category wants, a problem greedily.
"""

import collections
import html
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mixtral_jax import distributed
from mixtral_jax.config import Config, UserError
from mixtral_jax.data import encode_chat
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.evals.blocks import Block, Html, Table
from mixtral_jax.evals.mt_bench_questions import OWN, read_questions
from mixtral_jax.evals.settings import Settings
from mixtral_jax.evals.subject import Subject
from mixtral_jax.evals.work import Work, bar, key_of
from mixtral_jax.evals.writer import Writer
from mixtral_jax.generate import Sampling
from mixtral_jax.progress import printable

# FastChat's, by category.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
    "arena-hard-200": 0.0,
}
OTHERWISE = 0.7
PAPER = 8.30  # Mixtral 8x7B Instruct, judged by GPT-4
SHOWN = 5  # questions in results.json and the report
ROUNDED = 64  # rooms below what is asked for are rounded down to a multiple of it, so that answers share batches


def check(config: Config, settings: Settings) -> None:
    """Refuses settings that cannot work.

    Raises:
        UserError: no room for answers, or a question file that is none.
    """
    if settings.mt_bench_tokens < 1:
        raise UserError(f"--mt_bench_tokens={settings.mt_bench_tokens}; an answer needs at least 1 token")
    read_questions(settings.mt_bench_questions)


def temperature(question: dict[str, Any]) -> float:
    """That of a question: its own if it says one, or its category's."""
    return float(question.get("required_temperature", TEMPERATURES.get(question["category"], OTHERWISE)))


def conversation(question: dict[str, Any], answers: Sequence[str]) -> list[dict[str, str]]:
    """The messages up to the turn that is to be answered next; an answer without words is left out."""
    messages = []
    for i, answer in enumerate([*answers, None]):
        messages.append({"role": "user", "content": question["turns"][i]})
        if answer:
            messages.append({"role": "assistant", "content": answer})
    return messages


def room(tokenizer: Tokenizer, context: Sequence[int], later: Sequence[str], limit: int, most: int) -> int:
    """Tokens that an answer may have: what the model has left, shared equally with the turns that are still to come.

    Args:
        context: what the model reads.
        later: the questions of the later turns.
        limit: the model's max_seq_len.
        most: tokens of an answer, at most.

    Returns:
        `most` if there is room for it; else a multiple of ROUNDED, or less than ROUNDED; 0 if there is none.
    """
    asked = sum(len(encode_chat(tokenizer, [{"role": "user", "content": turn}])) for turn in later)
    left = max((limit - len(context) - asked) // (1 + len(later)), 0)
    if left >= most:
        return most
    return left - left % ROUNDED if left >= ROUNDED else left


def answer_all(
    questions: Sequence[dict[str, Any]], tokenizer: Tokenizer, write, limit: int, most: int, work: Work
) -> None:
    """Answers what is not answered yet: all first turns, then all second ones, and so on.

    Args:
        questions: see read_questions.
        tokenizer: the model's.
        write: (contexts, rooms, sampling, message) -> iterator of (number, Continuation), as a Writer.
        limit: the model's max_seq_len.
        most: tokens of an answer, at most.
        work: gets of each question and turn {"text", "tokens", "cut", "time"}.
    """
    total = sum(len(question["turns"]) for question in questions)
    with bar((), "mt_bench", "answer", total=total) as progress:
        for turn in range(max(len(question["turns"]) for question in questions)):
            asked = [question for question in questions if turn < len(question["turns"])]
            left = [question for question in asked if _name(question, turn) not in work]
            progress.update(len(asked) - len(left))
            for heat in sorted({temperature(question) for question in left}):
                some = [question for question in left if temperature(question) == heat]
                for question, done in _answer(some, turn, tokenizer, write, limit, most, Sampling(heat), work):
                    work.put(_name(question, turn), done | {"time": distributed.decided("time", time.time)})
                    progress.update()


def _answer(questions, turn: int, tokenizer: Tokenizer, write, limit: int, most: int, sampling: Sampling, work: Work):
    """Answers one turn of questions of one temperature; yields (question, what is kept of its answer)."""
    contexts, rooms, fitting = [], [], []
    for question in questions:
        context = encode_chat(tokenizer, conversation(question, _answers(question, turn, work)))
        tokens = room(tokenizer, context, question["turns"][turn + 1 :], limit, most)
        if not tokens:
            yield question, {"text": "", "tokens": 0, "cut": True}
            continue
        contexts.append(context)
        rooms.append(tokens)
        fitting.append(question)
    for i, done in write(contexts, rooms, sampling, True):
        kept = {"text": done.text.strip(), "tokens": len(done.tokens), "cut": done.reason == "length"}
        yield fitting[i], kept


def _name(question: dict[str, Any], turn: int) -> str:
    """A finished piece's name: another question's is another, and which other questions there are does not matter."""
    return f"{key_of(question)[:16]}/{turn}"


def _answers(question: dict[str, Any], turns: int, work: Work) -> list[str]:
    return [work.get(_name(question, turn))["text"] for turn in range(turns)]


def answer_line(question: dict[str, Any], model_id: str, key: str, work: Work) -> dict[str, Any]:
    """A line of FastChat's answer file. The answer's id is a hash of what was asked, of whom, and of the answers."""
    answers = _answers(question, len(question["turns"]), work)
    identity = {"model": key, "model_id": model_id, "question": question, "answers": answers}
    return {
        "question_id": question["question_id"],
        "answer_id": key_of(identity)[:22],
        "model_id": model_id,
        "choices": [{"index": 0, "turns": answers}],
        "tstamp": work.get(_name(question, len(answers) - 1))["time"],
    }


def model_id_of(name: str) -> str:
    """A subject's name as a file's: "runs/demo/sft, step 40" is demo-sft-step-40."""
    path, comma, step = name.removeprefix("hf:").partition(", ")
    parts = [part for part in Path(path).parts if part not in ("/", "..", "runs")][-2:]
    return re.sub(r"[^\w.]+", "-", "-".join([*parts, step] if comma else parts), flags=re.ASCII).strip("-.") or "model"


def write_lines(path: Path, lines: Sequence[dict[str, Any]], kept: Path) -> None:
    """Writes JSON lines, whole or not at all; `kept` is where the answers are in any case.

    Raises:
        UserError: they cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}; the answers are kept in {kept}: make room or correct --out, and run "
            "the same command again to go on"
        ) from error


def mt_bench(subject: Subject) -> Iterator[tuple[str, Any]]:
    """Answers the questions, writes OUT/mt_bench/model_answer/MODEL.jsonl, and tells of their lengths."""
    settings, tokenizer = subject.settings, subject.tokenizer
    questions = read_questions(settings.mt_bench_questions, settings.limit)
    model_id, most = model_id_of(subject.name), settings.mt_bench_tokens
    with subject.work("mt_bench", tokens=most) as work:
        answer_all(questions, tokenizer, Writer(subject, fast=True), subject.longest, most, work)
        lines = [answer_line(question, model_id, subject.key, work) for question in questions]
        found = _figures(questions, work)
    path = None
    if subject.folder is not None:
        path = subject.folder.parent / "mt_bench" / "model_answer" / f"{model_id}.jsonl"
        if distributed.speaks():
            write_lines(path, lines, subject.folder)
            write_lines(path.parent.parent / "question.jsonl", questions, subject.folder)
    if found["cut_share"]:
        subject.note(
            f"mt_bench: {found['cut_share']:.0%} of the answers were cut at their room: --mt_bench_tokens={most}, or what the "
            f"model's max_seq_len={subject.longest} leaves beside the conversation"
        )
    yield "model_id", model_id
    yield "questions_from", settings.mt_bench_questions or OWN
    yield from found.items()
    if path is not None:
        yield "file", str(path.relative_to(subject.folder.parent))
    yield (
        "first",
        [
            {"question_id": question["question_id"], "category": question["category"], "turns": question["turns"]}
            | {"answers": line["choices"][0]["turns"]}
            for question, line in zip(questions[:SHOWN], lines)
        ],
    )


def _figures(questions: Sequence[dict[str, Any]], work: Work) -> dict[str, Any]:
    """How many answers there are and how long, and of each category."""
    kept: dict[str, list[dict]] = collections.defaultdict(list)
    for question in questions:
        kept[question["category"]] += [work.get(_name(question, turn)) for turn in range(len(question["turns"]))]

    def of(answers: Sequence[dict]) -> dict[str, Any]:
        return {
            "answers": len(answers),
            "mean_tokens": sum(answer["tokens"] for answer in answers) / len(answers),
            "cut_share": sum(answer["cut"] for answer in answers) / len(answers),
            "empty_share": sum(not answer["text"] for answer in answers) / len(answers),
        }

    together = of([answer for answers in kept.values() for answer in answers])
    return {"questions": len(questions)} | together | {"categories": {name: of(kept[name]) for name in kept}}


def report(found: dict[str, dict[str, Any]]) -> list[Block]:
    """{model: results} -> blocks: lengths of the answers by category; the first questions with their answers, on the pages."""
    rows = []
    for name, results in found.items():
        for category, figures in {"all": results, **results["categories"]}.items():
            shares = [100 * figures[share] for share in ("cut_share", "empty_share")]
            rows.append([name, category, figures["answers"], figures["mean_tokens"], *shares])
    files = ", ".join(results["file"] for results in found.values() if "file" in results)
    note = (
        f"Answers are not judged here: the paper's {PAPER:.2f} of Mixtral 8x7B Instruct is GPT-4's judgement through FastChat, on its own 80 "
        f"questions. {f'For its judge: {files} (docs/evaluation.md has the commands).' if files else ''}"
    )
    columns = ["model", "category", "answers", "mean tokens", "cut, %", "empty, %"]
    return [Table("MT-Bench: answers", columns, rows, note.strip()), _first(found)]


def _first(found: dict[str, dict[str, Any]]) -> Html:
    """The first questions, with the models' answers one after the other."""
    asked: dict[tuple[str, str], dict[str, str]] = {}
    for name, results in found.items():
        for question in results["first"]:
            for turn, (text, answer) in enumerate(zip(question["turns"], question["answers"], strict=True), 1):
                head = f"Question {question['question_id']}, {question['category']}, turn {turn}"
                asked.setdefault((head, text), {})[name] = answer
    page, plain = [], []
    for (head, text), answers in asked.items():
        page.append(f"<p><b>{_escaped(head)}:</b> {_escaped(text)}</p>")
        plain.append(f"{head}: {text}")
        for name, answer in answers.items():
            page.append(f"<p class=note>{_escaped(name)}</p><pre>{_escaped(answer) or '(nothing)'}</pre>")
            plain.append(f"[{name}] {answer or '(nothing)'}")
    return Html("MT-Bench: the first questions", "\n".join(page), "\n\n".join(plain))


def _escaped(text: str) -> str:
    """Text of a page, its lines kept."""
    return html.escape(printable(text))
