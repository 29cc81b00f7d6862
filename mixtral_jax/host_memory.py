"""The C library's memory, where XLA:CPU keeps its arrays: huge pages for it, and what is free given back.

A training step on a CPU frees and takes gigabytes. The kernel clears every page again that comes back, 4 KiB at a time
unless huge pages are asked for: a third of a step's time for a model of 214M parameters (docs/performance.md).
"""

import ctypes
import os
import sys
from pathlib import Path

VARIABLE = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb=1"  # malloc asks for transparent huge pages (glibc 2.35 and later)
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Starts this program again, in this process, with huge pages for malloc, which reads its settings once, when it starts.

    For a program's first line. Does nothing where it would not help or where the user has set GLIBC_TUNABLES.
    """
    if VARIABLE in os.environ or not _helps():
        return
    os.environ[VARIABLE] = HUGE_PAGES
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _helps() -> bool:
    """Whether this is glibc 2.35 or later on a kernel that gives huge pages to those who ask."""
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        return (
            name == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35) and "[madvise]" in KERNEL.read_text()
        )
    except (OSError, ValueError):
        return False


def give_back() -> None:
    """Returns memory to the system that this process has freed and the C library keeps; elsewhere than on glibc nothing."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return
