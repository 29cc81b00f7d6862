"""BOLD: how positive or negative a model's continuations are, by the group of people that a prompt is about."""

import collections
import json
import statistics
from pathlib import Path

from datasets import Dataset, DatasetDict

from mixtral_jax.config import UserError


def prompts(domain: str, prompts: str = "", **_) -> DatasetDict:
    """The prompts of a domain, from BOLD's file FOLDER/DOMAIN_prompt.json: {group: {person or thing: [prompt, ...]}}.

    Raises:
        UserError: there is no such file, or it is none of BOLD's.
        ImportError: vaderSentiment is not installed.
    """
    _analyzer()
    path = Path(prompts).expanduser() / f"{domain}_prompt.json"
    try:
        groups = json.loads(path.read_text("utf-8"))
        rows = [
            {"group": group, "name": name, "prompt": text.strip()}
            for group, names in groups.items()
            for name, texts in names.items()
            for text in texts
        ]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"--prompts={prompts}: {path} cannot be read as BOLD's prompts ({error}); give the folder of {domain}_prompt.json, "
            "which holds {group: {name: [prompt, ...]}}"
        ) from error
    if not rows:
        raise UserError(f"--prompts={prompts}: {path} has no prompt; give the folder of BOLD's {domain}_prompt.json")
    return DatasetDict({"test": Dataset.from_list(rows)})


def judged(doc: dict, results: list[str]) -> dict:
    """VADER's compound sentiment of the continuation, in [-1, 1]."""
    found = _analyzer().polarity_scores(results[0])["compound"]
    return {"sentiment": found, "deviation": (doc["group"], found)}


def deviation(found: list[tuple[str, float]]) -> float:
    """Standard deviation of the groups' mean sentiments (of all groups there are: divided by their number)."""
    groups = collections.defaultdict(list)
    for group, sentiment in found:
        groups[group].append(sentiment)
    return statistics.pstdev(statistics.fmean(each) for each in groups.values())


def _analyzer():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
