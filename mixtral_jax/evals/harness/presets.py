"""Sets of benchmarks that --tasks names, with the scores that the paper on Mixtral 8x7B gives for them.

A benchmark is written TASK or TASK@SHOTS; SHOTS are the examples before each question.
"""

from typing import NamedTuple


class Paper(NamedTuple):
    """What the paper reports of a benchmark, for Mixtral 8x7B (base)."""

    metric: str  # the harness's name of what it reports
    score: float | None  # None: it gives no number
    scale: float = 100.0  # our value times this is on the paper's scale
    note: str = ""  # how our measurement differs


_ACC, _NORM = "acc", "acc_norm"

# (metric's task as --tasks has it): what the paper says. The shots are the paper's.
PAPER: dict[str, Paper] = {
    "mmlu@5": Paper(_ACC, 70.6),
    "hellaswag@0": Paper(_NORM, 84.4),
    "hellaswag@10": Paper(_NORM, 86.7),
    "winogrande@0": Paper(_ACC, 77.2),
    "winogrande@5": Paper(_ACC, 81.2),
    "piqa@0": Paper(_NORM, 83.6),
    "arc_easy@0": Paper(_NORM, 83.1),
    "arc_challenge@0": Paper(_NORM, 59.7),
    "arc_challenge@25": Paper(_NORM, 85.8, note="the paper's 25-shot score is of letters as answers, ours of texts"),
    "nq_open@5": Paper("exact_match,remove_whitespace", 30.6),
    "triviaqa@5": Paper("exact_match,remove_whitespace", 71.5),
    "humaneval": Paper("pass@1,create_test", 40.2, note="0-shot; runs generated code"),
    "mbpp": Paper("pass_at_1", 60.7, note="3-shot; the paper has the hand-verified subset, this is the full set"),
    "math_maj4": Paper("exact_match,maj@4", 28.4, note="4-shot"),
    "gsm8k_maj8": Paper("exact_match,maj@8", 74.4, note="8-shot, chain of thought"),
    "gsm8k@5": Paper("exact_match,strict-match", 58.4),
    "bbh": Paper("exact_match,get-answer", 42.0, note="3-shot; the paper's score is read off a figure"),
    "agieval_en": Paper(_ACC, 51.4, note="0-shot, the paper 3 to 5; the paper's score is read off a figure"),
    "social_iqa@0": Paper(_ACC, None),
    "openbookqa@0": Paper(_NORM, None),
    "commonsense_qa@0": Paper(_ACC, None),
    "boolq@0": Paper(_ACC, None),
    "quac": Paper("f1", None, note="0-shot"),
    "arc_fr@25": Paper(_NORM, 58.2),
    "hellaswag_fr@10": Paper(_NORM, 77.4),
    "m_mmlu_fr@5": Paper(_ACC, 70.9),
    "arc_de@25": Paper(_NORM, 54.3),
    "hellaswag_de@10": Paper(_NORM, 73.0),
    "m_mmlu_de@5": Paper(_ACC, 71.5),
    "arc_es@25": Paper(_NORM, 55.4),
    "hellaswag_es@10": Paper(_NORM, 77.6),
    "m_mmlu_es@5": Paper(_ACC, 72.5),
    "arc_it@25": Paper(_NORM, 52.8),
    "hellaswag_it@10": Paper(_NORM, 75.1),
    "m_mmlu_it@5": Paper(_ACC, 70.9),
    "bbq": Paper(_ACC, 56.0),
    "bold_gender": Paper("sentiment", 0.323, 1.0, "the paper's deviation between groups: 0.045"),
    "bold_profession": Paper("sentiment", 0.243, 1.0, "the paper's deviation between groups: 0.087"),
    "bold_religious_ideology": Paper("sentiment", 0.144, 1.0, "the paper's deviation between groups: 0.089"),
    "bold_political_ideology": Paper("sentiment", 0.186, 1.0, "the paper's deviation between groups: 0.146"),
    "bold_race": Paper("sentiment", 0.232, 1.0, "the paper's deviation between groups: 0.052"),
}

LANGUAGES = ("fr", "de", "es", "it")
BOLD = ("bold_gender", "bold_profession", "bold_religious_ideology", "bold_political_ideology", "bold_race")
LOCAL = (
    "local_members",
    "local_members_few",
    "local_keywords",
    "local_arithmetic",
    "local_last_word",
    "local_prose",
    "local_function_name",
)

PRESETS: dict[str, tuple[str, ...]] = {
    "paper": (
        "mmlu@5",
        "hellaswag@0",
        "hellaswag@10",
        "winogrande@0",
        "winogrande@5",
        "piqa@0",
        "arc_easy@0",
        "arc_challenge@0",
        "arc_challenge@25",
        "social_iqa@0",
        "openbookqa@0",
        "commonsense_qa@0",
        "boolq@0",
        "quac",
        "nq_open@5",
        "triviaqa@5",
        "humaneval",
        "mbpp",
        "math_maj4",
        "gsm8k@5",
        "gsm8k_maj8",
        "bbh",
        "agieval_en",
    ),
    "paper_multilingual": tuple(
        task for l in LANGUAGES for task in (f"arc_{l}@25", f"hellaswag_{l}@10", f"m_mmlu_{l}@5")
    ),
    "bias": ("bbq", *BOLD),
    "quick": ("hellaswag@0", "winogrande@0", "piqa@0", "arc_easy@0", "arc_challenge@0"),
    "local": LOCAL,
}
LIMITS = {"quick": 200}  # questions of each benchmark, where --limit says nothing
