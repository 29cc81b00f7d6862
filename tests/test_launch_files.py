"""The scripts of launch/ parse, and every flag they and docs/pods.md use exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mixtral_jax.config import key_list

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
OURS = {
    "train.py": [sys.executable, "train.py", "--help"],
    "mixtral_jax.plan": [sys.executable, "-m", "mixtral_jax.plan", "--help"],
    "mixtral_jax.launch": [sys.executable, "-m", "mixtral_jax.launch", "--help"],
}


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_parse(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
    assert path.stat().st_mode & 0o100, "not executable"


def test_scripts_explain_a_missing_argument():
    done = subprocess.run(["bash", LAUNCH / "slurm.sh"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "CONFIG WORKDIR" in done.stderr
    done = subprocess.run(
        ["bash", LAUNCH / "tpu-vm.sh", "train"], capture_output=True, text=True, env={"PATH": "/bin:/usr/bin"}
    )
    assert done.returncode == 2
    assert "NAME is not set" in done.stderr


def test_slurm_starts_the_run_and_requeues_what_was_preempted(tmp_path):
    """With srun and scontrol that only note how they are called."""
    for name, status in (("srun", 143), ("scontrol", 0)):
        tool = tmp_path / name
        tool.write_text(f'#!/bin/bash\necho {name} "$@" >> {tmp_path}/calls\nexit {status}\n')
        tool.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/bin:/usr/bin", "SLURM_JOB_ID": "7"}
    command = ["bash", LAUNCH / "slurm.sh", "configs/tiny.py", "/w", "--config.data.path=a b.jsonl"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 143
    started, requeued = (tmp_path / "calls").read_text().splitlines()
    assert "train.py --config=configs/tiny.py --workdir=/w --config.data.path=a b.jsonl" in started
    assert requeued == "scontrol requeue 7"


def test_the_manifest_is_a_jobset_whose_hosts_fit_its_slice():
    manifest = yaml.safe_load((LAUNCH / "gke-jobset.yaml").read_text())
    assert manifest["kind"] == "JobSet"
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    chips = 1
    for n in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(n)
    hosts = chips // container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == hosts
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    assert container["command"][1] == "train.py"
    _check_flags(container["command"][2:], _known("train.py"))


def _known(program: str) -> set[str]:
    done = subprocess.run(OURS[program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    return {name.removeprefix("[no]") for name in re.findall(r"--(\[?[a-z][\w\]]*)", done.stdout)}


def _check_flags(words, known: set[str]) -> None:
    for word in words:
        name = re.match(r"--([\w.]+)", word)
        if not name:
            continue
        if name[1].startswith("config."):
            assert name[1].removeprefix("config.") in key_list(), word
        else:
            assert name[1] in known, f"{word}: known are {sorted(known)}"


@pytest.mark.parametrize("program", OURS)
def test_every_flag_in_scripts_and_pages_exists(program):
    known = _known(program)
    checked = 0
    for path in (
        *LAUNCH.glob("*.sh"),
        LAUNCH / "gke-jobset.yaml",
        ROOT / "docs" / "pods.md",
        ROOT / "docs" / "plan.md",
    ):
        text = re.sub(r"\\\n", " ", path.read_text())
        for line in text.splitlines():
            after = line.partition(f"{program} ")[2]
            for other in OURS:  # one command inside another: launch ... -- train.py ...
                after = after.partition(f" {other} ")[0] if other != program else after
            after = after.partition(" -- ")[0] if program == "mixtral_jax.launch" else after
            words = [word for word in after.replace("'", " ").replace("`", " ").split() if word.startswith("--")]
            _check_flags(words, known)
            checked += len(words)
    assert checked > 2, f"no command with {program} was found"
