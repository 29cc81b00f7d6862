"""Several processes, with jax.distributed on loopback: the losses of one, deaths, signals, and resumes by other numbers.

Losses are compared as metrics.jsonl has them, with 7 digits, the precision of float32. Between process counts XLA's
all-reduce may add in another order, so that the tolerance is 1e-6; between meshes it is 1e-5.
"""

import contextlib
import os
import re
import shutil
import signal
import time

import pytest

from mixtral_jax.checkpoint import steps_in
from tests.processes import Process, group, logged, members, run, steps_logged, wait_for, write_corpus

NAMES = ("loss", "token_loss", "balance_loss", "gradient_norm")


@pytest.fixture
def changes(tmp_path):
    """A small run's data."""
    write_corpus(tmp_path / "corpus")
    return dict(data__source="text", data__path=str(tmp_path / "corpus"), data__cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def cached(tmp_path):
    """One folder for what all the processes of a test compile."""
    return dict(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "xla"), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")


@pytest.fixture
def launch(cached):
    """Starts launchers; what still runs at the end of a test, because it failed, is killed."""
    started = []

    def start(line):
        started.append(Process(line, **cached))
        return started[-1]

    yield start
    for process in started:
        for pid in members(process) if process.poll() is None else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.stop()


def assert_close(got, want, tolerance, steps):
    """The metrics of these steps agree."""
    got, want = ({line["step"]: line for line in logged(workdir)} for workdir in (got, want))
    assert sorted(got) == sorted(want)
    for step in steps:
        assert got[step]["tokens"] == want[step]["tokens"]
        for name in NAMES:
            assert got[step][name] == pytest.approx(want[step][name], rel=tolerance), (step, name)


def test_two_processes_train_as_one(tmp_path, changes, cached):
    """Losses, evaluations and samples; one voice, one metrics file, one checkpoint that all wrote."""
    changes |= dict(
        train__steps=3, train__eval_every=2, train__eval_batches=2, train__sample_every=3, train__sample_tokens=4
    )
    one, two = tmp_path / "one", tmp_path / "two"
    run(group(one, 1, 2, **changes), **cached)
    out = run(group(two, 2, 1, **changes), **cached)
    assert_close(two, one, 1e-6, (1, 2, 3))
    for kind in ("heldout", "sample", "final"):
        (*_, got), (*_, want) = logged(two, kind), logged(one, kind)
        assert got.get("text") == want.get("text")
        assert got.get("loss", 0) == pytest.approx(want.get("loss", 0), rel=1e-6)
    assert len(logged(two, "session")) == 1
    assert "process 1:" not in out, "process 0 alone speaks"
    assert out.count("step 3/3") == 1
    assert "2 processes" in out
    assert steps_in(two / "checkpoints") == [3]
    files = [path.name for path in (two / "checkpoints" / "3" / "params").iterdir()]
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= set(files), "each process writes its own shards"


@pytest.mark.slow
def test_a_token_cache_in_a_bucket_is_built_once_and_fetched_by_the_other_hosts(tmp_path, changes, cached):
    """Each process has a disk of its own here, and they see the same bucket."""
    changes |= dict(data__cache_dir="gs://bucket/cache", train__steps=2)
    launcher, _, program = " ".join(group(tmp_path / "run", 2, 1, **changes)).partition(" -- ")
    line = [*launcher.split(), "--", "-m", "tests.bucket", *program.split()]
    out = run(line, FAKE_BUCKETS=str(tmp_path / "stores"), **cached)
    assert out.count("tokenised train") == 1, out
    found = [
        sorted(tmp_path.glob(f"stores/{place}/corpora/*/cache.json"))
        for place in ("bucket/cache", "disk0/*", "disk1/*")
    ]
    assert [len(each) for each in found] == [1, 1, 1]
    assert steps_logged(tmp_path / "run") == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True], ids=["cached", "stream"])
def test_four_processes_whose_devices_share_rows(tmp_path, changes, cached, streaming):
    """tensor lies across processes, so that two of them read the same rows; and gradients are accumulated."""
    changes |= dict(
        train__steps=4, mesh__fsdp=2, mesh__tensor=2, train__accumulation_steps=2, data__streaming=streaming
    )
    run(group(tmp_path / "one", 1, 4, **changes), **cached)
    run(group(tmp_path / "four", 4, 1, **changes), **cached)
    assert_close(tmp_path / "four", tmp_path / "one", 1e-6, range(1, 5))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_is_killed_and_the_others_end_and_say_which(tmp_path, changes, launch, victim):
    process = launch(group(tmp_path / "run", 4, train__steps=100_000, **changes))
    wait_for(lambda: max(steps_logged(tmp_path / "run"), default=0) >= 3, process, 300)
    pids = members(process)
    os.kill(pids[victim], signal.SIGKILL)
    begin = time.monotonic()
    process.wait(timeout=90)
    out, seconds = process.output(), time.monotonic() - begin
    assert process.returncode == 128 + signal.SIGKILL
    assert f"launch: process {victim} was killed by SIGKILL, the first to end; all have ended" in out
    for other in set(range(4)) - {victim}:
        prefix = f"process {other}: " if other else ""
        why = f"process {victim} died without a word" if victim else "process 0, which coordinates the others, is gone"
        assert any(line.startswith(prefix) and f"because {why}" in line for line in out.splitlines()), out
    assert all(not os.path.exists(f"/proc/{pid}") for pid in pids)
    print(f"process {victim} killed: all had ended after {seconds:.0f} s")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_is_frozen_and_the_others_say_which(tmp_path, changes, launch, victim):
    """Nothing breaks, collectives hang: as where a process of a GPU or TPU is killed."""
    process = launch(group(tmp_path / "run", 2, train__steps=100_000, **changes))
    wait_for(lambda: max(steps_logged(tmp_path / "run"), default=0) >= 3, process, 300)
    pids = members(process)
    os.kill(pids[victim], signal.SIGSTOP)
    begin = time.monotonic()
    process.wait(timeout=90)
    out, seconds = process.output(), time.monotonic() - begin
    who = "process 1" if victim else "process 1: process 0, which coordinates the others,"
    assert f"{who} has given no sign of life for" in out
    assert (
        f"launch: process {victim} gave no sign of life (frozen?) and was killed, the first to fail; all have ended"
        in out
    )
    assert not os.path.exists(f"/proc/{pids[victim]}")
    print(f"process {victim} frozen: all had ended after {seconds:.0f} s")


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_at_the_same_saved_step(tmp_path, changes, launch, cached):
    workdir = tmp_path / "run"
    changes |= dict(train__steps=100_000)
    process = launch(group(workdir, 2, **changes))
    wait_for(lambda: max(steps_logged(workdir), default=0) >= 3, process, 300)
    os.kill(members(process)[1], signal.SIGTERM)
    process.wait(timeout=90)
    out, last = process.output(), steps_logged(workdir)[-1]
    assert process.returncode == 128 + signal.SIGTERM, out
    assert "process 1: SIGTERM: saving after this step" in out
    assert f"stopped by SIGTERM; step {last} is saved in {workdir}/checkpoints/{last}" in out
    assert steps_in(workdir / "checkpoints")[-1] == last
    assert "Traceback" not in out


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(1, (2,)), (2, (1, 2, 4))])
def test_another_number_of_processes_goes_on_with_the_same_batches(tmp_path, changes, cached, first, then):
    changes |= dict(train__steps=8, train__checkpoint_every=4, train__checkpoints_to_keep=2)
    whole = tmp_path / "whole"
    run(group(whole, first, 2, **changes), **cached)
    for count in then:
        workdir = tmp_path / f"by{count}"
        shutil.copytree(whole, workdir)
        shutil.rmtree(workdir / "checkpoints" / "8")
        out = run(group(workdir, count, 1, **changes), **cached)
        assert f"resumed from {workdir}/checkpoints/4" in out
        assert_close(workdir, whole, 1e-5, range(1, 9))


@pytest.mark.slow
def test_a_mistake_is_told_once_and_a_difference_is_refused(tmp_path, changes, cached):
    """Each process reads its own seed: they must not train two different models together."""
    script = tmp_path / "train_differently.py"
    script.write_text(
        "import os, sys; sys.path.insert(0, os.getcwd()); sys.argv.append('--config.train.seed=' + os.environ['MIXTRAL_JAX_PROCESS_ID'])\n"
        "exec(open('train.py').read())\n"
    )
    line = group(tmp_path / "run", 2, **changes)
    line[line.index("train.py")] = str(script)
    out = run(line, expect=2, **cached)
    assert out.count("train.seed: process 0 0, process 1 1") == 1


@pytest.mark.slow
@pytest.mark.parametrize("steps", [3, 100_000], ids=["last", "amid"])
def test_a_save_that_fails_in_one_process_ends_all_with_its_words(tmp_path, changes, launch, steps):
    """Process 1 cannot write: Orbax keeps that to itself and waits for ten minutes for process 0."""
    script = tmp_path / "train_without_room.py"
    script.write_text(
        "import os, resource, sys; sys.path.insert(0, os.getcwd())\n"
        "if os.environ['MIXTRAL_JAX_PROCESS_ID'] == '1': resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "exec(open('train.py').read())\n"
    )
    line = group(tmp_path / "run", 2, train__steps=steps, train__checkpoint_every=3, **changes)
    line[line.index("train.py")] = str(script)
    process = launch(line)
    process.wait(timeout=150)
    out = process.output()
    assert process.returncode == 1, out
    # Python's words or tensorstore's, whichever writes first.
    wanted = r"process 1: error: the checkpoint of step 3 could not be written: .*(File too large|Failed writing)"
    assert re.search(wanted, out), out
    assert "ending, because process 1 failed: the checkpoint of step 3 could not be written" in out
    assert steps_in(tmp_path / "run" / "checkpoints") == []
