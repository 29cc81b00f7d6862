"""Texts that continue many contexts, in batches of like lengths, on any mesh."""

from collections.abc import Iterator, Sequence

import jax

from mixtral_jax.evals.subject import Subject
from mixtral_jax.generate import Continuation, Sampling, generate
from mixtral_jax.generate.engine import round_up
from mixtral_jax.sharding import moved, without_context


class Writer:
    """Continues contexts; what shares a context's batch changes nothing."""

    def __init__(self, subject: Subject, fast: bool):
        """Args: subject: whose current mesh it is; fast: for many tokens, at the price of a second copy of the weights."""
        self._subject, self._mesh = subject, jax.sharding.get_mesh()
        if self._mesh.shape["context"] > 1:
            # One token at a time has no T to split; the weights lie on the other mesh as on this one.
            self._mesh = without_context(self._mesh)
            self._weights = moved(subject.model, self._mesh)
        else:
            self._weights = subject.decoder if fast else subject.model

    def __call__(
        self,
        contexts: Sequence[Sequence[int]],
        rooms: Sequence[int],
        sampling: Sampling | None = None,
        message: bool = False,
    ) -> Iterator[tuple[int, Continuation]]:
        """Continues all contexts.

        Args:
            contexts: token ids, at least one each.
            rooms: tokens of each continuation, at most. Equal ones share a batch.
            sampling, message: see generate.stream. The seed is the settings'.

        Yields:
            (number of the context, Continuation), those of the longest rooms and contexts first, each once; on all processes
            the same. Whoever stops early has what was yielded.

        Raises:
            UserError: a context and its room exceed the model's max_seq_len.
        """
        order = sorted(range(len(contexts)), key=lambda i: (-rooms[i], -len(contexts[i]), i))
        while order:
            room = rooms[order[0]]
            rows = self._subject.scorer.rows(self._mesh, round_up(len(contexts[order[0]]) + room))
            picked = [i for i in order[:rows] if rooms[i] == room]
            order = order[len(picked) :]
            batch = [list(contexts[i]) for i in picked]
            yield from zip(picked, self._write(batch, rows, room, sampling, message))

    def _write(self, batch: list[list[int]], rows: int, room: int, sampling, message: bool) -> list[Continuation]:
        """Continues one batch."""
        full = batch
        if sampling is None or sampling.temperature == 0:
            # A smaller batch is filled up, so that all of a width share one compilation. Copies end where the original does, as long as
            # nothing is drawn.
            full = batch + batch[-1:] * (rows - len(batch))
        with jax.transfer_guard("allow"), jax.set_mesh(self._mesh):
            found = generate(
                self._weights,
                self._subject.tokenizer,
                full,
                max_tokens=room,
                sampling=sampling,
                seed=self._subject.settings.seed,
                message=message,
            )
        return found[: len(batch)]
