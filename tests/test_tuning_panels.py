"""The report of SFT and DPO: which answers it shows, and that its panels cope with few lines and with none."""

import json

from matplotlib.figure import Figure

from mixtral_jax import report, tuning_panels

SAMPLES = [
    {"step": step, "number": 1 + (prompt == "b"), "prompt": prompt, "answer": f"{prompt} after {step}"}
    for step in (0, 10, 20, 30, 40)
    for prompt in ("a", "b")
]
TRAIN = [
    {"step": step, "preference_loss": 0.69 - step / 200, "rewards/accuracies": 0.5, "rewards/margins": step / 10}
    for step in (1, 10, 20)
]
HELDOUT = [
    {"step": step, "loss": 0.69, "accuracy": step / 40, "accuracy_low": step / 50, "accuracy_high": step / 30}
    for step in (0, 20)
]


def test_each_prompt_has_its_first_middle_and_last_answer():
    lines = tuning_panels.answer_lines(SAMPLES)
    assert lines == [
        *[("prompt", "a"), *(("answer", f"step {step}: a after {step}") for step in (0, 20, 40))],
        *[("prompt", "b"), *(("answer", f"step {step}: b after {step}") for step in (0, 20, 40))],
    ]


def test_long_answers_are_cut_and_control_characters_shown():
    (_, first, *rest) = tuning_panels.answer_lines([{"step": 3, "prompt": "p", "answer": "\x1b[31m" + "word " * 500}])
    assert first[1].startswith(r"step 3: \x1b[31mword")
    assert len(rest) == 2
    assert rest[-1][1].endswith(" ...")
    assert all(len(text) <= tuning_panels.ANSWER_WIDTH for _, text in (first, *rest))


def test_texts_of_pretraining_are_no_answers():
    assert tuning_panels.answer_lines([{"step": 1, "text": "def f"}]) == []


def test_panels_show_what_the_lines_say():
    figure = Figure()
    loss, accuracy = figure.subplots(2)
    tuning_panels.draw_preference_loss(loss, TRAIN, HELDOUT)
    tuning_panels.draw_accuracy(accuracy, TRAIN, HELDOUT)
    assert loss.get_lines()[0].get_ydata().tolist() == [line["preference_loss"] for line in TRAIN]
    assert "at the start: 0.690" in [text.get_text() for text in loss.get_legend().get_texts()]
    assert "50.0%" in [text.get_text() for text in accuracy.texts], "the last held-out accuracy"
    for draw in (tuning_panels.draw_preference_loss, tuning_panels.draw_accuracy):
        axes = Figure().subplots()
        draw(axes, [], [])
        assert axes.texts, "it says that there is nothing yet"


def test_a_dpo_run_has_its_own_report(tmp_path):
    lines = [
        {"kind": kind, "time": 0.0, **line} for kind, of in (("train", TRAIN), ("heldout", HELDOUT)) for line in of
    ]
    lines += [{"kind": "sample", "time": 0.0, **line} for line in SAMPLES]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure = report.draw(TRAIN, HELDOUT, None, "run", samples=SAMPLES)
    titles = {axes.get_title(loc="left") for axes in figure.axes}
    assert {"Preference loss", "Reward accuracy", "Answers before, during and after"} <= titles
    assert "Held-out bits per byte" not in titles
    assert report.write_report(tmp_path, tmp_path / "report.png", "run").stat().st_size > 20_000
