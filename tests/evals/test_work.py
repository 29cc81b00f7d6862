"""Finished pieces of an evaluation: kept through a kill at any byte, never taken for another model's."""

import json
import math

import pytest

from mixtral_jax.config import UserError
from mixtral_jax.evals.work import Work, key_of


def test_what_was_put_is_there_again_to_the_last_digit(tmp_path):
    work = Work(tmp_path, "x", "key")
    values = {"a": 1 / 3, "b": [1, None, "\u2028 line"], "c": {"d": math.inf}}
    for name, value in values.items():
        work.put(name, value)
    work.close()
    again = Work(tmp_path, "x", "key")
    assert {name: again.get(name) for name in values} == values
    assert len(again) == 3
    assert "a" in again
    assert "z" not in again
    assert Work(None, "x", "key"), "an empty one is one too"
    again.close()


def test_another_key_finds_nothing(tmp_path):
    work = Work(tmp_path, "x", "key" * 10)
    work.put("a", 1)
    work.close()
    # The second has the same beginning, which is what the file's name holds.
    for key in ("other", "key" * 5 + "k" + "other"):
        with Work(tmp_path, "x", key) as other:
            assert "a" not in other


def test_a_file_cut_at_any_byte_gives_the_lines_that_are_whole(tmp_path):
    work = Work(tmp_path, "x", "key")
    for i in range(3):
        work.put(f"n{i}", {"value": i})
    work.close()
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        again = Work(tmp_path, "x", "key")
        count = max(whole[:cut].count(b"\n") - 1, 0)
        assert [f"n{i}" in again for i in range(3)] == [i < count for i in range(3)]
        again.put("new", 1)
        again.close()
        lines = path.read_text().splitlines()
        assert json.loads(lines[0]) == {"key": "key"}
        assert len(lines) == 2 + count
        assert json.loads(lines[-1]) == ["new", 1]


def test_without_a_folder_nothing_is_kept(tmp_path):
    work = Work(None, "x", "key")
    work.put("a", (1, 2))
    assert work.get("a") == [1, 2], "as it would be read back"
    work.close()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run the same command again to go on"):
        Work(tmp_path / "file", "x", "key")


def test_keys_tell_everything_apart():
    assert key_of({"a": 1, "b": (1, 2)}) == key_of({"b": [1, 2], "a": 1})
    assert len({key_of({"a": value}) for value in (1, 1.5, "1", None, [1], {})}) == 6
