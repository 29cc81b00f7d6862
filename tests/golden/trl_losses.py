"""trl's own DPO, CPO and SFT trainers on small Mixtrals: their tokenisation, collation and compute_loss, nothing of ours.

Needs requirements-parity.txt.
"""

import itertools
import os
import tempfile

import datasets
import numpy as np
import tokenizers
import transformers
import trl

from tests.golden import reference
from tests.golden.make_goldens import build
from tests.golden.preference import BETA, GAMMA, METRICS, POLICY, REFERENCE, SHAPE, Found

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # importing it warns, and warnings are errors
from trl.experimental.cpo import CPOConfig, CPOTrainer

datasets.disable_progress_bars()

BOS, EOS = 1, 2
# BOS once, EOS after every answer and trained: trl calls what is between the two markers `assistant_masks`.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ ' ' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One word per id: "w7" is 7. Padding is EOS: Mixtral has none, trl's DPO and SFT then take EOS, and CPO raises."""
    words = {word(i): i for i in range(SHAPE["vocab_size"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=word(0)))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = dict(unk_token=word(0), bos_token=word(BOS), eos_token=word(EOS), pad_token=word(EOS))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE, **special)


def word(i: int) -> str:
    """The word whose id is i."""
    return {0: "<unk>", BOS: "<s>", EOS: "</s>"}.get(i, f"w{i}")


def text(ids: list[int]) -> str:
    """The text of these ids."""
    return " ".join(map(word, ids))


def model(seed: int) -> transformers.MixtralForCausalLM:
    """The model with the weights of this seed."""
    return build(SHAPE, reference.weights(SHAPE, seed))


def arguments(**changes) -> dict:
    """What every trainer of ours has in common."""
    common = dict(
        output_dir=tempfile.gettempdir(), report_to="none", use_cpu=True, bf16=False, activation_checkpointing=False
    )
    return common | dict(disable_tqdm=True, max_length=None) | changes


def documents(file) -> list[tuple[list[int], list[float]]]:
    """Ids and weights of each document of a TokenFile."""
    spans = [slice(start, stop) for start, stop in zip(file.offsets[:-1], file.offsets[1:])]
    return [(file.tokens[span].tolist(), file.weights[span].tolist()) for span in spans]


def prompt_and_answer(ids: list[int], weights: list[float]) -> tuple[str, str]:
    """The texts of a document with one answer. Its EOS is left out: trl adds it."""
    at = weights.index(1.0)
    return text(ids[:at]), f" {text(ids[at:-1])}"


def rows_of(file) -> list[dict[str, str]]:
    """Pairs as texts."""
    rows = []
    for chosen, rejected in zip(documents(file)[0::2], documents(file)[1::2]):
        (prompt, good), (same, bad) = prompt_and_answer(*chosen), prompt_and_answer(*rejected)
        assert prompt == same, (prompt, same)
        rows.append({"prompt": prompt, "chosen": good, "rejected": bad})
    return rows


def dpo_trainer(rows: list[dict], seeds=(POLICY, REFERENCE), **changes) -> trl.DPOTrainer:
    """trl's trainer of these losses and weights; changes are DPOConfig's. The balance loss is off unless they have it."""
    args = trl.DPOConfig(**arguments(**dict(beta=BETA, router_aux_loss_coef=0.0) | changes))
    policy, ref = map(model, seeds)
    data = datasets.Dataset.from_list(rows)
    return trl.DPOTrainer(policy, ref, args, train_dataset=data, processing_class=tokenizer())


def cpo_trainer(rows: list[dict], **changes) -> CPOTrainer:
    """The same of simpo, which has no reference."""
    changes = dict(beta=BETA, simpo_gamma=GAMMA, loss_type="simpo", cpo_alpha=0.0) | changes
    args = CPOConfig(**arguments(max_length=512) | changes)
    data = datasets.Dataset.from_list(rows)
    return CPOTrainer(model(POLICY), args, train_dataset=data, processing_class=tokenizer())


def collated(trainer, which: slice = slice(None)) -> dict:
    """These rows of the trainer's prepared data as its own collator puts them together, in order."""
    return trainer.data_collator(list(trainer.train_dataset)[which])


def trainer_of(case: dict, rows: list[dict], **changes):
    """trl's trainer of one of preference.CASES. cDPO is `aot`, which has label smoothing: trl's `sigmoid` ignores it."""
    sft = case.get("sft_weight", 0.0)
    smoothing = case.get("label_smoothing", 0.0)
    if case["loss"] == "simpo":
        return cpo_trainer(rows, cpo_alpha=sft)
    name = "aot" if case["loss"] == "sigmoid" and smoothing else case["loss"]
    names, weights = ([name, "sft"], [1.0, sft]) if sft else ([name], [1.0])
    return dpo_trainer(rows, loss_type=names, loss_weights=weights, label_smoothing=smoothing, **changes)


def batches_of(trainer, pairs: int) -> list[dict]:
    """All pairs in one batch; for aot, which sorts the batch's log-ratios, one batch a pair."""
    if getattr(trainer, "loss_types", None) == ["aot"]:
        return [collated(trainer, slice(i, i + 1)) for i in range(pairs)]
    return [collated(trainer)]


def metrics_of(trainer) -> dict[str, float]:
    """The means of what the trainer logged."""
    stored = trainer._stored_metrics if isinstance(trainer, CPOTrainer) else trainer._metrics
    return {name: float(np.mean(stored["train"][name])) for name in METRICS}


def run(trainer, inputs: list[dict]) -> Found:
    """compute_loss and its gradients, averaged over the batches."""
    losses = []
    for one in inputs:
        loss = trainer.compute_loss(trainer.model, one) / len(inputs)
        loss.backward()
        losses.append(loss.item())
    balance = trainer._metrics["train"]["aux_loss"] if trainer.aux_loss_enabled else [None]
    return Found(sum(losses), metrics_of(trainer), gradients(trainer.model), balance[-1])


def gradients(model) -> dict[str, np.ndarray]:
    """By our names; a parameter without a gradient is an error."""
    theirs = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return reference.from_hugging_face(theirs, reference.weights(SHAPE))


def pairs_loss(case: dict, file) -> Found:
    """trl's loss, metrics and gradients of all pairs of a file, for one of preference.CASES or WITH_SFT."""
    rows = rows_of(file)
    trainer = trainer_of(case, rows)
    return run(trainer, batches_of(trainer, len(rows)))


def conversations(file) -> list[dict]:
    """Documents as messages: tokens of weight 0 are the user's (after BOS), those of weight 1 an answer and its EOS."""
    rows = []
    for ids, weights in documents(file):
        messages, tokens = [], list(zip(ids, weights))[1:]
        for weight, run_ in itertools.groupby(tokens, key=lambda token: token[1]):
            found = [i for i, _ in run_]
            role, content = ("assistant", found[:-1]) if weight else ("user", found)
            messages.append({"role": role, "content": text(content)})
        rows.append({"messages": messages})
    return rows


def completions(file) -> list[dict]:
    """Documents with one answer as prompt and completion."""
    return [dict(zip(("prompt", "completion"), prompt_and_answer(*document))) for document in documents(file)]


def sft_trainer(rows: list[dict], **changes) -> trl.SFTTrainer:
    """trl's SFT trainer of the policy's weights; changes are SFTConfig's."""
    args = trl.SFTConfig(**arguments(router_aux_loss_coef=0.0, **changes))
    data = datasets.Dataset.from_list(rows)
    return trl.SFTTrainer(model(POLICY), args, train_dataset=data, processing_class=tokenizer())


def sft(trainer: trl.SFTTrainer, inputs: list[dict]):
    """compute_loss over the batches as steps of gradient accumulation, and its gradients by our names."""
    tokens = sum((one["labels"][:, 1:] != -100).sum() for one in inputs)
    losses = []
    for one in inputs:
        loss = trainer.compute_loss(trainer.model, dict(one), num_items_in_batch=tokens)
        loss.backward()
        losses.append(loss.item())
    return sum(losses), gradients(trainer.model)
