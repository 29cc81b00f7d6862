"""benchmarks.gpu without a GPU: every case with a tiny shape, what it counts, and how it takes turns, judges and merges."""

import json
import os

import numpy as np
import pytest

from benchmarks import common, cpu, gpu, ours, tune
from mixtral_jax.metrics import flops_per_token
from mixtral_jax.models import mixtral


@pytest.fixture
def alone(monkeypatch):
    """Without peers, whatever is installed."""
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)


def table_of(text: str) -> dict[tuple[str, str], list[str]]:
    rows = [line.split(" | ") for line in text.splitlines() if line.count(" | ") == len(gpu.COLUMNS) - 1]
    return {(row[0], row[1]): row for row in rows[1:]}


def test_small_runs_cases_here(alone, capsys):
    """The layer by lax.ragged_dot, and decoding in one program; a candidate that does not run is left out."""
    names = "mixtral_jax-ragged_dot-loop,mixtral_jax-tokamax_mosaic"
    gpu.main(["--small", "--cases=moe_train,decode_1", f"--candidates={names}", "--passes=1", "--rounds=2"])
    text = capsys.readouterr().out
    table = table_of(text)
    assert {("moe_train", "mixtral_jax-ragged_dot-loop"), ("decode_1", "mixtral_jax-ragged_dot-loop")} <= set(table)
    assert not table["moe_train", "mixtral_jax-ragged_dot-loop"][-2], "a layer has no share of the bandwidth"
    assert table["decode_1", "mixtral_jax-ragged_dot-loop"][-2]
    assert "matmul" in text
    assert "copy" in text


@pytest.mark.slow
def test_small_runs_every_case(alone, capsys):
    gpu.main(["--small", "--passes=1", "--rounds=1", "--flags=no_graphs"])
    table = table_of(capsys.readouterr().out)
    for case in gpu.CHANGES:
        mine = [name for name in gpu.defaults(case) if name.startswith("mixtral_jax") and "tokamax" not in name]
        assert {(case, name) for name in mine} <= set(table)


def test_one_program_decodes_the_same_tokens_as_steps():
    """The `loop` candidate measures the same work."""
    shape = gpu.shape_of("decode_8", True) | {"new_tokens": 5, "dtype": "float32"}
    steps, loop = (ours.CASES["decode_8"](f"mixtral_jax-blocks{form}", shape)() for form in ("", "-loop"))
    assert steps.shape == (5, 8)
    assert len(np.unique(steps)) > 5, "one token again and again proves little"
    np.testing.assert_array_equal(steps, loop)


def test_a_process_runs_with_its_flags(tmp_path):
    shape = gpu.shape_of("matmul", True)
    environment = gpu.environment_of("mixtral_jax@latency_hiding", str(tmp_path), "cpu")
    assert environment["XLA_FLAGS"].startswith("--xla_gpu_enable_latency_hiding_scheduler=true")
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert "JAX_PLATFORMS" not in gpu.environment_of("mixtral_jax", str(tmp_path), None)

    def start(case, name, shape):
        return cpu.Candidate(case, name, shape, environment)

    found = gpu.measure("matmul", ["mixtral_jax"], shape, 1, 2, start)["mixtral_jax"]
    assert 0 < found["lowest"] <= found["seconds"] <= found["highest"]
    assert found["about"]["jax_platform"] == "cpu"
    assert found["peak_bytes"] > 2**20


class Scripted:
    """A candidate that takes given seconds; "broken" does not start."""

    order: list[str] = []  # noqa: RUF012

    def __init__(self, case, name, shape):
        self.name, self.seconds, self.peak, self.about = name, [], 5, {}

    def ready(self):
        self.order.append(self.name)
        return None if self.name == "broken" else 1.5

    def measure(self):
        self.seconds.append(float(len(self.order)))

    def close(self):
        pass


def test_candidates_take_turns_and_what_does_not_run_is_asked_once():
    Scripted.order = []
    found = gpu.measure("train", ["a", "broken", "b"], {}, 2, 1, Scripted)
    assert Scripted.order == ["a", "broken", "b", "a", "b"]
    assert {name: (each["lowest"], each["seconds"], each["highest"]) for name, each in found.items()} == {
        "a": (1.0, 2.5, 4.0),
        "b": (3.0, 4.0, 5.0),
    }
    assert {each["first_seconds"] for each in found.values()} == {1.5}


def test_flops_are_those_of_mfu_and_bytes_those_of_the_active_weights():
    shape = gpu.shape_of("train", False)
    model = ours.config_of("mixtral_jax-blocks", shape | dict(seq_len=4096)).model
    want = flops_per_token(model, 4096) * shape["batch"] * shape["seq_len"]
    assert cpu.useful_flops("train", shape) == pytest.approx(want, rel=1e-9)
    shape = gpu.shape_of("decode_1", False)
    model = ours.config_of("mixtral_jax", shape).model
    _, active = mixtral.parameter_counts(model)
    norms, d, layers = (2 * shape["num_layers"] + 1) * shape["d_model"], shape["d_model"], shape["num_layers"]
    weights = 2 * (
        active - norms - d * shape["vocab_size"] + layers * d * shape["num_experts"]
    )  # the router has 4 bytes
    cache = 2 * 2 * layers * shape["num_kv_heads"] * shape["head_dim"] * (128 + 32)
    assert gpu.active_bytes("decode_1", shape) == pytest.approx(64 * (weights + cache), rel=1e-9)
    assert gpu.active_bytes("decode_32", shape) < 4.1 * gpu.active_bytes("decode_1", shape), "at most 8 experts of 2"


def test_layers_and_rows_of_the_caller():
    assert gpu.shape_of("train", False, layers=3, batch=8) == gpu.shape_of("train", False) | dict(num_layers=3, batch=8)
    assert gpu.shape_of("matmul", False, layers=3)["num_layers"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cases=trian"], "there is no trian; there are moe_forward"),
        (["--flags=fast"], "there is no fast; there are none"),
        (["--candidates=mixtral_jax-tokamx"], "no option tokamx; there are blocks"),
        (["--candidates=mixtral_jax@fast"], "names no set of flags"),
        (["--candidates=maxtext"], "neither mixtral_jax"),
        (["--rounds=0"], "at least 1"),
    ],
)
def test_mistakes_are_explained(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def judged(seconds: dict[str, float], case="train") -> dict:
    found = {
        name: dict(seconds=s, lowest=s, highest=s, first_seconds=1.0, peak_bytes=10**9) for name, s in seconds.items()
    }
    rates = {"matmul_flops": 700e12, "copy_bytes": 3e12, "peak_flops": 989e12}
    return {case: gpu.judged(case, found, gpu.shape_of(case, False), rates)}


def test_a_day_s_calls_are_one_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    device = "NVIDIA H100 80GB HBM3"
    gpu.save(judged({"mixtral_jax-blocks": 0.5, "transformers-eager": 1.0}), device)
    gpu.save(judged({"mixtral_jax-blocks": 0.25}) | judged({"mixtral_jax": 0.2}, "decode_1"), device)
    (stored,) = tmp_path.glob("*-gpu-h100.json")
    record = json.loads(stored.read_text())
    assert record["machine"]["device"] == device
    assert list(record["results"]) == ["train", "decode_1"]
    assert record["results"]["train"]["mixtral_jax-blocks"]["seconds"] == 0.25
    assert record["results"]["train"]["transformers-eager"]["seconds"] == 1.0
    text = stored.with_suffix(".md").read_text()
    assert "| train | mixtral_jax-blocks | 250.00 | 250.00 to 250.00 | 65,536 | 4.00 |" in text
    assert stored.with_suffix(".png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("goal") == 3


@pytest.mark.parametrize(("seconds", "words"), [(0.2, "goal 45% reached"), (2.0, "goal 45% NOT reached")])
def test_verdicts(seconds, words):
    (line,) = gpu.verdicts(judged({"mixtral_jax-blocks": seconds, "transformers-eager": 1.0}))
    share = cpu.useful_flops("train", gpu.shape_of("train", False)) / seconds / 989e12
    assert f"{share:.1%} of the data sheet's peak" in line
    assert words in line
    assert ("ahead of every peer" if seconds < 1 else "behind a peer") in line
    assert not gpu.verdicts(judged({"transformers-eager": 1.0}))


def test_without_a_gpu_it_says_so(alone, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS", "cpu"))
    monkeypatch.setattr(gpu, "WIDTH", gpu.WIDTH | dict(square=64, copied=2**12))
    with pytest.raises(SystemExit, match="no GPU here, it runs on cpu; --small"):
        gpu.main(["--cases=moe_forward", "--rounds=1"])


def test_tiles_are_found_product_by_product_and_used(tmp_path, monkeypatch):
    """tokamax's XLA implementation stands in for its kernels: what is tested is that none is tuned twice and all are kept."""
    tokamax = pytest.importorskip("tokamax", reason="optional: pip install -r requirements-gpu.txt")
    from absl import flags

    flags.FLAGS.mark_as_parsed()
    monkeypatch.setattr(tune, "RESULTS", tmp_path)
    shape, path = gpu.shape_of("moe_train", True), tune.path_of("cpu")
    with pytest.raises(ValueError, match=r"python -m benchmarks\.tune makes it"):
        ours.config_of("mixtral_jax-tuned", shape)
    assert tune.tune(shape, "xla", path, -1.0) == list(tune.products_of(shape)), "no minute is left"
    tuned = []
    real = tokamax.autotune
    monkeypatch.setattr(
        tokamax, "autotune", lambda calls, **_: (tuned.extend(calls), real(calls, progress_bar=False))[1]
    )
    assert tune.tune(shape, "xla", path, 5.0) == []
    assert len(tuned) == len(tune.load(path).data) == 6
    assert tune.tune(shape, "xla", path, 5.0) == []
    assert len(tuned) == 6


def test_the_products_are_those_of_the_layer():
    """Six shapes for nine products of M D F: gate and up are alike, d_gate and d_up, and their parts of dx."""
    shape = gpu.shape_of("moe_train", False)
    m, d, f = 2 * 4096 * 2, 4096, 14336
    for a, b, numbers in tune.products_of(shape).values():
        (left,), (right,) = numbers.dot_dimension_numbers[0]
        assert a[left] == b[right]
        assert {m, d, f} <= set(a) | set(b)
    assert cpu.useful_flops("moe_train", shape) == pytest.approx(9 * 2 * m * d * f, rel=1e-3)
