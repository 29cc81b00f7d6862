"""Runs a program as several processes of this machine that work as one.

    python -m mixtral_jax.launch --processes=4 -- train.py --config=configs/tiny.py --workdir=runs/tiny
    python -m mixtral_jax.launch --processes=2 --devices_per_process=4 -- train.py ...     (8 CPU devices, or 8 GPUs)
    python -m mixtral_jax.launch --processes=2 --restarts=3 -- -m some.module --its_flag=1

For trials on one machine, and for a host whose GPUs each want a process. On a cluster the scheduler starts the processes
(docs/processes.md).
"""

import argparse
import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from mixtral_jax.clusters import LAUNCHER, MISTAKE, SILENCE, VARIABLES

AFTER = """\
What follows -- is a Python script or -m MODULE, with its flags. Each process gets where the others are in its environment
(MIXTRAL_JAX_COORDINATOR, MIXTRAL_JAX_PROCESSES, MIXTRAL_JAX_PROCESS_ID). The lines of processes 1, 2, ... begin with their
number. SIGTERM and Ctrl-C go on to all of them. When one fails the others are ended, within a minute.

exit status: 0 all are done, else that of the first process to fail (128 + N: killed by signal N), 2 a mistake in the flags
"""
OWN_END_SECONDS = 40  # for the others to notice, say so and end, after one has failed
TERM_SECONDS = 10  # from SIGTERM to SIGKILL
RESTART_SECONDS = 3
FROZEN_SECONDS = 3  # for a process that gave no sign of life, once it alone is left
SAME_SECONDS = 5  # for process 0 to end with the mistake that another has ended with
# What gloo and jax's coordination service write for their developers.
NOISE = re.compile(
    r"\[Gloo\] Rank \d+ is connected|[EWI]\d{4} [\d:.]+ +\d+ (coordination_service|preemption_sync)|\s+@ +0x|"
    r"\*\*\* Check failure|Additional GRPC error|:UNKNOWN:Error received from peer|RPC: /xla"
)


def environment(coordinator: str, count: int, index: int, devices: int | None) -> dict[str, str]:
    """The environment of one process.

    Args:
        coordinator: HOST:PORT.
        count: processes.
        index: of this one.
        devices: CPU devices it makes, or GPUs it gets of those visible here; None leaves that to it.
    """
    given = {**os.environ, **dict(zip(VARIABLES, (coordinator, str(count), str(index)), strict=True))}
    given |= {"PYTHONUNBUFFERED": "1", LAUNCHER: str(os.getpid())}
    if devices is None:
        return given
    flags = re.sub(r"--xla_force_host_platform_device_count=\S+", "", given.get("XLA_FLAGS", ""))
    given["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices} {flags}".strip()
    gpus = visible_gpus()
    if gpus:
        given["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[index * devices : (index + 1) * devices])
    return given


def visible_gpus() -> list[str]:
    """The GPUs that programs see here, as CUDA_VISIBLE_DEVICES names them; none where jax is told to use the CPU."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        names = [name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
        # CUDA reads up to the first that is none, and -1 is none.
        return list(itertools.takewhile(lambda name: name and not name.startswith("-"), names))
    return [str(i) for i, _ in enumerate(sorted(Path("/dev").glob("nvidia[0-9]*")))]


def free_port() -> int:
    """A port of this machine that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Job:
    """The processes of one start."""

    def __init__(self, program: list[str], count: int, devices: int | None):
        coordinator = f"127.0.0.1:{free_port()}"
        self._readers: list[threading.Thread] = []
        self._silent: set[int] = set()  # those of whom the others said that they give no sign of life
        self.processes: list[subprocess.Popen] = []
        for i in range(count):
            self.processes.append(self._start(program, environment(coordinator, count, i, devices), i))

    def _start(self, program: list[str], given: dict[str, str], index: int) -> subprocess.Popen:
        # Sessions of their own: a terminal's Ctrl-C comes here alone, and goes on to each of them once.
        process = subprocess.Popen(
            [sys.executable, *program],
            env=given,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            # A bar needs the terminal itself.
            stderr=None if index == 0 and sys.stderr.isatty() else subprocess.PIPE,
            start_new_session=True,
        )
        for pipe, out in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            if pipe is not None:
                thread = threading.Thread(target=self._pass_on, args=(pipe, out, index), daemon=True)
                thread.start()
                self._readers.append(thread)
        return process

    def send(self, number: int) -> None:
        """Passes a signal on to all that still run."""
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)

    def wait(self) -> tuple[str, int] | None:
        """Waits until all have ended; returns who failed first, in words, and the status, or None if all went well."""
        first, deadline, step, frozen = None, None, 0, None
        while running := [i for i, process in enumerate(self.processes) if process.poll() is None]:
            if first is None:
                first = next((i for i, process in enumerate(self.processes) if process.poll()), None)
                if first is not None:
                    told = _ending(self.processes[first].returncode)
                    _say(f"process {first} {told}, the first to end; waiting for the {len(running)} others to notice")
                    deadline = time.monotonic() + OWN_END_SECONDS
            elif frozen is None and self._silent.issuperset(running):
                # Whoever is only slow ends now, like the others; a frozen process hears no SIGTERM.
                frozen, step, deadline = running, 1, time.monotonic() + FROZEN_SECONDS
            if deadline and time.monotonic() > deadline:
                self.send((signal.SIGTERM, signal.SIGKILL)[step])
                deadline, step = time.monotonic() + TERM_SECONDS, 1
            time.sleep(0.05)
        for thread in self._readers:
            thread.join(8)  # a killed process's last words come from its helper
        failed = [i for i, process in enumerate(self.processes) if process.returncode]
        if not failed:
            return None
        first = failed[0] if first is None else first
        status = _status(self.processes[first].returncode)
        frozen = [i for i in frozen or () if self.processes[i].returncode == -signal.SIGKILL]
        if frozen:
            return f"process {frozen[0]} gave no sign of life (frozen?) and was killed, the first to fail", status
        return f"process {first} {_ending(self.processes[first].returncode)}, the first to end", status

    def _pass_on(self, pipe, out, index: int) -> None:
        prefix, mistake = f"process {index}: " if index else "", ""
        with pipe:
            for raw in pipe:
                line = raw.decode(errors="replace")
                if mistake or line.startswith(MISTAKE):
                    mistake += line.removeprefix(MISTAKE)
                    continue
                if NOISE.match(line):
                    continue
                silent = SILENCE.search(line)
                if silent:
                    self._silent.add(int(silent[1]))
                out.write(line if line.startswith(prefix) else prefix + line)
                out.flush()
        if mistake and not self._told_by_process_0():
            out.write(prefix + mistake)
            out.flush()

    def _told_by_process_0(self) -> bool:
        """Whether process 0 ends with a mistake, too; one voice is enough."""
        end = time.monotonic() + SAME_SECONDS
        while self.processes[0].poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        return self.processes[0].poll() == 2


def _status(returncode: int) -> int:
    return 128 - returncode if returncode < 0 else returncode


def _ending(returncode: int) -> str:
    if returncode < 0:
        return f"was killed by {signal.Signals(-returncode).name}"
    return f"ended with status {returncode}"


def _say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


def run(program: list[str], count: int, devices: int | None, restarts: int) -> int:
    """Runs the program as `count` processes, again after a failure up to `restarts` times; returns the exit status."""
    job, stopped = None, []

    def forward(number, frame):
        stopped.append(number)
        if job is not None:
            job.send(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for attempt in range(restarts + 1):
            job = Job(program, count, devices)
            if stopped:  # it came while they were started
                job.send(stopped[-1])
            failed = job.wait()
            if failed is None:
                return 0
            who, status = failed
            _say(f"{who}; all have ended")
            if stopped or status == 2 or attempt == restarts:
                return status
            _say(f"starting all again, number {attempt + 1} of at most {restarts}")
            time.sleep(RESTART_SECONDS)
        return status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if job is not None:
            job.send(signal.SIGKILL)


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line and runs it; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    at = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        "python -m mixtral_jax.launch",
        usage="python -m mixtral_jax.launch --processes=N [--devices_per_process=K] [--restarts=R] -- train.py [flags]",
        description=__doc__,
        epilog=AFTER,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=int, required=True, help="how many")
    parser.add_argument(
        "--devices_per_process", type=int, help="CPU devices, or GPUs, of each (default: its own affair)"
    )
    parser.add_argument("--restarts", type=int, default=0, help="start all again after a failure, so many times")
    given = parser.parse_args(arguments[:at])
    program = arguments[at + 1 :]
    if not program:
        parser.error(
            "nothing to run; for example: ... --processes=2 -- train.py --config=configs/tiny.py --workdir=runs/t"
        )
    if given.processes < 1 or given.restarts < 0 or (given.devices_per_process or 1) < 1:
        parser.error(
            f"--processes={given.processes} --devices_per_process={given.devices_per_process} --restarts={given.restarts}; "
            "processes and devices are at least 1, restarts at least 0"
        )
    if program[0] != "-m" and not Path(program[0]).is_file():
        parser.error(f"{program[0]} is no file; give a Python script, or -m and a module")
    needed, gpus = given.processes * (given.devices_per_process or 0), len(visible_gpus())
    if gpus and needed > gpus:
        parser.error(
            f"{given.processes} processes with {given.devices_per_process} devices each need {needed} and {gpus} GPUs are visible"
        )
    return run(program, given.processes, given.devices_per_process, given.restarts)


if __name__ == "__main__":
    sys.exit(main())
