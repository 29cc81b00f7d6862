"""Conversations and preferences out of the running Python's own documentation strings: data for SFT and DPO without a network.

A question names an object of the standard library, with its arguments or bases; the answer is the first paragraph of its
documentation. Sources are read with `ast` and never imported; what is written in C is asked for its `__doc__`. All order
and choice comes from names and hashes, so one Python gives the same rows every time.

A rejected answer is the summary of another object: of the same kind, of similar length, with a full stop or without as
the chosen one has it. So nothing but the question tells which is right, and there are three kinds of wrong:

    unrelated  shares no word with the question, while the right answer shares some (else `elsewhere` is taken);
    elsewhere  of another file, whatever its words;
    sibling    of the same class or file: it speaks of the same things, and only the name and the arguments tell.
"""

import ast
import bisect
import importlib
import inspect
import logging
import re
import types
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from mixtral_jax.config import SourceConfig
from mixtral_jax.data.sources import source_files
from mixtral_jax.data.text import hash_position

logger = logging.getLogger(__name__)

# How often each kind of wrong answer is asked for, relative to the others.
MIX = {"unrelated": 5, "elsewhere": 3, "sibling": 2}
SHORTEST, LONGEST = 12, 300  # characters of a summary
MOST_ARGUMENTS = 6  # that a question shows
LENGTH_RATIO = 1.4  # between the two answers of a pair, at most
TRIES = 60  # candidates looked at for a wrong answer
# Modules in which much is written in C, where only inspection finds its documentation.
INSPECTED = ("builtins", "array", "cmath", "itertools", "math", "os", "sys", "time", "unicodedata", "zlib")
HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: classes that Python code defines have it, and their source is read
STARS = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
QUESTIONS = {
    "function": (
        "What does the function {} do?",
        "Summarise this Python function: def {}",
        "What is the function {} for?",
    ),
    "method": ("What does the method {} do?", "Summarise this Python method: def {}", "What is the method {} for?"),
    "class": ("What is the class {}?", "Summarise this Python class: class {}", "What is the class {} for?"),
    "property": ("What is the property {}?", "What does the property {} hold?"),
    "module": ("What is the module {} for?", "Summarise the Python module {}."),
}
# No sentence about the object: a reference, a call with its value, or about a name that nobody should use.
NO_SUMMARY = re.compile(r"\b(deprecated|obsolete)\b|^(alias|synonym)\b|^(see|internal)\b|>>>|->", re.IGNORECASE)
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
COMMON = set(
    re.findall(r"\w+", "the and for with from that this are not what does function method class property module")
)


class Entry(NamedTuple):
    """An object of the standard library and what its documentation says."""

    id: str  # file:qualified name
    kind: str  # a key of QUESTIONS
    name: str  # dotted, from the module on
    shown: str  # the name with arguments or bases, as questions show it
    summary: str

    @property
    def question(self) -> str:
        """The question of which the summary is the answer; no other entry has the same."""
        templates = QUESTIONS[self.kind]
        return templates[int(hash_position(f"question {self.id}") * len(templates))].format(self.shown)


def instructions() -> Iterator[tuple[str, dict]]:
    """Yields (id, {"messages": [a user's question, the assistant's answer]}), sorted by id.

    Raises:
        UserError: this Python has no standard-library source.
    """
    for entry in entries():
        turns = (("user", entry.question), ("assistant", entry.summary))
        yield entry.id, {"messages": [{"role": role, "content": content} for role, content in turns]}


def preferences(mix: Mapping[str, int] = MIX) -> Iterator[tuple[str, dict]]:
    """Yields (id, {"prompt", "chosen", "rejected"}), sorted by id; an object without a plausible wrong answer is left out.

    Args:
        mix: weights of the kinds of wrong answers; the object's hash picks one.

    Raises:
        UserError: this Python has no standard-library source.
        ValueError: an unknown kind, or no kind with a positive weight.
    """
    kinds = [kind for kind in MIX for _ in range(mix.get(kind, 0))]
    if not kinds or not mix.keys() <= MIX.keys():
        raise ValueError(f"mix={dict(mix)}; give whole weights, one positive, to some of {', '.join(MIX)}")
    found = entries()
    wrong = _Wrong(found)
    for entry in found:
        other = wrong.of(entry, kinds[int(hash_position(f"kind {entry.id}") * len(kinds))])
        if other is not None:
            yield entry.id, {"prompt": entry.question, "chosen": entry.summary, "rejected": other.summary}


def entries() -> list[Entry]:
    """Returns what is documented in public, sorted by id; of a name or a summary that occurs again only the first.

    Raises:
        UserError: this Python has no standard-library source.
    """
    found, names, summaries, broken = [], set(), set(), 0
    for file, path in source_files(SourceConfig("stdlib", "", "text", "stdlib", 1.0)):
        try:
            with warnings.catch_warnings(action="ignore"):  # of the library's own style
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            broken += 1
        else:
            found += _of_module(file, tree)
    if broken:
        logger.info("%d files of the standard library cannot be parsed; left out", broken)
    kept = []
    for entry in sorted([*found, *_inspected()], key=lambda entry: entry.id):
        summary = entry.summary.casefold().rstrip(".")
        if _is_summary(entry) and entry.name not in names and summary not in summaries:
            kept.append(entry)
            names.add(entry.name)
            summaries.add(summary)
    return kept


def _of_module(file: str, tree: ast.Module) -> Iterator[Entry]:
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if module.rpartition(".")[2].startswith("__"):  # __main__, __phello__, a top-level __init__: no module to ask about
        return
    yield Entry(file, "module", module, module, _summary(ast.get_docstring(tree)))
    yield from _of_body(file, module, "", tree)


def _of_body(file: str, module: str, owner: str, node: ast.AST) -> Iterator[Entry]:
    """Yields the functions and classes in a module or class, also under `if` and `try`, but none inside a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from _of_body(file, module, owner, child)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and child.name[0] != "_":
            qualified = owner + child.name
            name = f"{module}.{qualified}"
            kind, arguments = _kind(child, bool(owner)), _arguments(child, bool(owner))
            shown = name if kind == "property" or (kind == "class" and not arguments) else f"{name}({arguments})"
            yield Entry(f"{file}:{qualified}", kind, name, shown, _summary(ast.get_docstring(child)))
            if isinstance(child, ast.ClassDef):
                yield from _of_body(file, module, f"{qualified}.", child)


def _kind(node: ast.AST, in_class: bool) -> str:
    if isinstance(node, ast.ClassDef):
        return "class"
    if any("property" in ast.unparse(decorator) for decorator in node.decorator_list):
        return "property"
    return "method" if in_class else "function"


def _arguments(node: ast.AST, in_class: bool) -> str:
    """The names of a function's arguments without self or cls, or of a class's bases; the first few of many."""
    if isinstance(node, ast.ClassDef):
        bases = (ast.unparse(base) for base in node.bases if isinstance(base, ast.Name | ast.Attribute))
        names = [base for base in bases if base != "object"]
    else:
        given = node.args
        names = [argument.arg for argument in given.posonlyargs + given.args]
        names = names[1:] if in_class and names[:1] in (["self"], ["cls"]) else names
        names += [f"*{given.vararg.arg}"] if given.vararg else ["*"] if given.kwonlyargs else []
        names += [argument.arg for argument in given.kwonlyargs]
        names += [f"**{given.kwarg.arg}"] if given.kwarg else []
    return _few(names)


def _few(names: list[str]) -> str:
    return ", ".join(names[:MOST_ARGUMENTS] + ["..."] * (len(names) > MOST_ARGUMENTS))


def _inspected() -> Iterator[Entry]:
    """Yields the functions, types and methods of INSPECTED that are written in C."""
    for module in INSPECTED:
        for name, thing in sorted(vars(importlib.import_module(module)).items()):
            if name[0] == "_":
                continue
            # builtins are named as everybody does, without their module
            full = name if module == "builtins" else f"{module}.{name}"
            if isinstance(thing, types.BuiltinFunctionType):
                yield _of_c(f"{module}:{name}", "function", full, thing)
            elif isinstance(thing, type) and thing.__module__ == module and not thing.__flags__ & HEAP_TYPE:
                yield _of_c(f"{module}:{name}", "class", full, thing)
                for attribute, method in sorted(vars(thing).items()):
                    if attribute[0] != "_" and inspect.ismethoddescriptor(method):
                        yield _of_c(f"{module}:{name}.{attribute}", "method", f"{full}.{attribute}", method)


def _of_c(id: str, kind: str, name: str, thing) -> Entry:
    try:
        # In the signature of a method self comes first.
        given = [*inspect.signature(thing).parameters.values()][kind == "method" :]
        names = [STARS.get(argument.kind, "") + argument.name for argument in given]
        arguments = f"({_few(names)})" if kind != "class" else ""
    except (ValueError, TypeError):
        arguments = "" if kind == "class" else "(...)"
    return Entry(id, kind, name, name + arguments, _summary(inspect.getdoc(thing)))


def _summary(documentation: str | None) -> str:
    """The first paragraph on one line."""
    return " ".join((documentation or "").strip().partition("\n\n")[0].split())


def _is_summary(entry: Entry) -> bool:
    text = entry.summary
    call = entry.name.rpartition(".")[2] + "("  # documentation that begins with the call is no sentence
    return (
        SHORTEST <= len(text) <= LONGEST
        and len(text.split()) > 2
        and text.isprintable()
        and not text.endswith(":")  # of what follows
        and not text.startswith(call)
        and not NO_SUMMARY.search(text)
    )


def words(text: str) -> set[str]:
    """Returns the first four letters of the words in a text or in the identifiers of a question, without common ones."""
    found = (word.lower() for word in WORD.findall(text))
    return {word[:4] for word in found if len(word) > 2 and word not in COMMON}


class _Wrong:
    """Finds wrong answers."""

    def __init__(self, found: list[Entry]):
        # Same kind and same ending, sorted by length, so that answers of similar length are neighbours.
        self._pools, self._families = defaultdict(list), defaultdict(list)
        for entry in sorted(found, key=lambda entry: (len(entry.summary), entry.id)):
            self._pools[_form(entry)].append(entry)
            for family in _families(entry):
                self._families[family, _form(entry)].append(entry)
        self._words = {entry.id: words(entry.summary) for entry in found}

    def of(self, entry: Entry, kind: str) -> Entry | None:
        """Returns the entry whose summary is the wrong answer of a kind, or of another if there is none; None without any."""
        asked, right = words(entry.question), self._words[entry.id]
        if kind == "sibling":
            for family in _families(entry):
                pool = self._families[family, _form(entry)]
                if other := self._pick(entry, pool, lambda _: True):
                    return other
        pool, file = self._pools[_form(entry)], entry.id.partition(":")[0]
        elsewhere = lambda other: other.id.partition(":")[0] != file  # noqa: E731
        if kind == "unrelated" and asked & right:
            unrelated = lambda other: elsewhere(other) and not asked & self._words[other.id]  # noqa: E731
            if other := self._pick(entry, pool, unrelated):
                return other
        return self._pick(entry, pool, elsewhere)

    def _pick(self, entry: Entry, pool: list[Entry], fits) -> Entry | None:
        """Returns a fitting entry of similar length: the hash says where the search begins."""
        size = len(entry.summary)
        first = bisect.bisect_left(pool, size / LENGTH_RATIO, key=lambda other: len(other.summary))
        last = bisect.bisect_right(pool, size * LENGTH_RATIO, key=lambda other: len(other.summary))
        near = pool[first:last]
        begin = int(hash_position(f"wrong {entry.id}") * len(near))
        for i in range(min(TRIES, len(near))):
            other = near[(begin + i) % len(near)]
            if self._differs(entry, other) and fits(other):
                return other
        return None

    def _differs(self, entry: Entry, other: Entry) -> bool:
        """False for the entry itself and for what may say the same: the same name elsewhere, or much the same words."""
        one, two = self._words[entry.id], self._words[other.id]
        same_name = entry.name.rpartition(".")[2].lower() == other.name.rpartition(".")[2].lower()
        return not same_name and 2 * len(one & two) < len(one | two)


def _form(entry: Entry) -> tuple[str, bool]:
    return entry.kind, entry.summary.endswith(".")


def _families(entry: Entry) -> list[str]:
    """The class, if it is in one, and the file."""
    owner = entry.id.rpartition(".")[0]
    return [owner, entry.id.partition(":")[0]] if entry.kind in ("method", "property") else [entry.id.partition(":")[0]]
