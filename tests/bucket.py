"""A folder that stands in for object stores: gs://bucket/x is FAKE_BUCKETS/bucket/x, through epath and fsspec as always.

    FAKE_BUCKETS=/tmp/b python -m tests.bucket train.py --config=... --config.data.cache_dir=gs://bucket/cache

Orbax and tensorstore do not come through here: they have drivers of their own for gs://.
"""

import os
import runpy
import sys
import time
from pathlib import Path
from typing import ClassVar

import fsspec
from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem

VARIABLE = "FAKE_BUCKETS"
HANG = "FAKE_BUCKETS_HANG"  # MODE:N: the N-th file opened so is begun and never finished


class Buckets(LocalFileSystem):
    """As a store: what is written appears when it is whole, and nothing is locked, appended to or renamed."""

    cachable = False
    opened: ClassVar[list[tuple[str, str]]] = []  # (mode, path) of all files, by all instances
    error: Exception | None = None  # what the next calls raise

    def __init__(self, **options):
        super().__init__(auto_mkdir=True)

    @classmethod
    def _strip_protocol(cls, path):
        path = os.fspath(path)
        return os.path.join(os.environ[VARIABLE], path.partition("://")[2]) if "://" in path else path

    def _open(self, path, mode="rb", block_size=None, **options):
        if self.error:
            raise self.error
        self.opened.append((mode, path))
        kind, _, number = os.environ.get(HANG, "").partition(":")
        if kind == mode and sum(each == mode for each, _ in self.opened) >= int(number):
            Path(os.environ[VARIABLE], "hangs").touch()
            time.sleep(600)
        return super()._open(path, mode, block_size, **options)


def install() -> None:
    """Takes the place of gs:// in this process."""
    fsspec.register_implementation("gcs", Buckets, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()


def main() -> None:
    """Runs a program with the buckets; each process of a group has a disk of its own."""
    from mixtral_jax.data import remote_cache

    install()
    host = os.environ.get("MIXTRAL_JAX_PROCESS_ID", "0")
    remote_cache.ROOT = f"{os.environ[VARIABLE]}/disk{host}"
    sys.argv = sys.argv[1:]
    if sys.argv[0] == "-m":
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
