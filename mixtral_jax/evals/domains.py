"""Labelled text: domains that perplexity, context and routing report one by one.

`--text=stdlib` is text of six kinds out of the running Python's own library, no network needed. Of its files those are taken whose
hash comes first: what a run on the standard library holds out (data.is_heldout) are just these.
"""

import ast
import dataclasses
import functools
import io
import itertools
import json
import re
import tokenize
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mixtral_jax.config import Config, SourceConfig, UserError
from mixtral_jax.data import documents
from mixtral_jax.data.sources import source_files
from mixtral_jax.data.text import hash_position
from mixtral_jax.evals.settings import Settings
from mixtral_jax.evals.work import bar

STDLIB = "stdlib"
FILES = 0.05  # of the library's files, by hash: about 35
TABLES = 0.25  # of the files that are tables: there are few
_ITEM = re.compile(
    r"(?P<name>[^=]+)=(?P<source>text|jsonl|parquet|arrow|hub)(\[(?P<key>[^\]]+)\])?:(?P<path>.+)", re.DOTALL
)
_FORM = (
    "NAME=SOURCE:PATH or NAME=SOURCE[KEY]:PATH, with text, jsonl, parquet, arrow or hub as SOURCE, or the word stdlib"
)


@dataclasses.dataclass(frozen=True)
class Domain:
    """Documents under a name; iterating gives their texts, each time from the first."""

    name: str
    read: Callable[[], Iterator[str]]
    positions: Sequence[
        float
    ] = ()  # of a domain out of the standard library: hash_position of the file each comes from

    joined: bool = (
        False  # neighbours may be put together where a document is too short: those of the standard library's
    )

    def __iter__(self) -> Iterator[str]:
        return (text for text in self.read() if text)

    def trained(self, config: Config) -> float | None:
        """The share of documents whose file a run on the standard library was trained on; None where there is no such file."""
        if not self.positions or all(source.source != STDLIB for source in config.data.sources):
            return None
        return sum(at >= config.data.heldout_fraction for at in self.positions) / len(self.positions)


def domains(settings: Settings) -> dict[str, Domain]:
    """The domains that --text names, or those of the standard library.

    Raises:
        UserError: an item means nothing, a name comes twice, or a file cannot be found.
    """
    found: dict[str, Domain] = {}
    for item in settings.text or (STDLIB,):
        for domain in _stdlib() if item == STDLIB else _given(item):
            if domain.name in found:
                raise UserError(f"--text: there are two domains named {domain.name}; give each a name of its own")
            found[domain.name] = domain
    return found


def _given(item: str) -> list[Domain]:
    match = _ITEM.fullmatch(item)
    if match is None:
        raise UserError(f"--text={item}: write {_FORM}; for example arxiv=jsonl:arxiv.jsonl")
    name, key = match["name"], match["key"] or "text"
    source = SourceConfig(source=match["source"], path=match["path"], text_key=key, name=name, weight=1.0)
    if match["source"] != "hub":  # a wrong path is told before any work
        try:
            source_files(source)
        except UserError as error:
            raise UserError(f"--text={item}: {str(error).removeprefix('data.path: ')}") from error
    if not name.startswith("@"):
        return [Domain(name, lambda: (document.text for document in documents(source)))]
    if match["source"] != "jsonl":
        raise UserError(
            f"--text={item}: labels inside rows are read from jsonl; split the {match['source']} files, one domain each"
        )
    places: dict[str, list[tuple[str, Path, int]]] = {}
    for label, place in _labelled(source, name[1:]):
        places.setdefault(label, []).append(place)
    return [Domain(label, functools.partial(_rows, source, places[label])) for label in sorted(places)]


def _labelled(source: SourceConfig, path: str) -> Iterator[tuple[str, tuple[str, Path, int]]]:
    """(label, where) of each row, the label under a path of keys, as meta.pile_set_name; where: file's name, file, byte."""
    files = source_files(source)
    with bar([], "reading labels", "B", sum(file.stat().st_size for _, file in files)) as shown:
        for name, file in files:
            at = 0
            with open(file, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _label(line, path, source.text_key, f"{name}:{number}"), (name, file, at)
                    at += len(line)
                    shown.update(len(line))


def _label(line: bytes, path: str, text_key: str, where: str) -> str:
    """A row's label. Its text is looked at too, so that a wrong row is told before any work."""
    try:
        row = value = json.loads(line)
        for key in path.split("."):
            value = value[key]
        for what, kind, found in (("label", str | int, value), ("text", str, row[text_key])):
            if not isinstance(found, kind):
                raise TypeError(f"its {what} is no text but {type(found).__name__}")
        return str(value)
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"--text: {where} has no {path} and {text_key} ({type(error).__name__}: {error}); correct the row or the keys"
        ) from error


def _rows(source: SourceConfig, places: Sequence[tuple[str, Path, int]]) -> Iterator[str]:
    """The texts of rows: read again, for a file may be longer than memory."""
    for (name, file), group in itertools.groupby(places, lambda place: place[:2]):
        with open(file, "rb") as lines:
            for *_, at in group:
                lines.seek(at)
                try:
                    yield json.loads(lines.readline())[source.text_key]
                except (ValueError, LookupError, TypeError) as error:
                    raise UserError(
                        f"--text: {name} was changed while it was read; run the same command again"
                    ) from error


def _stdlib() -> list[Domain]:
    """Six kinds of text out of the running Python; the same Python gives the same documents."""
    files = {}
    source = SourceConfig(source=STDLIB, path="", text_key="text", name=STDLIB, weight=1.0)
    for name, path in source_files(source):
        text = path.read_text("utf-8", errors="replace")
        files[name] = (hash_position(text), text)
    reference = files.pop("pydoc_data/topics.py", (1.0, "topics = {}"))
    tables = {name: file for name, file in files.items() if _is_table(name, file[1])}
    modules = sorted(file for name, file in files.items() if name not in tables and file[0] < FILES)
    parts = [(at, _parts(text)) for at, text in modules]
    kinds = {
        "code": [(at, part[0]) for at, part in parts],
        "docstrings": [(at, part[1]) for at, part in parts],
        "comments": [(at, part[2]) for at, part in parts],
        "reference": [(reference[0], topic) for topic in _topics(reference[1])],
        "tables": sorted(file for file in tables.values() if file[0] < TABLES),
        "characters": [(None, text) for text in _characters()],
    }
    return [_domain(name, [each for each in kept if each[1].strip()]) for name, kept in kinds.items()]


def _domain(name: str, kept: list[tuple[float | None, str]]) -> Domain:
    positions = [at for at, _ in kept if at is not None]
    return Domain(name, lambda: (text for _, text in kept), positions, joined=True)


def _is_table(name: str, text: str) -> bool:
    """Files of data: decoding tables and the like, most lines of which are entries."""
    return name == "html/entities.py" or (name.startswith("encodings/") and "decoding_table" in text)


def _parts(text: str) -> tuple[str, str, str]:
    """A module's code without docstrings and comments, its docstrings, and its comments."""
    lines = text.splitlines()
    docs, removed = [], set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old escapes in the library's own strings
        tree = ast.parse(text)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if (doc := ast.get_docstring(node)) is not None:
            docs.append(doc)
            removed.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    comments, cut = [], {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.start[0] not in removed:
            comments.append(token.string.lstrip("#!: ").rstrip())
            cut[token.start[0]] = token.start[1]
    kept = []
    for number, line in enumerate(lines, 1):
        if number in removed:
            continue
        line = line[: cut[number]].rstrip() if number in cut else line
        if line.strip() or (kept and kept[-1].strip()):  # no two empty lines after each other
            kept.append(line)
    return "\n".join(kept), "\n\n".join(docs), "\n".join(comment for comment in comments if comment)


def _topics(text: str) -> list[str]:
    """The language reference that `help` shows: English prose with examples, a topic a document."""
    found = ast.literal_eval(next(node.value for node in ast.parse(text).body if isinstance(node, ast.Assign)))
    return [found[name] for name in sorted(found)]


def _characters() -> Iterator[str]:
    """Unicode's characters with numbers, categories and names, 256 code points a document."""
    for start in range(0, 0x3000, 0x100):
        rows = [
            f"U+{code:04X}\t{unicodedata.category(chr(code))}\t{name}"
            for code in range(start, start + 0x100)
            if (name := unicodedata.name(chr(code), ""))
        ]
        yield "\n".join(rows)
