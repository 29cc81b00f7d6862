"""Questions and answers out of Python's documentation: the same every time, unique, and wrong answers that are plausible."""

import collections
import re

import pytest

from mixtral_jax.config import UserError
from mixtral_jax.data import docstrings
from mixtral_jax.data.docstrings import LENGTH_RATIO, LONGEST, MIX, SHORTEST, entries, instructions, preferences, words


@pytest.fixture(scope="module")
def library():
    return entries()


@pytest.fixture
def found(library, monkeypatch):
    """The library's entries, read once for all tests."""
    monkeypatch.setattr(docstrings, "entries", lambda: library)
    return {entry.id: entry for entry in library}


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Returns a function that makes a standard library of given files, and reads it."""

    def make(**files):
        paths = []
        for name, content in files.items():
            path = tmp_path / f"{name}.py"
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            paths.append((f"{name}.py", path))
        monkeypatch.setattr(docstrings, "source_files", lambda source: paths)
        monkeypatch.setattr(docstrings, "INSPECTED", ())
        return entries()

    return make


def test_several_thousand_of_every_kind(library):
    kinds = collections.Counter(entry.kind for entry in library)
    assert len(library) > 4000
    assert all(kinds[kind] > 50 for kind in docstrings.QUESTIONS)
    assert {"json/decoder.py:JSONDecoder.decode", "posixpath.py:join", "builtins:str.join", "math:sqrt"} <= {
        entry.id for entry in library
    }
    assert not [entry.id for entry in library if re.match(r"(test|idlelib/idle_test|site-packages)/", entry.id)]


def test_a_row_for_sft(found):
    rows = dict(instructions())
    assert list(rows) == sorted(found)
    assert rows["posixpath.py:join"] == {
        "messages": [
            {"role": "user", "content": found["posixpath.py:join"].question},
            {
                "role": "assistant",
                "content": "Join two or more pathname components, inserting '/' as needed. If any component is an absolute path, all "
                "previous path components will be discarded. An empty last part will result in a path that ends with a separator.",
            },
        ]
    }
    assert "posixpath.join(a, *p)" in found["posixpath.py:join"].question


def test_nothing_occurs_twice_and_lengths(library):
    for key in ("id", "name", "question", "summary"):
        values = [getattr(entry, key) for entry in library]
        assert len(set(values)) == len(values), key
    assert all(SHORTEST <= len(entry.summary) <= LONGEST for entry in library)
    assert all(entry.summary == " ".join(entry.summary.split()) for entry in library)
    assert len({entry.question.partition(entry.shown)[0] for entry in library if entry.kind == "function"}) == 3


def test_rejected_answers_are_plausible(found):
    of_summary = {entry.summary: entry for entry in found.values()}
    rows = dict(preferences())
    assert len(rows) > 0.95 * len(found)
    longer = 0
    for id, row in rows.items():
        right, wrong = found[id], of_summary[row["rejected"]]
        assert (row["prompt"], row["chosen"]) == (right.question, right.summary)
        assert wrong.id != id
        assert wrong.kind == right.kind
        assert wrong.name.rpartition(".")[2] != right.name.rpartition(".")[2]
        sizes = sorted((len(row["chosen"]), len(row["rejected"])))
        assert sizes[1] <= LENGTH_RATIO * sizes[0] + 1e-6
        assert row["chosen"].endswith(".") == row["rejected"].endswith(".")
        longer += len(row["chosen"]) > len(row["rejected"])
    assert 0.45 < longer / len(rows) < 0.55  # length tells nothing
    assert max(collections.Counter(row["rejected"] for row in rows.values()).values()) < len(rows) / 200


def test_kinds_of_wrong_answers(found):
    of_summary = {entry.summary: entry.id for entry in found.values()}
    assert set(MIX) == {"unrelated", "elsewhere", "sibling"}
    same_file, shared = {}, {}
    for kind in MIX:
        rows = dict(preferences({kind: 1}))
        files = [(id.partition(":")[0], of_summary[row["rejected"]].partition(":")[0]) for id, row in rows.items()]
        same_file[kind] = sum(one == other for one, other in files) / len(files)
        related = [row for row in rows.values() if words(row["prompt"]) & words(row["chosen"])]
        assert len(related) > 0.8 * len(rows)
        shared[kind] = sum(bool(words(row["prompt"]) & words(row["rejected"])) for row in related) / len(related)
    assert same_file["unrelated"] == same_file["elsewhere"] == 0
    assert same_file["sibling"] > 0.6
    assert shared["unrelated"] < 0.01 < shared["elsewhere"] < shared["sibling"]
    for mix in ({}, {"sibling": 0}, {"nonsense": 1}):
        with pytest.raises(ValueError, match="mix="):
            next(preferences(mix))


def test_two_readings_are_the_same(found):
    assert list(preferences()) == list(preferences())
    assert list(instructions()) == list(instructions())


MODULE = '''"""A module about apples and pears."""
import nothing_of_the_kind
def pick(tree, *, ladder=None, **more):
    """Pick the
    ripe apples.

    More words."""
    def inner(): """Never shown to anybody."""
def second(): """Pick the ripe apples"""
def old(): """Deprecated, pick the apples by hand."""
def signed(a): """signed(a) -> the number of apples."""
def short(): """Apples."""
def heading(): """The following apples are picked:"""
def _private(): """Pick the apples that nobody sees."""
def bare(): pass
if True:
    class Tree(Plant, metaclass=Meta, ):
        """A tree on which apples grow."""
        @property
        def height(self): """How high the tree is, in feet."""
        async def fell(self, axe): r"""Cut the tree \\d down."""
        @classmethod
        def plant(cls, *where): """Put a new tree into the soil."""
else:
    class Tree: """What is a tree, after all?"""
'''


def test_what_is_taken_of_a_module(fake):
    found = {entry.id: (entry.kind, entry.shown, entry.summary) for entry in fake(fruit=MODULE)}
    assert found == {
        "fruit.py": ("module", "fruit", "A module about apples and pears."),
        "fruit.py:Tree": ("class", "fruit.Tree(Plant)", "A tree on which apples grow."),
        "fruit.py:Tree.fell": ("method", "fruit.Tree.fell(axe)", "Cut the tree \\d down."),
        "fruit.py:Tree.height": ("property", "fruit.Tree.height", "How high the tree is, in feet."),
        "fruit.py:Tree.plant": ("method", "fruit.Tree.plant(*where)", "Put a new tree into the soil."),
        "fruit.py:pick": ("function", "fruit.pick(tree, *, ladder, **more)", "Pick the ripe apples."),
    }


def test_files_that_cannot_be_parsed_are_counted(fake, caplog):
    caplog.set_level("INFO")
    broken = {"syntax": "def (:", "null": b"x = 1\0", "latin": b'"""caf\xe9 and more words"""', "deep": "(" * 1000}
    assert [entry.id for entry in fake(fruit=MODULE, **broken)] == [entry.id for entry in fake(fruit=MODULE)]
    assert "4 files of the standard library cannot be parsed; left out" in caplog.text


def test_an_object_without_a_plausible_wrong_answer_is_left_out(fake):
    fake(one='"""The only module of this library."""')
    assert len(list(instructions())) == 1
    assert not list(preferences())


def test_no_library_at_all(monkeypatch, tmp_path):
    monkeypatch.setattr("mixtral_jax.data.sources.sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="there is no Python source"):
        next(instructions())
