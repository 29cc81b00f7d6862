"""The report draws every run it may meet, without a warning (which the suite turns into an error)."""

import math

import numpy as np
import pytest
from matplotlib.image import imread

from mixtral_jax import panels, report, time_panels
from mixtral_jax.jsonl import JsonlWriter
from mixtral_jax.metrics import router_health

FINAL = {"bits_per_byte": 1.25, "unigram_bits_per_byte": 3.5, "bigram_bits_per_byte": 2.25}


def write_run(path, steps, layers=2, e=4, heldout=True, final=FINAL, broken_step=None):
    """Writes metrics as a trainer would; the step `broken_step` is not finite."""
    rng = np.random.default_rng(0)
    with JsonlWriter(path) as writer:
        for step in range(1, steps + 1):
            load_LE = rng.dirichlet(np.full(e, 4.0), layers)
            bad = math.nan if step == broken_step else 1.0
            scalars = {"token_loss": bad * (2 + 8 / step), "balance_loss": bad * 1.1, "gradient_norm": bad / step}
            speed = {"tokens_per_second": None if step == 1 else 1e4, "mfu": None if step == 1 else 0.4}
            health = router_health(load_LE * bad, np.ones(layers), np.zeros(layers))
            layered = {"load_LE": load_LE * bad, "max_over_mean_L": health["max_over_mean_L"]}
            writer.write("train", step, scalars | {"learning_rate": 1e-3 * step} | speed | layered)
            if heldout and step % 2 == 0:
                writer.write("heldout", step, {"loss": 2 + 8 / step, "bits_per_byte": (2 + 8 / step) / 2.5})
                writer.write("sample", step, {"text": "def f():"})
        if final:
            writer.write("final", steps, final)


RUNS = {
    "full": {"steps": 60},
    "two steps": {"steps": 2, "heldout": False, "final": None},
    "one step": {"steps": 1},
    "one expert": {"steps": 3, "e": 1},
    "unfinished": {"steps": 5, "final": None},
    "not finite": {"steps": 50, "broken_step": 50, "final": dict.fromkeys(FINAL, math.nan)},
    "never finite": {"steps": 1, "broken_step": 1, "heldout": False, "final": None},
    "empty": {"steps": 0, "final": None},
}


@pytest.mark.parametrize("name", RUNS)
def test_draws_every_run(tmp_path, name):
    write_run(tmp_path / "metrics.jsonl", **RUNS[name])
    out = report.write_report(tmp_path, tmp_path / "out" / "report.png", name)
    pixels = imread(out)
    assert pixels.shape[0] > 900
    assert pixels.shape[1] == 1760
    assert pixels.std() > 0.02  # not blank


def test_takes_the_file_too_and_names_one_that_is_missing(tmp_path):
    write_run(tmp_path / "m.jsonl", 3)
    assert report.write_report(tmp_path / "m.jsonl", tmp_path / "r.png", "run").stat().st_size > 10_000
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        report.write_report(tmp_path, tmp_path / "r.png", "run")


def drawn(tmp_path, **run):
    write_run(tmp_path / "metrics.jsonl", **run)
    lines = report.read_jsonl(tmp_path / "metrics.jsonl")
    by_kind = {kind: [line for line in lines if line["kind"] == kind] for kind in ("train", "heldout", "final")}
    figure = report.draw(by_kind["train"], by_kind["heldout"], (by_kind["final"] or [None])[-1], "run")
    return {axes.get_title(loc="left"): axes for axes in figure.axes}, by_kind


def test_panels_show_the_numbers(tmp_path):
    axes, lines = drawn(tmp_path, steps=10)
    bars = axes["Held-out bits per byte"]
    assert [bar.get_height() for bar in bars.patches] == [3.5, 2.25, 1.25]
    assert [text.get_text() for text in bars.texts] == ["3.500", "2.250", "1.250"]
    loss = {line.get_label(): line for line in axes["Loss"].get_lines()}
    np.testing.assert_allclose(loss["training batches"].get_ydata(), [x["token_loss"] for x in lines["train"]])
    np.testing.assert_allclose(loss["held-out text"].get_ydata(), [x["loss"] for x in lines["heldout"]])
    heat = next(axes[title] for title in axes if title.startswith("Load of every expert")).collections[0]
    shown = np.asarray(heat.get_array()).reshape(2, 4, 10)
    np.testing.assert_allclose(shown, np.moveaxis([x["load_LE"] for x in lines["train"]], 0, -1), atol=1e-6)
    assert heat.norm(0.25) == 0.5  # the fair share is the middle colour
    assert heat.norm(0.0) == 0.0


def test_steps_without_finite_loads_are_skipped():
    lines = [{"step": 1, "load_LE": [[3, 1]]}, {"step": 2, "load_LE": [[None, 1]]}, {"step": 3}]
    steps, load_SLE = panels.loads(lines)
    assert steps.tolist() == [1]
    assert load_SLE.tolist() == [[[0.75, 0.25]]]


def test_long_runs_are_averaged_into_columns():
    train = [{"step": step, "load_LE": [[step % 2, 1 - step % 2]]} for step in range(2 * panels.HEATMAP_COLUMNS)]
    figure = report.draw(train, [], None, "run")
    heat = next(axes for axes in figure.axes if axes.get_title(loc="left").startswith("Load")).collections[0]
    assert np.asarray(heat.get_array()).shape == (2, panels.HEATMAP_COLUMNS)
    np.testing.assert_allclose(heat.get_array(), 0.5)


@pytest.mark.parametrize("n", [40, 41, 399, 1000])
def test_smoothing_keeps_a_line_and_calms_noise(n):
    x = np.arange(n, dtype=float)
    np.testing.assert_allclose(panels._smooth(3 - 0.5 * x), 3 - 0.5 * x, atol=1e-9)
    noise = np.random.default_rng(0).normal(size=n)
    assert len(panels._smooth(noise)) == n
    assert panels._smooth(noise).std() < 0.8


# A run of 40 steps that crashed at step 26 and went on from step 20: jsonl.py keeps the lines of the steps that count.
SESSIONS = [{"kind": "session", "step": 0, "time": 1000.0}, {"kind": "session", "step": 20, "time": 1600.0}]


def timed(step):
    """Half of the time is training, three quarters after step 20; an evaluation at step 30."""
    time = 1000.0 + 10 * step + (500 if step > 20 else 0)
    line = {"step": step, "time": time, "token_loss": 5 - step / 20, "goodput": step * 5 / (time - 1000)}
    seconds = {"step_seconds": 5.0, "other_seconds": 5.0} if step <= 20 else {"step_seconds": 7.5, "eval_seconds": 2.5}
    return line | seconds


TIMED = [timed(step) for step in range(10, 50, 10)]


def titled(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_the_breakdown_stacks_shares_over_steps():
    axes = titled(report.draw(TIMED, [], None, "run", SESSIONS))["Where the time goes"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["step 62.5%", "eval 12.5%", "other 25.0%"]
    bars = {name: container.patches for name, container in zip(("step", "eval", "other"), axes.containers, strict=True)}
    assert [(bar.get_x(), bar.get_width()) for bar in bars["step"]] == [(0, 10), (10, 10), (20, 10), (30, 10)]
    assert [bar.get_height() for bar in bars["step"]] == [0.5, 0.5, 0.75, 0.75]
    assert [bar.get_height() for bar in bars["eval"]] == [0, 0, 0.25, 0.25]
    tops = [bar.get_y() + bar.get_height() for bar in bars["other"]]
    np.testing.assert_allclose(tops, 1.0)


def test_averaging_weighs_lines_by_their_steps(monkeypatch):
    """One bar for two lines: 1 step of pure evaluation and 9 steps of pure training."""
    monkeypatch.setattr(time_panels, "COLUMNS", 1)
    train = [{"step": 1, "eval_seconds": 2.0, "step_seconds": 0.0}, {"step": 10, "step_seconds": 2.0}]
    axes = titled(report.draw(train, [], None, "run"))["Where the time goes"]
    assert [container.patches[0].get_height() for container in axes.containers] == pytest.approx([0.9, 0.1])


def test_goodput_runs_over_the_wall_time_with_its_restarts():
    axes = titled(report.draw(TIMED, [], None, "run", SESSIONS))["Goodput"]
    curve = next(line for line in axes.get_lines() if len(line.get_xdata()) == 4)
    np.testing.assert_allclose(curve.get_xdata(), [100 / 60, 200 / 60, 800 / 60, 900 / 60])
    np.testing.assert_allclose(curve.get_ydata(), [line["goodput"] for line in TIMED])
    restart = next(line for line in axes.get_lines() if len(line.get_xdata()) == 2)
    np.testing.assert_allclose(restart.get_xdata(), 10)
    (gap,) = [patch for patch in axes.patches if patch.get_width() > 0]
    assert (gap.get_x(), gap.get_x() + gap.get_width()) == pytest.approx((200 / 60, 10)), (
        "from the last line to the start"
    )
    assert [text.get_text() for text in axes.texts] == ["22.2% went into steps that count, 1 restart"]


def test_restarts_and_the_best_held_out_point_are_on_the_loss():
    heldout = [{"step": step, "loss": loss} for step, loss in ((10, 4.5), (20, 3.5), (40, 4.0))]
    figure = report.draw(TIMED, heldout, None, "run", SESSIONS)
    lines = {line.get_label(): line for line in titled(figure)["Loss"].get_lines()}
    assert set(lines["restart"].get_xdata()) == {20}
    assert "best: 3.500 at step 20" in lines
    assert "restart" not in [
        line.get_label() for line in titled(report.draw(TIMED, heldout, None, "run", SESSIONS[:1]))["Loss"].get_lines()
    ]
    assert "1 restart" in "".join(text.get_text() for text in figure.texts)


@pytest.mark.parametrize(
    "train",
    [[], [{"step": 1, "goodput": None, "step_seconds": 0.0}], [{"step": 1, "time": 1000.0, "goodput": 0.0}]],
    ids=["nothing", "no time", "no seconds"],
)
def test_time_panels_cope_with_little(train, tmp_path):
    report.draw(train, [], None, "run", SESSIONS[:1]).savefig(tmp_path / "r.png")


def test_a_reader_never_sees_half_a_picture(tmp_path, monkeypatch):
    write_run(tmp_path / "metrics.jsonl", 3)
    out = report.write_report(tmp_path, tmp_path / "report.png", "run")
    before = out.read_bytes()

    def full(self, path, **_):
        with open(path, "wb") as file:
            file.write(b"half")
        assert out.read_bytes() == before, "the old picture stands while the new one is drawn"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.Figure, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        report.write_report(tmp_path, out, "run")
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "report.png"]
    assert report.main([str(tmp_path)]) == 1


def test_the_command_redraws_a_run_also_a_running_one(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "metrics.jsonl does not exist" in capsys.readouterr().err
    write_run(tmp_path / "metrics.jsonl", 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # the run is writing it
    assert report.main([str(tmp_path)]) == 0
    assert imread(tmp_path / "report.png").shape[1] == 1760
    assert report.main([str(tmp_path), f"--out={tmp_path}/other.png"]) == 0
    assert (tmp_path / "other.png").exists()
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train"\n{}\n')
    assert report.main([str(tmp_path)]) == 2
    assert "line 1" in capsys.readouterr().err
