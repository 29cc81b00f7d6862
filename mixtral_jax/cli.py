"""The command line's manners: flags from absl, mistakes explained, exit status 0 done, 2 a mistake of the user's, 1 a fault."""

import difflib
import os
import re
import sys
import threading
from collections.abc import Callable

from absl import flags
from ml_collections import ConfigDict, config_flags

from mixtral_jax import clusters, distributed, watch, xla_flags
from mixtral_jax.config import Config, RunError, UserError, from_config_dict, key_list
from mixtral_jax.interrupt import InterruptedRun
from mixtral_jax.progress import messages

# What is defined here belongs to the program that asks for it: its --help shows it.
flags.disclaim_key_flags()

_SEVERAL: set[str] = set()  # flags of several values


def define_config_flag():
    """Defines `--config=FILE[:argument]` and, through it, `--config.group.key=value`."""
    return config_flags.DEFINE_config_file(
        "config",
        help_string="A file of configs/, with its argument after a colon (configs/mixtral_8x7b.py:tiny). "
        "--config.GROUP.KEY=VALUE changes one of its values.",
        lock_config=True,
    )


def define_process_flags() -> None:
    """Defines --coordinator, --processes and --process_id, for programs that run as several processes."""
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0; needed where no scheduler tells (docs/processes.md)."
    )
    flags.DEFINE_integer("processes", None, "How many processes work as one.")
    flags.DEFINE_integer("process_id", None, "The number of this process, from 0.")


def define_several(name: str, help: str):
    """Defines a flag of several values, `--name A B C`, `--name=A --name=B` or a mixture of both; a list, or None."""
    _SEVERAL.add(name)
    return flags.DEFINE_multi_string(name, None, help)


def spelled_out(arguments: list[str], several: set[str]) -> list[str]:
    """Returns a command line in which every value of a flag of several values has the flag in front of it."""
    found, current = [], None
    for argument in arguments:
        name, equals, _ = argument.lstrip("-").partition("=")
        if argument.startswith("-"):
            current = name if name in several else None
            if current is None or equals:
                found.append(argument)
        else:
            found.append(argument if current is None else f"--{current}={argument}")
    return found


def join_processes() -> None:
    """Joins the other processes, if there are any; before anything asks jax for its devices.

    Raises:
        UserError: the flags contradict each other.
        RunError: the others did not come.
    """
    distributed.start({name: flags.FLAGS[name].value for name in clusters.FLAGS})
    if distributed.together():
        watch.begin()


def typed_config(value: ConfigDict | None) -> Config:
    """Returns the typed configuration of the flag.

    Raises:
        UserError: the flag is missing, or the configuration is wrong.
    """
    if value is None:
        raise UserError("--config is missing; for example --config=configs/tiny.py")
    if not isinstance(value, ConfigDict):
        # config_flags stands in an object that raises what went wrong, at the first look at it.
        try:
            _ = value.model
        except Exception as error:
            raise UserError(f"--config: {error}") from error
    return from_config_dict(value)


def threads_for_fake_devices() -> None:
    """Gives XLA enough threads where one CPU stands in for several devices; before jax makes its client.

    Its pool has as many threads as there are cores or devices, and a device that waits in a collective keeps its thread.
    A loop with collectives and a collective beside it can take all of them: nothing moves, and after 40 s XLA aborts.
    """
    several = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if several or os.environ.get("JAX_NUM_CPU_DEVICES", "1") != "1":
        os.environ.setdefault("PJRT_NPROC", "64")


def run(main: Callable[[], None], usage: str, interrupted: str = "interrupted") -> None:
    """Parses flags, runs main, and exits; a UserError or a wrong flag is printed in one piece, without a stack trace.

    Args:
        main: the program; flags are parsed when it runs.
        usage: printed by --help before the flags.
        interrupted: what to say after Ctrl-C.
    """
    if any(arg in ("--help", "-help", "-h") for arg in sys.argv[1:]):
        print(usage.strip() + "\n\nFlags:\n" + flags.FLAGS.module_help(sys.modules["__main__"]))
        sys.exit(0)
    threads_for_fake_devices()
    xla_flags.apply()

    def program() -> None:
        _parse()
        main()

    status = guarded(program, interrupted)
    if any(type(thread).__module__.startswith("orbax.") for thread in threading.enumerate()):
        # Of a save that failed: they wait, for ten minutes, for folders that nobody will make any more.
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
    sys.exit(status)


def guarded(main: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Runs a program and returns its exit status; what is explained is printed without a stack trace.

    Args:
        main: the program; what it returns is the status, None means 0.
        interrupted: what to say after Ctrl-C.
    """
    try:
        with messages():
            status = main() or 0
            watch.finished()
    except InterruptedRun as stopped:
        watch.failed(stopped, stopped.status)
        print(stopped, file=sys.stderr)
        return stopped.status
    except UserError as error:
        watch.failed(error, 2)
        print(f"{_mark()}error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        watch.failed(error, error.status)
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except Exception as error:
        watch.failed(error, 1)
        raise
    except KeyboardInterrupt as error:
        watch.failed(error, 130)
        print(interrupted, file=sys.stderr)
        return 130
    return status


def _mark() -> str:
    """What begins a mistake's words: all that our launcher started make the same one, unless they have met already."""
    place = os.environ.get(clusters.VARIABLES[2], "0")
    return clusters.MISTAKE if clusters.LAUNCHER in os.environ and place != "0" else ""


def _unknown(name: str) -> str:
    """What to say of `--config.GROUP.name=VALUE` where there is no such key."""
    given = [arg.partition("=")[0].removeprefix("--config.") for arg in sys.argv[1:] if arg.startswith("--config.")]
    key = next((arg for arg in given if name in arg.split(".")), name)
    near = difflib.get_close_matches(key, key_list(), n=1, cutoff=0.7)
    return f"there is no configuration key {key}" + (f"; did you mean {near[0]}?" if near else "")


def _parse() -> None:
    try:
        rest = flags.FLAGS(spelled_out(sys.argv, _SEVERAL))
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError) as error:
        # A config file is a program: whatever it raises while it is read is about what the user asked for.
        # config_flags puts the whole stack trace into its message; its last line is what a person needs.
        text = str(error).strip().splitlines()[-1] if "Traceback" in str(error) else str(error)
        missing = re.match(r"\W*(\w+)\W*(n?Did you mean|$)", text)
        if isinstance(error, KeyError | AttributeError) and missing:
            text = _unknown(missing[1])
        raise UserError(f"{text} (while reading the command line; --help shows the flags)") from error
    if rest[1:]:
        raise UserError(f"unexpected {' '.join(rest[1:])}; flags start with --, as in --config=configs/tiny.py")
