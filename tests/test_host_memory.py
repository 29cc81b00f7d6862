"""Huge pages for the C library's memory, asked for by starting the program again; in real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixtral_jax import host_memory

ROOT = str(Path(host_memory.__file__).parent.parent)
PROGRAM = """
import os, sys
from mixtral_jax import host_memory
if __name__ == "__main__":
    host_memory.KERNEL = type(host_memory.KERNEL)(sys.argv[1])
    print("begins", os.getpid(), flush=True)
    host_memory.restart_with_huge_pages()
    print(os.environ.get("GLIBC_TUNABLES"), os.getpid(), sys.argv[2:])
"""


def run(tmp_path, kernel: str, **environment: str) -> list[str]:
    """What the program prints; `kernel` is what the kernel says of huge pages."""
    (tmp_path / "enabled").write_text(kernel)
    (tmp_path / "program.py").write_text(PROGRAM)
    given = {key: value for key, value in os.environ.items() if key != host_memory.VARIABLE}
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "enabled"), "--a", "b c"]
    done = subprocess.run(
        command, env=given | environment | {"PYTHONPATH": ROOT}, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.skipif(
    not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"), reason="only glibc reads GLIBC_TUNABLES"
)
def test_a_program_starts_again_once_as_the_same_process(tmp_path):
    lines = run(tmp_path, "always [madvise] never")
    pids = {line.split()[1] for line in lines}
    assert [line.split()[0] for line in lines] == ["begins", "begins", "glibc.malloc.hugetlb=1"]
    assert len(pids) == 1
    assert lines[-1].endswith("['--a', 'b c']")


@pytest.mark.parametrize(
    ("kernel", "environment", "want"),
    [
        ("[always] madvise never", {}, "None"),
        ("always madvise [never]", {}, "None"),
        ("always [madvise] never", {"GLIBC_TUNABLES": "glibc.malloc.check=0"}, "glibc.malloc.check=0"),
    ],
)
def test_it_does_not_where_that_would_change_nothing_or_the_user_has_chosen(tmp_path, kernel, environment, want):
    lines = run(tmp_path, kernel, **environment)
    assert [line.split()[0] for line in lines] == ["begins", want]


def test_giving_back_is_harmless():
    host_memory.give_back()
