"""A model's answers to token requests: in batches of like lengths, each kept when it is there, on all processes at once.

The harness runs on process 0 alone, for its order of requests is not the same in every process. Process 0 leads: it tells
the others each batch before it computes it with them, and at the end what came of it all.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from mixtral_jax import distributed
from mixtral_jax.config import RunError, UserError
from mixtral_jax.evals.scorer import Request, total
from mixtral_jax.evals.subject import Subject
from mixtral_jax.evals.work import Work, bar, told
from mixtral_jax.generate import Sampling, generate
from mixtral_jax.generate.engine import round_up
from mixtral_jax.models.decode import Prepared
from mixtral_jax.models.mixtral import Mixtral
from mixtral_jax.sharding import moved, without_context


class Writing(NamedTuple):
    """A text to be written."""

    context: tuple[int, ...]
    max_tokens: int
    stop: tuple[str, ...]  # strings that end it and are not part of it
    sampling: tuple[float, int, float, float]  # as Sampling has it: temperature, top_k, top_p, min_p
    number: int  # of equal requests with sampling: each number is another text


class Answers:
    """Answers of one model, kept in a Work."""

    def __init__(self, subject: Subject, work: Work):
        """Args: subject: its mesh is the current one; work: open on all processes."""
        self._subject, self._work = subject, work
        self._computing = False

    def led(self, lead: Callable[[], Any]) -> Any:
        """Returns what lead() gives on process 0, where alone it runs, and where alone it may call scores and texts.

        The value must go through JSON. The other processes compute along until lead() is done.

        Raises:
            RunError: on the other processes, when lead() raises.
        """
        if not distributed.speaks():
            return self._follow()
        try:
            found = lead()
        except Exception as error:
            # An error within a batch is every process's own.
            if not self._computing:
                told(json.dumps({"failed": str(error)}))
            raise
        return json.loads(told(json.dumps({"done": found})))["done"]

    def scores(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Log-likelihood of each request's continuation, in nats, and whether greedy decoding would write it."""
        keyed = {_key("score", request): request for request in requests}
        order = {key: ((), len(one.context) + len(one.continuation) - 1) for key, one in keyed.items()}
        self._answer("scores", keyed, order, "log-likelihoods")
        return [tuple(self._work.get(_key("score", request))) for request in requests]

    def texts(self, requests: Sequence[Writing]) -> list[str]:
        """What the model writes after each request's context."""
        keyed = {_key("text", request): request for request in requests}
        # Requests of a batch differ in their contexts only: then a row's random numbers are its own (row_keys).
        order = {key: (one[1:], round_up(len(one.context)) + one.max_tokens) for key, one in keyed.items()}
        self._answer("texts", keyed, order, "generations")
        return [self._work.get(_key("text", request)) for request in requests]

    def _answer(self, kind: str, keyed: Mapping[str, Any], order: Mapping[str, tuple[tuple, int]], what: str) -> None:
        """Computes all that is missing.

        What shares a batch does not depend on what is there already, so that an interrupted evaluation gives the same
        numbers to the last digit; a batch of which something is missing is computed whole.
        """
        batches = self._batches(order)
        there = [all(key in self._work for key in batch) for batch in batches]
        done = sum(len(batch) for batch, whole in zip(batches, there) if whole)
        with bar((), what, "requests", total=len(keyed), done=done) as shown:
            for batch in (batch for batch, whole in zip(batches, there) if not whole):
                self._tell_and_compute(kind, batch, [keyed[key] for key in batch])
                shown.update(len(batch))

    def _batches(self, order: Mapping[str, tuple[tuple, int]]) -> list[list[str]]:
        """Cuts requests, given as (kind, tokens), into batches of one kind, the longest first; in whatever order they came."""
        mesh, batches = jax.sharding.get_mesh(), []
        keys = sorted(order, key=lambda key: (repr(order[key][0]), -order[key][1], key))
        for _, group in itertools.groupby(keys, lambda key: order[key][0]):
            left, at = list(group), 0
            while at < len(left):
                rows = self._subject.scorer.rows(mesh, round_up(order[left[at]][1]))
                batches.append(left[at : at + rows])
                at += rows
        return batches

    def _tell_and_compute(self, kind: str, keys: Sequence[str], requests: Sequence[Any]) -> None:
        message = json.loads(told(json.dumps({kind: requests, "keys": keys})))
        self._computing = True
        self._compute(message)
        self._computing = False

    def _follow(self) -> Any:
        """Computes what process 0 tells until it is done; returns what came of it."""
        while True:
            message = json.loads(told(""))
            if "failed" in message:
                raise RunError(message["failed"])
            if "done" in message:
                return message["done"]
            self._compute(message)

    def _compute(self, message: Mapping[str, Any]) -> None:
        """Computes a batch on all processes, and keeps its answers."""
        keys = message["keys"]
        if "scores" in message:
            subject, requests = self._subject, [Request(*request) for request in message["scores"]]
            for i, scored in subject.scorer(subject.model, requests):
                self._work.put(keys[i], total(scored))
        else:
            for key, text in zip(keys, self._written([Writing(*request) for request in message["texts"]])):
                self._work.put(key, text)

    def _written(self, requests: Sequence[Writing]) -> list[str]:
        """Writes a batch of texts that differ in their contexts only."""
        _, max_tokens, stop, sampling, number = requests[0]
        settings = dict(
            max_tokens=max_tokens,
            sampling=Sampling(*sampling),
            seed=int(_key("seed", [self._subject.settings.seed, number])[:7], 16),
            stop=stop,
            message=True,  # decoded by itself, as in `hf`
        )
        mesh, weights = self._decoding
        with jax.transfer_guard("allow"), jax.set_mesh(mesh):
            contexts = [request.context for request in requests]
            return [one.text for one in generate(weights, self._subject.tokenizer, contexts, **settings)]

    @functools.cached_property
    def _decoding(self) -> tuple[Mesh, Prepared | Mixtral]:
        """Where texts are written, and with what."""
        mesh = self._subject.mesh
        if mesh.shape["context"] == 1:
            return mesh, self._subject.decoder
        # One token at a time has no T to split; the weights lie on the other mesh as on this one.
        mesh = without_context(mesh)
        return mesh, moved(self._subject.model, mesh)


def sampling_of(settings: Mapping[str, Any]) -> tuple[float, int, float, float]:
    """A request's sampling from the harness's names for it, which are transformers'.

    Raises:
        UserError: a setting that has no counterpart, or a value that means nothing.
    """
    known = {"do_sample", "temperature", "top_k", "top_p", "min_p"}
    for name, value in settings.items():
        if name not in known and value not in (None, False) and (name, value) not in _NO_CHANGE:
            raise UserError(
                f"generation_kwargs has {name}={value}; known are until, max_gen_toks, {', '.join(sorted(known))}"
            )
    if not settings.get("do_sample") or not settings.get("temperature"):
        return (0.0, 0, 1.0, 0.0)
    found = Sampling(
        float(settings["temperature"]),
        int(settings.get("top_k") or 0),
        float(settings.get("top_p") or 1.0),
        float(settings.get("min_p") or 0.0),
    )
    return (found.temperature, found.top_k, found.top_p, found.min_p)


_NO_CHANGE = {("num_beams", 1), ("repetition_penalty", 1.0), ("num_return_sequences", 1), ("use_cache", True)}


def _key(kind: str, request: Any) -> str:
    """The name of an answer: a hash of all that decides it but the model and the seed."""
    return hashlib.sha256(json.dumps([kind, request]).encode()).hexdigest()[:32]
