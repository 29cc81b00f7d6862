"""What benchmarks.cpu computes and writes, without timing anything; the workers themselves are run small."""

import json
import os
import sys

import pytest

from benchmarks import common, cpu, growth, phases
from benchmarks.worker import forget_peak, peak_bytes

TINY = cpu.SMALL | dict(vocab_size=100, num_layers=3, d_model=10, num_heads=2, num_kv_heads=1, head_dim=5, d_ff=7)
TINY |= dict(num_experts=4, experts_per_token=2, batch=2, seq_len=8, prompt=4, new_tokens=6)
EXPERT, ATTENTION, HEAD = 3 * 10 * 7, 10 * (2 * 5) * 2 + 2 * 10 * 5, 10 * 100


def figures(seconds, peak=2e9, start=3e9):
    return {
        "first_seconds": 9.0,
        "seconds": seconds,
        "quartiles": [0.9 * seconds, 1.1 * seconds],
        "rounds": 5,
        "tokens_per_second": 16 / seconds,
        "useful_flops_per_second": 1e9 / seconds,
        "peak_bytes": peak,
        "peak_bytes_with_start": start,
    }


RESULTS = {
    "train": {
        cpu.OURS: figures(1.0),
        "transformers-eager": figures(4.0),
        "transformers-grouped_mm": figures(3.0),
        "transformers-compile": {"reason": "No C++ compiler found"},
        "roof": {"matmul_flops": 2e9, "read_bytes": 1e9},
    }
}


def test_useful_operations_by_hand():
    """Two for every weight that a token meets; scores over half the context; no recomputation, no padding."""
    layer = 2 * EXPERT + 10 * 4 + ATTENTION + 2 * 2 * 5 * (8 / 2)
    forward = 2 * (2 * 8) * 3 * layer
    assert cpu.useful_flops("train", TINY) == 3 * (forward + 2 * 16 * HEAD)
    assert cpu.useful_flops("prefill", TINY) == forward + 2 * 2 * HEAD
    assert cpu.useful_flops("moe_train", TINY) == 3 * 2 * 16 * (2 * EXPERT + 40)
    decoded = 2 * EXPERT + 40 + ATTENTION + 2 * 2 * 5 * (4 + 6 / 2)
    assert cpu.useful_flops("decode_8", TINY) == 48 * (2 * 3 * decoded + 2 * HEAD)


def test_bytes_that_must_move_by_hand():
    assert cpu.least_bytes("moe_forward", TINY) == 4 * 4 * EXPERT
    assert cpu.least_bytes("moe_train", TINY) == 3 * 4 * 4 * EXPERT
    # Of one token two of four experts; of many, all.
    assert cpu.least_bytes("decode_1", TINY) == 4 * 6 * (3 * (2 * EXPERT + ATTENTION) + HEAD)
    assert cpu.least_bytes("decode_32", TINY) == pytest.approx(4 * 6 * (3 * (4 * EXPERT + ATTENTION) + HEAD), rel=1e-6)
    # Forward, backward and gradients, and seven passes of AdamW; the embedding has those alone.
    assert cpu.least_bytes("train", TINY) == 4 * (10 * (3 * (4 * EXPERT + ATTENTION) + HEAD) + 7 * HEAD)


def test_the_table_names_the_best_peer_and_those_that_do_not_run():
    rows = {row[1]: row for row in cpu.rows_of(RESULTS)}
    assert "roof" not in rows
    assert rows[cpu.OURS][5:7] == ["3.00", "50%"]
    assert rows["transformers-grouped_mm"][5] == ""
    assert "No C++ compiler found" in rows["transformers-compile"][2]
    assert all(len(row) == len(cpu.COLUMNS) for row in rows.values())


def test_decoding_is_set_beside_the_bandwidth():
    half_a_second = {cpu.OURS: figures(0.5), "roof": {"matmul_flops": 1e9, "read_bytes": 1e6}}
    (row,) = cpu.rows_of({"decode_1": half_a_second}, TINY)
    assert row[7] == f"{cpu.least_bytes('decode_1', TINY) / 0.5 / 1e6:.0%}"


def test_pairs_give_the_smallest_ratio_of_one_pair(monkeypatch):
    """Ours took 1 s beside the one and 2 s beside the other: 2.5 / 2 is less than 2 / 1."""
    seconds = {"a": (1.0, 2.0), "b": (2.0, 2.5)}

    def measure(case, names, shape, rounds):
        if names[1] == "c":
            return {cpu.OURS: figures(9.0), "c": {"reason": "no"}, "roof": {"matmul_flops": 9e9, "read_bytes": 9e9}}
        ours, peer = seconds[names[1]]
        return {cpu.OURS: figures(ours), names[1]: figures(peer), "roof": {"matmul_flops": 1e9, "read_bytes": 1e9}}

    monkeypatch.setattr(cpu, "measure", measure)
    found = cpu.measure_in_pairs("train", [cpu.OURS, "a", "b", "c"], TINY, 5)
    assert found[cpu.OURS]["seconds"] == 2.0
    assert found["roof"]["matmul_flops"] == 1e9
    assert {row[1]: row for row in cpu.rows_of({"train": found})}[cpu.OURS][5] == "1.25"
    assert found["c"] == {"reason": "no"}


def test_the_roofline_shows_ours_and_the_best_peer_under_the_roof():
    axes = cpu.draw(RESULTS, TINY).axes[0]
    roof, ours, peer = axes.get_lines()[:3]
    at = cpu.useful_flops("train", TINY) / cpu.least_bytes("train", TINY)
    assert max(roof.get_ydata()) == 2.0
    assert (ours.get_xdata()[0], ours.get_ydata()[0]) == (at, 1.0)
    assert peer.get_ydata()[0] == pytest.approx(1 / 3)


def test_cases_of_a_day_are_kept_together_if_their_shape_is_the_same(tmp_path):
    path = tmp_path / "cpu.json"
    assert cpu.earlier(path, TINY) == {}
    path.write_text(json.dumps({"results": RESULTS, "shape": TINY}))
    assert cpu.earlier(path, TINY) == RESULTS
    assert cpu.earlier(path, TINY | {"batch": 3}) == {}


@pytest.mark.parametrize("cpu_of", [("GenuineIntel", 6, 143, "intel-6-143"), ("AuthenticAMD", 25, 17, "amd-25-17")])
def test_results_of_two_kinds_of_cpu_are_two_files(tmp_path, monkeypatch, cpu_of):
    vendor, family, model, slug = cpu_of
    facts = {"vendor_id": vendor, "cpu family": str(family), "model": str(model), "model name": "Hidden"}
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "_cpuinfo", lambda: facts)
    common.write("cpu", "A title", ["a"], [[1]], {}, "cpu")
    (stored,) = tmp_path.glob("*.json")
    assert stored.stem.endswith(f"-cpu-{slug}")
    assert json.loads(stored.read_text())["machine"]["cpu"] == f"Hidden ({slug})"
    monkeypatch.setattr(common, "_cpuinfo", dict)
    assert common.cpu_slug() == common.platform.machine()


def test_weights_for_every_token_are_refused_with_both_numbers():
    for case, copied in (("train", "45 GB"), ("prefill", "45 GB"), ("decode_32", "23 GB")):
        reason = cpu.too_large("transformers-batched_mm", case, cpu.SHAPE)
        assert copied in reason
        assert "8 are" in reason
    for name, case in (("transformers-batched_mm", "decode_8"), ("transformers-eager", "train")):
        assert not cpu.too_large(name, case, cpu.SHAPE)


def test_a_worker_measures_and_one_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(cpu, "ROOF", ("matmul", "read"))
    monkeypatch.setattr(cpu, "SQUARE", 64)
    monkeypatch.setattr(cpu, "READ", 2**16)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    found = cpu.measure("moe_forward", [cpu.OURS, "mixtral_jax-nonsense"], cpu.SMALL, rounds=2)
    assert found[cpu.OURS]["rounds"] == 2
    assert 1e8 < found[cpu.OURS]["peak_bytes"] <= found[cpu.OURS]["peak_bytes_with_start"]
    assert "there is no option nonsense" in found["mixtral_jax-nonsense"]["reason"]
    assert set(found["roof"]) == {"matmul_flops", "read_bytes"}


def test_a_forgotten_peak_is_what_is_there_now():
    held = bytearray(200_000_000)
    before = peak_bytes()
    del held
    forget_peak()
    assert peak_bytes() < before - 150_000_000


def test_claims_of_growth_are_of_the_ratios_they_name():
    """Twice the tokens in 2.2 times the time is within 20%; squares lie on no line, and scores that grow with T squared are not linear in T."""
    found = {
        "tokens by E": {"8": 100, "16": 200},
        "forward by E": {"8": 1.0, "16": 2.2},
        "training by E": {"8": 3.5, "16": 9.0},
        "gradient traffic by E": {"8": 0.5, "16": 1.0},
        "forward by K": {"1": 1.0, "2": 4.0, "3": 9.0},
        "forward by tokens": {"100": 1.5, "200": 2.5, "400": 4.5},
        "layer by T": {"100": 2.0, "200": 5.5},
        "without scores by T": {"100": 1.0, "200": 1.5},
    }
    assert growth.scores_of(found) == {"100": 1.0, "200": 4.0}
    said = [(round(c["measured"], 3), c["holds"]) for c in growth.claims(found)]
    assert said == [(1.1, True), (1.333, False), (1.141, False), (1.0, True), (1.5, False), (2.0, False)]


@pytest.mark.slow
def test_growth_and_phases_run_small(monkeypatch, capsys):
    for program in (growth, phases):
        monkeypatch.setattr(sys, "argv", [program.__name__, "--small", "--rounds=1"])
        program.main()
    printed = capsys.readouterr().out
    assert "forward per token is flat in E" in printed
    assert "experts, 2 layers" in printed
