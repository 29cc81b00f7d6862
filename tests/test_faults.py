"""What goes wrong in a long run, done to real processes: signals, two runs, damage, full, read-only and vanished disks."""

import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from mixtral_jax.checkpoint import steps_in
from tests import processes
from tests.processes import (
    assert_same,
    command,
    fill,
    logged,
    run,
    steps_logged,
    stored,
    wait_for,
    write_corpus,
)


@pytest.fixture
def changes(tmp_path):
    """A small run's data."""
    write_corpus(tmp_path / "corpus")
    return dict(data__source="text", data__path=str(tmp_path / "corpus"), data__cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def launch():
    """Starts processes; those that still run at the end of a test, because it failed, are killed."""
    started = []

    def start(line, **more):
        started.append(processes.Process(line, **more))
        return started[-1]

    yield start
    for process in started:
        process.stop()


def reached(workdir: Path, step: int):
    return lambda: max(steps_logged(workdir), default=0) >= step


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=["sigterm", "sigint"]
)
def test_a_signal_saves_and_stops_and_the_same_command_goes_on(tmp_path, changes, launch, number):
    workdir = tmp_path / "run"
    process = launch(command(workdir, train__steps=100_000, **changes))
    wait_for(reached(workdir, 3), process)
    process.send_signal(number)
    out = process.end(128 + number)
    last = steps_logged(workdir)[-1]
    assert f"stopped by {number.name}; step {last} is saved" in out
    assert "run the same command again to go on" in out
    assert steps_in(workdir / "checkpoints")[-1] == last

    process = launch(command(workdir, train__steps=100_000, **changes))
    wait_for(reached(workdir, last + 2), process)
    other = run(command(workdir, train__steps=100_000, **changes), expect=2)
    assert f"is in use by process {process.pid} on " in other
    process.send_signal(number)
    out = process.end(128 + number)
    assert f"resumed from {workdir}/checkpoints/{last}" in out
    assert steps_logged(workdir) == list(range(1, steps_logged(workdir)[-1] + 1)), "the second run disturbed the first"


def test_a_signal_before_the_first_step_has_nothing_to_save(tmp_path, changes, launch):
    process = launch(command(tmp_path / "run", **changes))
    wait_for((tmp_path / "run" / "lock").exists, process)
    process.send_signal(signal.SIGTERM)
    assert "before the first step; nothing was lost" in process.end(128 + signal.SIGTERM)


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_said_aloud_and_the_newest_good_one_is_used(tmp_path, changes, launch):
    changes |= dict(train__checkpoint_every=2, train__checkpoints_to_keep=3)
    straight, workdir = tmp_path / "straight", tmp_path / "run"
    run(command(straight, train__steps=8, **changes))
    # The schedule depends on train.steps, so the run is stopped by a signal and not by its configuration.
    process = launch(command(workdir, train__steps=8, **changes))
    wait_for(lambda: 6 in steps_in(workdir / "checkpoints"), process)
    process.kill()
    process.wait()
    shutil.rmtree(workdir / "checkpoints" / "8", ignore_errors=True)  # if it was so far already
    folder = workdir / "checkpoints"
    kept = {step: tmp_path / f"kept{step}" for step in steps_in(folder)}
    for step, copy in kept.items():
        shutil.copytree(folder / str(step), copy)
        flip_byte(largest_file(folder / str(step) / "params"))

    before = sorted(path.name for path in folder.iterdir() if path.name.isdigit())
    out = run(command(workdir, train__steps=8, **changes), expect=1)
    assert f"no checkpoint in {folder} can be used" in out
    assert sorted(path.name for path in folder.iterdir()) == before, "nothing was changed"

    good = min(kept)
    shutil.rmtree(folder / str(good))
    shutil.copytree(kept[good], folder / str(good))
    out = run(command(workdir, train__steps=8, **changes))
    for step in set(kept) - {good}:
        assert f"{folder}/{step} is damaged" in out
        assert (workdir / "damaged" / str(step)).is_dir()
    assert f"step {good} is the newest good one" in out
    assert_same(stored(workdir, 8, train__steps=8, **changes), stored(straight, 8, train__steps=8, **changes))
    assert logged(workdir) == logged(straight)


def test_a_full_disk_stops_the_run_and_harms_no_checkpoint(tmp_path, changes, launch, small_disk):
    workdir = small_disk / "run"
    changes |= dict(train__steps=4000, train__checkpoint_every=5, train__checkpoints_to_keep=1)
    process = launch(command(workdir, **changes))
    wait_for(lambda: steps_in(workdir / "checkpoints"), process)
    fill(small_disk / "ballast")
    out = process.end(1)
    assert "No space left on device" in out
    assert str(workdir) in out
    (last,) = steps_in(workdir / "checkpoints")

    (small_disk / "ballast").unlink()
    process = launch(command(workdir, **changes))
    wait_for(lambda: steps_in(workdir / "checkpoints") not in ([], [last]), process)
    process.send_signal(signal.SIGTERM)
    assert f"resumed from {workdir}/checkpoints/{last}" in process.end(128 + signal.SIGTERM)
    left = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert left == {str(step) for step in steps_in(workdir / "checkpoints")}, "what failed leaves nothing behind"


@pytest.mark.slow
def test_a_full_disk_does_not_stop_a_run_that_was_told_to_go_on(tmp_path, changes, launch, small_disk):
    workdir, straight = small_disk / "run", tmp_path / "straight"
    changes |= dict(train__steps=300, train__checkpoint_every=50, train__checkpoints_to_keep=1)
    changes |= dict(train__continue_on_save_error=True)
    run(command(straight, **changes))
    process = launch(command(workdir, **changes))
    wait_for(lambda: steps_in(workdir / "checkpoints"), process)
    fill(small_disk / "ballast")
    (first,) = steps_in(workdir / "checkpoints")
    wait_for(lambda: "Training goes on" in process.output(), process)
    assert steps_in(workdir / "checkpoints") == [first]
    (small_disk / "ballast").unlink()
    process.end(0)
    assert_same(stored(workdir, 300, **changes), stored(straight, 300, **changes))
    assert logged(workdir) == logged(straight), "the lines that had to wait are there too"


@pytest.fixture
def read_only(tmp_path):
    """Returns a function that makes a folder read-only for everyone, root too."""
    mounted = []

    def make(folder: Path):
        subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
        mounted.append(folder)
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)

    if os.geteuid():
        pytest.skip("only root can mount")
    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_folder_that_became_read_only(tmp_path, changes, launch, read_only):
    workdir = tmp_path / "run"
    changes |= dict(train__steps=4000, train__checkpoint_every=5, train__checkpoints_to_keep=1)
    process = launch(command(workdir, **changes))
    wait_for(lambda: steps_in(workdir / "checkpoints"), process)
    read_only(workdir / "checkpoints")
    out = process.end(1)
    assert "could not be written" in out
    assert "Read-only file system" in out
    assert steps_in(workdir / "checkpoints")


@pytest.mark.parametrize("go_on", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["stop", "go_on"])
def test_a_workdir_that_vanished(tmp_path, changes, launch, go_on):
    workdir = tmp_path / "run"
    changes |= dict(
        train__steps=100 if go_on else 4000, train__checkpoint_every=10, train__continue_on_save_error=go_on
    )
    process = launch(command(workdir, **changes))
    wait_for(lambda: steps_in(workdir / "checkpoints"), process)
    workdir.rename(tmp_path / "moved")
    out = process.end(0 if go_on else 1)
    assert str(workdir) in out
    assert steps_in(tmp_path / "moved" / "checkpoints"), "what was there is as it was"
    if go_on:
        assert "goes on" in out
        assert steps_in(workdir / "checkpoints")[-1] == 100
        assert (workdir / "config.json").exists(), "a folder that had to be made again is whole"


@pytest.mark.slow
def test_a_run_goes_on_on_other_devices(tmp_path, changes):
    """Saved on 8 devices, resumed on 4, 2 and 1 and on other axes: the same batches, losses to 1e-5."""
    changes |= dict(train__steps=12, train__checkpoint_every=6, train__checkpoints_to_keep=2)
    whole = tmp_path / "whole"
    run(command(whole, mesh__fsdp=2, mesh__expert=2, mesh__tensor=2, **changes), devices=8)
    want = {line["step"]: line for line in logged(whole)}
    for devices, axes in (
        (8, dict(mesh__fsdp=8)),
        (8, dict(mesh__data=2, mesh__expert=4, mesh__fsdp=1)),
        (4, dict(mesh__expert=4, mesh__fsdp=1)),
        (4, dict(mesh__fsdp=2, mesh__tensor=2)),
        (2, dict(mesh__fsdp=2)),
        (1, dict()),
    ):
        workdir = tmp_path / "-".join([str(devices), *axes])
        shutil.copytree(whole, workdir)
        shutil.rmtree(workdir / "checkpoints" / "12")
        out = run(command(workdir, **axes, **changes), devices=devices)
        assert f"resumed from {workdir}/checkpoints/6" in out
        lines = logged(workdir)
        assert [line["step"] for line in lines] == list(range(1, 13))
        for line in lines[6:]:
            for name in ("loss", "token_loss", "balance_loss", "gradient_norm"):
                assert line[name] == pytest.approx(want[line["step"]][name], rel=1e-5), (devices, axes, name)
            assert line["tokens"] == want[line["step"]]["tokens"]


@pytest.mark.slow
def test_a_run_that_does_not_fit_says_what_fills_the_memory_and_what_would_help(tmp_path, changes):
    """In an address space of 6 GiB; plain attention's scores of 16,384 positions take more."""
    changes |= dict(
        model__attention="plain", model__max_seq_len=16384, train__seq_len=16384, train__batch_size=1, mesh__fsdp=1
    )
    line = shlex.join(command(tmp_path / "run", **changes))
    out = run(["bash", "-c", f"ulimit -v {6 * 2**20}; exec {line}"], expect=1)
    assert "error: out of memory on a CPU device" in out
    assert "attention scores of a layer, 1 x 4 heads x 16384 x 16384" in out
    for knob in (r"  1\. ", r"  2\. ", r"  3\. ", r"mesh\.tensor=2 \(now 1\)", r"model\.remat=\w+ \(now none\)"):
        assert re.search(knob, out), knob
