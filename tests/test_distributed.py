"""What several processes need, tried without any: flags, rows, the order of devices, and the launcher on small scripts."""

import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from mixtral_jax import cli, clusters, distributed, launch
from mixtral_jax.config import AXES, RunError, UserError
from mixtral_jax.sharding import mesh_devices, place
from tests.helpers import on_mesh, random_batch, tiny

ROOT = Path(__file__).parent.parent


def test_flags_and_variables_give_a_process_its_place():
    flags = dict(coordinator="node1:8476", processes=4, process_id=3)
    variables = dict(MIXTRAL_JAX_COORDINATOR="h:1", MIXTRAL_JAX_PROCESSES="2", MIXTRAL_JAX_PROCESS_ID="0")
    assert clusters.place_given({}, {}) is None
    assert clusters.place_given(flags, {}) == ("node1:8476", 4, 3)
    assert clusters.place_given({}, variables) == ("h:1", 2, 0)
    assert clusters.place_given(flags, variables) == ("node1:8476", 4, 3), "flags win"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (dict(processes=4), r"--coordinator=\(not given\), --processes=4, --process_id=\(not given\); give all three"),
        (dict(coordinator="h:1", processes=4), r"--process_id=\(not given\)"),
        (dict(coordinator="h", processes=4, process_id=0), "HOST:PORT, for example node001:8476"),
        (dict(coordinator="h:99999", processes=4, process_id=0), "HOST:PORT"),
        (dict(coordinator="h:1", processes=4, process_id=4), "--process_id=4; processes are numbered from 0 to 3"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        clusters.place_given(flags, {})


def test_half_given_variables_are_refused_by_their_names():
    with pytest.raises(
        UserError, match=r"MIXTRAL_JAX_PROCESSES=2, MIXTRAL_JAX_PROCESS_ID=\(not given\); give all three"
    ):
        clusters.place_given({}, dict(MIXTRAL_JAX_PROCESSES="2"))


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, None),
        (dict(SLURM_JOB_ID="7", SLURM_STEP_NUM_TASKS="1", SLURM_NTASKS="8"), None),
        (dict(SLURM_JOB_ID="7", SLURM_NTASKS="8"), None),  # a batch script's own shell is no step of 8 tasks
        (dict(SLURM_JOB_ID="7", SLURM_STEP_NUM_TASKS="8"), "SLURM"),
        (dict(OMPI_COMM_WORLD_SIZE="1"), None),
        (dict(OMPI_COMM_WORLD_SIZE="2", OMPI_MCA_orte_hnp_uri="1.0;tcp://10.0.0.1:5"), "Open MPI"),
        (dict(TPU_WORKER_HOSTNAMES="a"), None),
        (dict(TPU_WORKER_HOSTNAMES="a,b"), "TPU"),
        (dict(TPU_WORKER_HOSTNAMES="a", MEGASCALE_NUM_SLICES="2"), "TPU"),
    ],
)
def test_schedulers_are_recognised(environment, name):
    assert clusters.cluster(environment) == name


def test_an_open_mpi_that_hides_its_first_process_is_explained():
    with pytest.raises(UserError, match=r"4 processes .*--process_id=\$OMPI_COMM_WORLD_RANK"):
        clusters.cluster(dict(OMPI_COMM_WORLD_SIZE="4"))


def test_one_that_waits_in_vain_says_how_many_came(tmp_path):
    program = (
        "import sys; from mixtral_jax import cli, distributed\n"
        f"cli.run(lambda: distributed.start(dict(coordinator='127.0.0.1:{launch.free_port()}', processes=2, process_id=0), 3), '')"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "error: 1 of 2 processes came within 3 s at 127.0.0.1:" in done.stderr
    assert "Traceback" not in done.stderr


def test_one_that_waits_says_so_and_ends_at_ctrl_c():
    port = launch.free_port()
    program = (
        # A suite that was started in the background ignores Ctrl-C, and its children do.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from mixtral_jax import cli, distributed; distributed.TELL_SECONDS = 1\n"
        f"cli.run(lambda: distributed.start(dict(coordinator='127.0.0.1:{port}', processes=2, process_id=0), 100), '')"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        killer = threading.Timer(60, process.kill)
        killer.start()
        assert process.stderr.readline() == f"1 of 2 processes came to 127.0.0.1:{port} so far; waiting\n"
        process.send_signal(signal.SIGINT)
        assert process.wait() == -signal.SIGINT
        killer.cancel()


def device(i: int, slice_index: int = 0, platform: str = "tpu"):
    return types.SimpleNamespace(
        id=i,
        slice_index=slice_index,
        platform=platform,
        process_index=i // 4,
        device_kind="fake",
        coords=(i // 4 % 2, i // 8, 0),
        core_on_chip=0,
    )


def test_slices_lie_along_data():
    """16 devices in 4 slices, listed in a mixed order: each row of `data` is in one slice."""
    devices = [device(i, i % 4) for i in range(16)]
    ordered = mesh_devices((8, 2, 1, 1, 1), devices)
    assert ordered.shape == (8, 2, 1, 1, 1)
    for row in ordered.reshape(8, 2):
        assert len({each.slice_index for each in row}) == 1
    assert [row[0].slice_index for row in ordered.reshape(8, 2)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sorted(each.id for each in ordered.flat) == list(range(16))


def test_axes_that_would_cross_slices_are_refused():
    with pytest.raises(UserError, match=r"mesh.data=2 and there are 4 slices.* to a multiple of 4"):
        mesh_devices((2, 8, 1, 1, 1), [device(i, i % 4) for i in range(16)])


def test_hosts_of_gpus_are_no_slices():
    devices = [device(i, i // 4, "gpu") for i in range(16)]
    assert mesh_devices((1, 16, 1, 1, 1), devices).shape == (1, 16, 1, 1, 1)


@pytest.mark.parametrize(
    "axes",
    [dict(fsdp=8), dict(data=2, fsdp=4), dict(fsdp=2, tensor=4), dict(expert=4, tensor=2), dict(tensor=8)],
    ids=lambda axes: "-".join(f"{name}{size}" for name, size in axes.items()),
)
@pytest.mark.parametrize("count", [2, 4])
def test_each_process_reads_just_the_rows_that_its_devices_hold(monkeypatch, axes, count):
    """Every process's rows come from the sharding itself, restricted to the devices that would be its own."""
    config = tiny(model__num_heads=8, model__num_kv_heads=8)
    config, mesh = on_mesh(config, **axes)
    share = 8 // count
    sharding = distributed.batch_sharding(mesh)
    whole = sharding.devices_indices_map((8, 1))
    seen = set()
    for i in range(count):
        mine = set(jax.devices()[i * share : (i + 1) * share])
        held = {each: index for each, index in whole.items() if each in mine}
        fake = types.SimpleNamespace(addressable_devices_indices_map=lambda shape, held=held: held)
        monkeypatch.setattr(distributed, "batch_sharding", lambda mesh, fake=fake: fake)
        start, stop = distributed.rows_here(mesh, 8)
        needed = {row for index in held.values() for row in range(*index[0].indices(8))}
        assert set(range(start, stop)) == needed, "no row too many, none too few"
        seen |= needed
    assert seen == set(range(8))


def test_place_puts_a_process_rows_where_they_belong():
    """With all devices in one process the rows are all; a batch that begins at another row is shifted, not repeated."""
    config, mesh = on_mesh(tiny(), fsdp=4, tensor=2)
    batch = random_batch(config)
    for name, value in place(batch, mesh).items():
        np.testing.assert_array_equal(value, batch[name])
        assert value.sharding == distributed.batch_sharding(mesh)
    assert distributed.rows_here(mesh, config.train.batch_size) == (0, config.train.batch_size)
    # Four rows more in front: as if the process read rows from number -4 on.
    longer = {name: np.concatenate([value[:4] + 1, value]) for name, value in batch.items()}
    for name, value in place(longer, mesh, -4, 8).items():
        np.testing.assert_array_equal(value, batch[name])


@pytest.fixture
def job(tmp_path, capfd, monkeypatch):
    """Runs a small script in so many processes; returns the exit status and what was printed."""
    monkeypatch.setattr(launch, "OWN_END_SECONDS", 1.0)
    monkeypatch.setattr(launch, "TERM_SECONDS", 1.0)
    monkeypatch.setattr(launch, "RESTART_SECONDS", 0.0)
    monkeypatch.setattr(launch, "FROZEN_SECONDS", 2.0)
    monkeypatch.setattr(launch, "SAME_SECONDS", 0.5)
    monkeypatch.setenv("PYTHONPATH", str(Path(launch.__file__).parent.parent))

    def run(text, *flags, processes=3):
        script = tmp_path / "script.py"
        script.write_text("import os, sys, time\nme = int(os.environ['MIXTRAL_JAX_PROCESS_ID'])\n" + text)
        status = launch.main([f"--processes={processes}", *flags, "--", str(script), "--word=hello"])
        read = capfd.readouterr()
        return status, read.out + read.err

    return run


def test_the_launcher_gives_each_process_its_place_and_names_its_lines(job):
    status, out = job(
        "print(sys.argv[1], os.environ['MIXTRAL_JAX_PROCESSES'], os.environ['MIXTRAL_JAX_COORDINATOR'][:10], os.environ['XLA_FLAGS'])\n"
        "print('[Gloo] Rank 0 is connected to 2 peer ranks')",
        "--devices_per_process=3",
    )
    assert status == 0
    lines = sorted(line for line in out.splitlines() if "hello" in line)
    assert [line.partition("--word")[0] for line in lines] == ["", "process 1: ", "process 2: "]
    assert all("hello 3 127.0.0.1: --xla_force_host_platform_device_count=3" in line for line in lines)
    assert out.count("device_count") == 3, "another count is replaced, not added"
    assert "Gloo" not in out


def test_blank_lines_of_the_program_stay(job):
    _, out = job("print('above\\n\\nbelow')", processes=1)
    assert out == "above\n\nbelow\n"


def test_a_mistake_that_all_make_is_told_once(job, monkeypatch, capfd):
    """Before they have met; and the one that only another than process 0 makes is told, too."""

    def wrong():
        raise UserError("no such thing:\n  give another")

    said = []
    for number in ("0", "1"):
        monkeypatch.setenv("MIXTRAL_JAX_PROCESS_ID", number)
        monkeypatch.setenv("MIXTRAL_JAX_LAUNCHER", "1")
        assert cli.guarded(wrong) == 2
        said.append(capfd.readouterr().err)
    program = f"said = {said!r}\nsys.stderr.write(said[min(me, 1)])\nsys.exit(2)"
    status, out = job(program)
    assert status == 2
    assert out.count("error: no such thing:\n  give another\n") == 1
    assert "process 1: error" not in out
    assert "\x1e" not in out
    status, out = job("if me != 1: time.sleep(60)\n" + program)
    assert status == 2
    assert out.count("process 1: error: no such thing:\n  give another\n") == 1
    assert out.count("error:") == 1


def test_a_frozen_process_is_named_and_not_who_was_ended_for_it(job):
    """Process 2 stops itself; the others say so as the watch does and are aborted, as jax does."""
    begin = time.monotonic()
    status, out = job(
        "from mixtral_jax.clusters import silence\nif me == 2: os.kill(os.getpid(), 19)\n"
        "time.sleep(0.5); print(silence(2, 12), flush=True); time.sleep(0.5); os.abort()"
    )
    assert status == 128 + signal.SIGABRT
    assert "launch: process 2 gave no sign of life (frozen?) and was killed, the first to fail; all have ended" in out
    assert time.monotonic() - begin < 20


def test_a_process_that_was_only_slow_is_not_called_frozen(job):
    status, out = job(
        "from mixtral_jax.clusters import silence\n"
        "print(silence(2, 12), flush=True); time.sleep(0.5 + me); sys.exit(me + 5)"
    )
    assert status == 5
    assert "launch: process 0 ended with status 5, the first to end; all have ended" in out


def test_the_first_to_fail_is_named_and_gives_the_status(job):
    begin = time.monotonic()
    status, out = job("sys.exit(7) if me == 1 else time.sleep(60)")
    assert status == 7
    assert "launch: process 1 ended with status 7, the first to end; waiting for the 2 others to notice" in out
    assert time.monotonic() - begin < 20


def test_those_that_ignore_sigterm_are_killed(job):
    begin = time.monotonic()
    status, out = job(
        "import signal; signal.signal(15, signal.SIG_IGN)\nos.kill(os.getpid(), 9) if me == 2 else time.sleep(60)"
    )
    assert status == 128 + signal.SIGKILL
    assert "process 2 was killed by SIGKILL" in out
    assert time.monotonic() - begin < 20


def test_a_failed_job_is_started_again_and_a_mistake_is_not(job, tmp_path):
    mark = tmp_path / "mark"
    text = f"from pathlib import Path\nmark = Path({str(mark)!r})\nif me == 0: mark.write_text(mark.read_text() + 'x' if mark.exists() else 'x')\n"
    status, out = job(text + "time.sleep(0.3)\nsys.exit(mark.read_text() != 'xxx')", "--restarts=5", processes=1)
    assert (status, mark.read_text()) == (0, "xxx")
    assert "starting all again, number 2 of at most 5" in out
    mark.unlink()
    status, _ = job(text + "sys.exit(2)", "--restarts=5", processes=1)
    assert (status, mark.read_text()) == (2, "x")


def test_a_signal_goes_on_to_all_and_there_is_no_restart(job):
    threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    text = "import signal\nsignal.signal(15, lambda *_: (print('told'), sys.exit(143)))\ntime.sleep(60)"
    status, out = job(text, "--restarts=3", processes=2)
    assert status == 143
    assert out.count("told") == 2
    assert "starting" not in out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--processes=2"], "nothing to run"),
        (["--processes=0", "--", "train.py"], "--processes=0"),
        (["--processes=2", "--", "tarin.py"], "tarin.py is no file"),
        (["--", "train.py"], "--processes"),
    ],
)
def test_the_launcher_explains_mistakes(arguments, words, capsys):
    with pytest.raises(SystemExit) as error:
        launch.main(arguments)
    assert error.value.code == 2
    assert words in capsys.readouterr().err


def test_gpus_are_shared_out(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,4,5")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert launch.environment("h:1", 2, 1, 2)["CUDA_VISIBLE_DEVICES"] == "4,5"
    with pytest.raises(SystemExit):
        launch.main(["--processes=3", "--devices_per_process=2", "--", "train.py"])


@pytest.mark.parametrize(
    ("value", "names"),
    [("-1", []), ("", []), ("0,1", ["0", "1"]), ("3,-1,2", ["3"]), ("GPU-8932f937, GPU-1", ["GPU-8932f937", "GPU-1"])],
)
def test_the_gpus_that_cuda_would_see(monkeypatch, value, names):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert launch.visible_gpus() == names


def test_alone_everything_returns_at_once():
    assert distributed.exchange("x", "text") == ["text"]
    assert distributed.decided("x", lambda: 5) == 5
    assert distributed.speaks()
    assert not distributed.together()
    distributed.barrier("x")
    distributed.same({"a": 1}, "")
    with distributed.process_0_first("x"):
        pass
    with pytest.raises(RunError):
        distributed.decided("x", lambda: (_ for _ in ()).throw(RunError("told")))
    assert AXES[0] == "data"


def test_going_on_after_a_failed_save_is_for_one_process(tmp_path, monkeypatch):
    from mixtral_jax import trainer
    from tests.helpers import tiny

    monkeypatch.setattr(distributed, "together", lambda: True)
    monkeypatch.setattr(distributed, "process_count", lambda: 4)
    with pytest.raises(UserError, match="continue_on_save_error=True with 4 processes"):
        trainer.fit(tiny(train__continue_on_save_error=True, mesh__fsdp=8), tmp_path / "run", None, None)
    assert not (tmp_path / "run").exists()
