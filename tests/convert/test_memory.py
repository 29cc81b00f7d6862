"""The memory of conversion and of loading does not grow with the model: 1.5 GB of weights, each in a process of its own."""

import pytest

from benchmarks.conversion_memory import CONVERT, LOAD, synthetic, watched

LIMIT = 700_000_000  # bytes of anonymous memory; the interpreter with its libraries takes 100 MB of them


@pytest.mark.slow
def test_memory_stays_below_a_share_of_the_model(tmp_path):
    total = synthetic(tmp_path / "hf", 1.6, "bfloat16")
    assert total > 1_500_000_000
    for command, source, target in (("import", "hf", "run"), ("export", "run", "back"), ("verify", "hf", "back")):
        peak, _, _ = watched(CONVERT, command, f"--from={tmp_path / source}", f"--to={tmp_path / target}")
        print(f"{command}: {total / 1e9:.2f} GB, peak {peak / 1e6:.0f} MB")
        assert peak < LIMIT, f"{command} took {peak / 1e6:.0f} MB"
    for spec in (f"hf:{tmp_path / 'hf'}", tmp_path / "run"):
        peak, held, _ = watched(LOAD, spec, devices=4)
        print(f"loading {spec}: {(peak - held) / 1e6:.0f} MB beside {held / 1e9:.2f} GB of arrays")
        assert held == 2 * total
        assert peak - held < LIMIT
