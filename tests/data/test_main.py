"""The command line: counts, previews, training a tokenizer, and exit status 2 with a message."""

import importlib.util
from pathlib import Path

import pytest

from mixtral_jax.data.__main__ import DEFAULTS, SEQ_LEN, main, preview_lines
from mixtral_jax.data.cache import build_cache
from mixtral_jax.data.tokenizer import load_tokenizer


@pytest.fixture
def flags(make_data, tmp_path):
    for i in range(30):
        (tmp_path / "corpus" / f"{i:02d}.txt").write_text(f"    line {i}\n" * (i + 1))
    data = make_data()
    return [f"--{key}={getattr(data, key)}" for key in DEFAULTS]


def test_defaults_are_those_of_the_configs():
    path = Path(__file__).parents[2] / "configs" / "common.py"
    spec = importlib.util.spec_from_file_location("common_for_test", path)
    common = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(common)
    base = common.base()
    one_source = {key: default for key, default in base.data.to_dict().items() if key not in ("mixture", "streaming")}
    assert {key: default for key, (default, _) in DEFAULTS.items()} == one_source
    assert base.train.seq_len == SEQ_LEN


def test_build_prints_counts(flags, capsys):
    assert main(["build", *flags, "--seq_len=64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    train = next(line for line in lines if line.startswith("train")).split()
    heldout = next(line for line in lines if line.startswith("held out")).split()[1:]
    assert int(train[1]) + int(heldout[1]) == 30
    tokens, size = (int(text.replace(",", "")) for text in train[2:4])
    assert tokens == size + 2 * int(train[1])


def test_preview_shows_the_text(flags, capsys):
    assert main(["preview", "2", *flags, "--seq_len=64"]) == 0
    out = capsys.readouterr().out
    assert out.count("=== row") == 2
    assert "trained tokens" in out
    assert "    line " in out
    assert "\033" not in out


@pytest.mark.parametrize("spec", ["bytes", "mistral-v1"])
def test_preview_is_exact_and_coloured_on_a_terminal(flags, make_data, spec, shared_cache_dir):
    tokenizer = load_tokenizer(spec, shared_cache_dir)
    train = build_cache(make_data(), tokenizer).train
    text = "\n".join(preview_lines(train, tokenizer, 1000, 512, 0, colour=False))
    assert "[[<BOS>]]    line 3\n    line 3\n    line 3\n    line 3\n<EOS>" in text
    coloured = "\n".join(preview_lines(train, tokenizer, 1, 512, 0, colour=True))
    assert "\033[32m    line" in coloured
    assert "[[" not in coloured


def test_tokenizer_is_trained_and_usable(flags, tmp_path, capsys):
    out = tmp_path / "deep" / "my.model"
    assert main(["tokenizer", *flags, "--vocab_size=280", f"--out={out}"]) == 0
    assert str(out) in capsys.readouterr().out
    assert main(["build", *flags, f"--tokenizer={out}"]) == 0
    assert "vocabulary 280" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--path=/no/such/*.txt"], "matches no file"),
        (["--path="], "set --path"),
        (["--heldout_fraction=1.5"], "between 0 and 1"),
        (["--tokenizer=unknown"], "use mistral-v1, bytes"),
    ],
)
def test_mistakes_exit_with_2_and_a_message(flags, capsys, extra, message):
    assert main(["build", *flags, *extra]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err


@pytest.mark.parametrize("arguments", [[], ["build", "--source=web"], ["build", "--seq_len=0"], ["fly"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize("command", [[], ["build"], ["preview"], ["tokenizer"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert ("examples:" if not command else "--heldout_fraction") in capsys.readouterr().out
