"""The command line: counts, previews, training a tokenizer, and exit status 2 with a message."""

import importlib.util
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mixtral_jax.config import RunError
from mixtral_jax.data import __main__ as command
from mixtral_jax.data.__main__ import main
from mixtral_jax.data.arguments import DEFAULTS, SEQ_LEN
from mixtral_jax.data.cache import TokenFile, build_cache
from mixtral_jax.data.corpus import open_batches, open_corpus
from mixtral_jax.data.loader import Batches
from mixtral_jax.data.packing import pack
from mixtral_jax.data.preview import preview_lines
from mixtral_jax.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
# ml_collections loads a config file by a function that Python 3.12 will no longer have.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture
def flags(make_data, tmp_path):
    for i in range(30):
        (tmp_path / "corpus" / f"{i:02d}.txt").write_text(f"    line {i}\n" * (i + 1))
    data = make_data()
    return [f"--{key}={getattr(data, key)}" for key in DEFAULTS]


def test_defaults_are_those_of_the_configs():
    path = ROOT / "configs" / "common.py"
    spec = importlib.util.spec_from_file_location("common_for_test", path)
    common = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(common)
    base = common.base()
    one_source = {
        key: default for key, default in base.data.to_dict().items() if key not in ("mixture", "streaming", "packing")
    }
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


def test_what_goes_wrong_on_the_way_is_told_without_a_stack_trace(flags, capsys, monkeypatch):
    def killed(*args, **kwargs):
        raise RunError("a process was killed; run it again")

    monkeypatch.setattr(command, "build_cache", killed)
    assert main(["build", *flags]) == RunError.status == 1
    assert capsys.readouterr().err == "error: a process was killed; run it again\n"


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
    batch = Batches(train, pack(train.lengths, 512), batch_size=1000, seq_len=512, seed=0).batch(0)
    text = "\n".join(preview_lines(batch, tokenizer, colour=False))
    assert text.startswith("plain: trained on, [[only read]]")
    assert "[[<BOS>]]    line 3\n    line 3\n    line 3\n    line 3\n<EOS>" in text
    coloured = "\n".join(preview_lines(batch, tokenizer, colour=True))
    assert "\033[32m    line" in coloured
    assert "[[" not in coloured


def test_tokenizer_is_trained_and_usable(flags, tmp_path, capsys):
    out = tmp_path / "deep" / "my.model"
    assert main(["tokenizer", *flags, "--vocab_size=280", f"--out={out}"]) == 0
    assert str(out) in capsys.readouterr().out
    assert main(["build", *flags, f"--tokenizer={out}"]) == 0
    assert "vocabulary 280" in capsys.readouterr().out


def test_tokenizer_skips_as_many_bad_rows_as_it_may(flags, tmp_path, capsys):
    for name in ("07.txt", "19.txt"):
        (tmp_path / "corpus" / name).write_bytes(b"abc\xff")
    command = ["tokenizer", *flags, "--vocab_size=280", f"--out={tmp_path / 'my.model'}"]
    assert main([*command, "--max_bad_rows=2"]) == 0
    assert main([*command, "--max_bad_rows=1"]) == 2
    assert "19.txt is not UTF-8" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do; give --config"),
        (["--preview=2"], "--config is missing"),
        (["--config=configs/tiny.py"], "nothing to do"),
        (["build", "--source=web"], "'web'"),
        (["build", "--seq_len=0"], "0 is not at least 1"),
        (["fly"], "'fly'"),
        (["--validat"], "--validat"),
        (["--config=configs/none.py", "--validate"], "none.py"),
        (["--config=configs/tiny.py", "--config.train.stepz=3", "--validate"], "stepz"),
        (["--config=configs/tiny.py", "--config.train.steps=many", "--validate"], "many"),
        (["--config=configs/tiny.py", "--config.data.source=jsonl", "--validate"], "data.path"),
        (["--config=configs/tiny.py", "--validate", "--tokens_per_second=0"], "must be positive"),
        (["--config=configs/tiny.py", "--validate", "--workdir=/no/such"], "holds no metrics.jsonl"),
        (["--config=configs/tiny.py", "--preview=0"], "0 is not at least 1"),
        (["build", "--config=configs/tiny.py", "--tokenizer=bytes"], "write --config.data.tokenizer=bytes"),
        (["build", "--config=configs/tiny.py", "--seq_len=5"], "write --config.train.seq_len=5"),
        (["build", "--config=configs/tiny.py", "--config.data.streaming=True"], "nothing to build"),
        (["preview", "2", "--config=configs/tiny.py"], "--preview=2"),
        (["build", "--max_bad_rows=-1"], "must not be negative"),
        (["preview", "--seed=-1"], "--seed: -1 is not from 0 to"),
        (["preview", f"--seed={2**64}"], "is not from 0 to 2**32 - 1"),
    ],
)
def test_wrong_usage_exits_with_2_and_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("command", [[], ["build"], ["preview"], ["tokenizer"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for word in ("--heldout_fraction",) if command else ("examples:", "--validate", "--preview", "exit status"):
        assert word in out


@pytest.fixture
def config_flags(flags, tmp_path):
    """The same corpus by way of a configuration: 10 steps of 4 rows of 64."""
    values = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    data = [f"--config.data.{key}={values[key]}" for key in ("source", "path", "cache_dir", "heldout_fraction")]
    train = [f"--config.train.{key}={value}" for key, value in (("steps", 10), ("batch_size", 4), ("seq_len", 64))]
    warm = "--config.optim.warmup_steps=5"
    return ["--config=configs/tiny.py:tiny", *data, *train, warm]


def rows_shown(out):
    """The text of each row of a preview."""
    return out.partition("=== row")[2].split("=== row")


@pytest.mark.parametrize("streaming", [False, True])
def test_the_preview_of_a_configuration_shows_its_first_batches(config_flags, make_data, streaming, capsys):
    flag = f"--config.data.streaming={streaming}"
    shown = []
    for n in (2, 7):
        assert main([*config_flags, flag, f"--preview={n}"]) == 0
        shown.append(rows_shown(capsys.readouterr().out))
    assert [len(rows) for rows in shown] == [2, 7]
    assert shown[0][0] == shown[1][0]
    tokenizer = load_tokenizer("bytes", "")
    data = make_data(streaming=streaming)
    batches = open_batches(data, open_corpus(data, tokenizer), tokenizer, batch_size=4, seq_len=64, seed=0)
    batch = next(batches.read())[0] if streaming else batches.batch(0)
    assert rows_shown("\n".join(preview_lines(batch, tokenizer, False)) + "\n")[:4] == [
        *shown[1][:3],
        shown[1][3].rstrip("\n") + "\n",
    ]


def test_untrained_tokens_are_told_apart(capsys):
    tokenizer = load_tokenizer("bytes", "")
    file = TokenFile(np.array([256, *b"secret answer", 257]), np.array([0, 15]), np.array([13]), ["a"])
    batch = Batches(file, pack(file.lengths, 14), batch_size=1, seq_len=14, seed=0).batch(0)
    batch["loss_weights_BT"][0, :7] = 0
    assert "[[<BOS>]][[secret ]]answer<EOS>" in "\n".join(preview_lines(batch, tokenizer, False))
    coloured = "\n".join(preview_lines(batch, tokenizer, True))
    assert "\033[90msecret \033[0m\033[32manswer<EOS>\033[0m" in coloured


def test_validate_prints_and_writes_what_it_found(config_flags, tmp_path, capsys):
    out = tmp_path / "deep" / "report.json"
    assert main([*config_flags, "--validate", "--preview=1", f"--out={out}", "--tokens_per_second=256"]) == 0
    printed = capsys.readouterr().out
    for words in ("=== row 1", "0 rows cannot be read", "10 steps of 4 rows of 64", "time: 0:00:10 at 256 tokens"):
        assert words in printed
    report = json.loads(out.read_text())
    assert report["problems"] == []
    assert report["run"]["seconds"] == 10
    assert report["sources"]["text"]["train"]["documents"] + report["sources"]["text"]["heldout"]["documents"] == 30


def test_validate_without_a_speed_says_so(config_flags, capsys):
    assert main([*config_flags, "--validate"]) == 0
    assert "time: unknown; give --tokens_per_second or --workdir" in capsys.readouterr().out


def test_validate_takes_the_speed_of_the_newest_run(config_flags, tmp_path, capsys):
    for age, speed in ((100, 1), (10, 512)):
        folder = tmp_path / "runs" / str(age)
        folder.mkdir(parents=True)
        lines = [{"kind": "train", "step": i, "tokens_per_second": speed if i else None} for i in range(4)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.utime(folder / "metrics.jsonl", (1e9 - age, 1e9 - age))
    assert main([*config_flags, "--validate", f"--workdir={tmp_path / 'runs'}"]) == 0
    assert "time: 0:00:05 at 512 tokens a second" in capsys.readouterr().out
    assert main([*config_flags, "--validate", f"--workdir={tmp_path / 'runs' / '100'}"]) == 0
    assert "at 1 tokens a second" in capsys.readouterr().out


def test_validate_ends_with_2_where_rows_are_bad(config_flags, tmp_path, capsys):
    (tmp_path / "corpus" / "07.txt").write_bytes(b"abc\xff")
    assert main([*config_flags, "--validate"]) == 2
    captured = capsys.readouterr()
    assert "07.txt: is not UTF-8" in captured.out
    assert captured.err.startswith("error: 1 rows cannot be read")
    assert main([*config_flags, "--validate", "--config.data.max_bad_rows=1"]) == 0
    assert not (tmp_path / "cache").exists()


def test_build_takes_a_configuration(config_flags, flags, capsys):
    assert main(["build", *config_flags]) == 0
    one = capsys.readouterr().out
    assert main(["build", *flags, "--seq_len=64"]) == 0
    assert capsys.readouterr().out == one


def test_build_prints_the_sources_of_a_mixture(config_flags, tmp_path, capsys):
    config = tmp_path / "mixed.py"
    config.write_text(
        "from configs import common\n"
        "def get_config(arg=None):\n"
        "    c = common.shrink(common.base())\n"
        f"    files = {str(tmp_path / 'corpus')!r}\n"
        "    c.data.mixture = (dict(source='text', path=files + '/[01]*', weight=3.0, name='low'),\n"
        "                      dict(source='text', path=files + '/2*', weight=1.0, name='high'))\n"
        "    c.data.heldout_fraction = 0.3\n"
        f"    c.data.cache_dir = {str(tmp_path / 'cache')!r}\n"
        "    return c\n"
    )
    assert main(["build", f"--config={config}"]) == 0
    out = capsys.readouterr().out
    assert "low, weight 3" in out
    assert "high, weight 1" in out
    assert main([f"--config={config}", "--validate", "--preview=2"]) == 0
    out = capsys.readouterr().out
    assert "low     train" in out
    assert out.count("=== row") == 2


def run_in_terminal(*arguments, **environment):
    """The command's output on a terminal."""
    main_end, other_end = pty.openpty()
    command = [sys.executable, "-m", "mixtral_jax.data", *arguments]
    with subprocess.Popen(command, stdout=other_end, cwd=ROOT, env=os.environ | environment) as process:
        os.close(other_end)
        out = b""
        try:
            while chunk := os.read(main_end, 65536):
                out += chunk
        except OSError:  # the terminal's other end is closed
            pass
    os.close(main_end)
    assert process.returncode == 0
    return out.decode()


def test_colours_are_for_terminals_and_can_be_refused(config_flags):
    assert "\033[32m" in run_in_terminal(*config_flags, "--preview=1")
    assert "\033" not in run_in_terminal(*config_flags, "--preview=1", NO_COLOR="1")


def test_the_command_imports_no_jax(config_flags):
    code = (
        "import sys; from mixtral_jax.data.__main__ import main; assert main(sys.argv[1:]) == 0;"
        "assert not {'jax', 'grain', 'datasets', 'mistral_common'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, *config_flags, "--validate"], check=True, cwd=ROOT, capture_output=True)
