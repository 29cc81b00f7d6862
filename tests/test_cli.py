"""The commands as a user runs them: exit status 0 done, 2 a mistake explained, and no stack trace for a mistake."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixtral_jax import cli

ROOT = Path(__file__).parent.parent


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


MISTAKES = {
    "no config": ((), ["--config is missing", "configs/tiny.py"]),
    "no such file": (("--config=configs/none.py",), ["none.py"]),
    "unknown key": (
        ("--config=configs/tiny.py", "--config.train.stepz=3"),
        ["no configuration key train.stepz", "did you mean train.steps?"],
    ),
    "no such group": (("--config=configs/tiny.py", "--config.workdir=3"), ["no configuration key workdir"]),
    "wrong type": (("--config=configs/tiny.py", "--config.train.steps=many"), ["many"]),
    "unknown argument": (("--config=configs/tiny.py:huge",), ["huge", "tiny"]),
    "unknown flag": (("--config=configs/tiny.py", "--wrkdir=x"), ["wrkdir"]),
    "stray word": (("--config=configs/tiny.py", "runs/x"), ["runs/x"]),
    "no workdir": (("--config=configs/tiny.py:tiny",), ["--workdir is missing"]),
    "impossible values": (
        ("--config=configs/tiny.py", "--workdir=x", "--config.model.experts_per_token=9"),
        ["9", "num_experts=8"],
    ),
}


@pytest.mark.parametrize(("arguments", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_end_with_status_2_and_an_explanation(arguments, words):
    done = command("train.py", *arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not (ROOT / "x").exists(), "nothing may be made before the configuration is right"


@pytest.mark.parametrize("program", ["train.py", "eval.py"])
def test_help_helps(program):
    done = command(program, "--help")
    assert done.returncode == 0
    for word in ("--config" if program == "train.py" else "--checkpoint", "python " + program, "runs/"):
        assert word in done.stdout


def test_generate_explains_itself_and_its_mistakes():
    done = command("-m", "mixtral_jax.generate", "--help")
    assert done.returncode == 0
    for word in ("--checkpoint", "--top_p", "examples:", "exit status"):
        assert word in done.stdout
    done = command("-m", "mixtral_jax.generate", "--checkpoint=nowhere", "--prompt=x")
    assert done.returncode == 2
    assert "nowhere is no directory; give a run's workdir" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("set_", "want"),
    [
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, "64"),
        ({"JAX_NUM_CPU_DEVICES": "4"}, "64"),
        ({"JAX_NUM_CPU_DEVICES": "4", "PJRT_NPROC": "9"}, "9"),
        ({}, None),
    ],
)
def test_fake_devices_get_enough_threads(monkeypatch, set_, want):
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "PJRT_NPROC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in set_.items():
        monkeypatch.setenv(name, value)
    cli.threads_for_fake_devices()
    assert os.environ.get("PJRT_NPROC") == want


@pytest.mark.parametrize(
    ("program", "arguments", "words"),
    [
        ("train.py", ["--config=configs/tiny.py", "--workdir=x"], "continue from the last checkpoint"),
        ("eval.py", ["--checkpoint=x", "--out=y"], "finished pieces are kept in the folder of --out"),
    ],
)
def test_ctrl_c_says_how_to_go_on(program, arguments, words):
    """It comes where each program first waits for others, before it touches a folder."""
    lines = [
        "import runpy, sys",
        "from mixtral_jax import cli",
        "def stop(): raise KeyboardInterrupt",
        f"cli.join_processes, sys.argv = stop, {[program, *arguments]}",
        f"runpy.run_path('{program}', run_name='__main__')",
    ]
    done = command("-c", "\n".join(lines))
    assert done.returncode == 130, done.stderr
    assert done.stderr.startswith("interrupted; run the same command again"), done.stderr
    assert words in done.stderr
