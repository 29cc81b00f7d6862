"""Says why this process is gone when it no longer can: after SIGKILL, or when jax ended it with a stack trace of C++.

jax aborts a process as soon as process 0, its coordinator, is gone, before any Python can speak. So each of the others has
a small helper, which does nothing but wait for its end, and then looks whether process 0 still answers.
"""

import atexit
import contextlib
import subprocess
import sys

HELPER = """
import os, socket, sys
me, host, port = sys.argv[1:]
if not sys.stdin.buffer.read(1):
    try:
        socket.create_connection((host, int(port)), 5).close()
        why = "ended without a word of its own (killed, or ended by jax as told above); process 0's port is still open"
    except OSError:
        why = f"ended, because process 0, which coordinates the others, is gone ({host}:{port} no longer answers)"
    os.write(2, f"process {me}: {why}\\n".encode())
"""

_helper: subprocess.Popen | None = None


def prepare(process_id: int, coordinator: str) -> None:
    """Starts the helper of this process; coordinator is HOST:PORT."""
    global _helper
    host, _, port = coordinator.rpartition(":")
    line = [sys.executable, "-I", "-S", "-c", HELPER, str(process_id), host.strip("[]"), port]
    with contextlib.suppress(OSError):  # no room for a process: then jax's own words must do
        _helper = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
        atexit.register(farewell)


def farewell() -> None:
    """Lets the helper go: this process says itself why it ends. A second call does nothing."""
    global _helper
    helper, _helper = _helper, None
    if helper is not None:
        with contextlib.suppress(OSError):
            helper.stdin.write(b"x")
            helper.stdin.close()
            helper.wait(5)
