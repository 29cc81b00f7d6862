"""Small tasks made of the running Python's own library, for machines without a network: the same on every call.

Each function returns {"train": examples, "test": questions} as the harness wants data sets. It is read from source files;
nothing is imported or run.
"""

import ast
import builtins
import functools
import hashlib
import keyword
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, DatasetDict

QUESTIONS = 100  # of each task, at most
EXAMPLES = 20  # from which the few before a question are drawn
MODULES = """
argparse ast asyncio.events base64 bisect calendar cmd codecs collections.__init__ configparser contextlib copy csv
dataclasses datetime decimal difflib dis email.message email.utils enum fileinput fnmatch fractions ftplib functools
getopt getpass gettext glob gzip heapq hmac html.__init__ http.client http.cookies imaplib inspect ipaddress json.__init__
linecache locale logging.__init__ mailbox mimetypes netrc ntpath numbers operator optparse os pathlib pdb pickle pkgutil
platform plistlib poplib posixpath pprint profile pstats queue quopri random re.__init__ sched secrets selectors shelve shlex
shutil smtplib socket socketserver ssl stat statistics string struct subprocess symtable tabnanny tarfile tempfile textwrap
threading timeit tokenize trace traceback turtle types typing unittest.case urllib.parse urllib.request uuid warnings wave
weakref webbrowser xml.dom.minidom zipapp zipfile
""".split()  # noqa: SIM905, a table of words


class Function(NamedTuple):
    """A public function or class of the library."""

    module: str
    name: str
    docstring: str


@functools.cache
def _library() -> tuple[dict[str, str], list[Function]]:
    """Module docstrings by module, and the documented functions and classes whose name is in one module only."""
    root, texts, found = Path(sysconfig.get_path("stdlib")), {}, []
    for dotted in MODULES:
        path = root / f"{dotted.replace('.', '/')}.py"
        if not path.is_file():  # another version's library
            continue
        module, tree = dotted.removesuffix(".__init__"), ast.parse(path.read_text("utf-8"))
        texts[module] = ast.get_docstring(tree) or ""
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                found.append(Function(module, node.name, ast.get_docstring(node) or ""))
    names = [each.name for each in found]
    return texts, [each for each in found if names.count(each.name) == 1]


def members(**_) -> DatasetDict:
    """Which module defines a name: four to choose from."""
    texts, found = _library()
    rows = []
    for each in _shuffled(found, "members"):
        others = _shuffled([module for module in texts if module != each.module], each.name)[:3]
        choices = _shuffled([each.module, *others], f"choices {each.name}")
        rows.append({"name": each.name, "choices": choices, "gold": choices.index(each.module)})
    return _split(rows)


def keywords(**_) -> DatasetDict:
    """Whether a word is one of Python's keywords."""
    others = [name for name in dir(builtins) if name.isalpha() and name.islower() and not keyword.iskeyword(name)]
    words = [(word, 1) for word in keyword.kwlist] + [(word, 0) for word in others[: len(keyword.kwlist)]]
    return _split([{"word": word, "gold": gold} for word, gold in _shuffled(words, "keywords")])


def arithmetic(**_) -> DatasetDict:
    """Sums and differences of small numbers."""
    rows = []
    for a in range(2, 40):
        for b in range(2, 20):
            rows.append({"question": f"{a} + {b}", "answer": str(a + b)})
            rows.append({"question": f"{a + b} - {b}", "answer": str(a)})
    return _split(_shuffled(rows, "arithmetic"))


def last_word(**_) -> DatasetDict:
    """Sentences of documentation whose last word is to be guessed."""
    rows = []
    for each in _shuffled(_library()[1], "last word"):
        sentence = " ".join(each.docstring.partition("\n\n")[0].split()).partition(". ")[0].removesuffix(".")
        before, _, last = sentence.rpartition(" ")
        if len(before.split()) >= 5 and last.isalpha():
            rows.append({"before": f"{each.module}.{each.name}: {before}", "last": last})
    return _split(rows)


def prose(**_) -> DatasetDict:
    """Modules' documentation, as running text."""
    texts = [{"text": text} for text in _library()[0].values() if len(text.split()) >= 30]
    return _split(_shuffled(texts, "prose"), questions=30)


def function_name(**_) -> DatasetDict:
    """A function's documentation that names it; the name is asked for."""
    rows = []
    for each in _shuffled(_library()[1], "function name"):
        first = " ".join(each.docstring.partition("\n\n")[0].split())
        if 20 <= len(first) <= 300 and re.fullmatch("[a-z_]+", each.name):
            rows.append({"text": f"{each.module}.{each.name}: {first}", "answer": each.name})
    return _split(rows)


def _split(rows: Sequence[dict], questions: int = QUESTIONS) -> DatasetDict:
    """The first rows as examples, the next as questions."""
    count = min(EXAMPLES, len(rows) // 4)
    train, test = list(rows[:count]), list(rows[count : count + questions])
    return DatasetDict({"train": Dataset.from_list(train), "test": Dataset.from_list(test)})


def _shuffled(items: Sequence, salt: str) -> list:
    """The items in an order that is any, but always the same."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{salt} {item}".encode()).digest())
