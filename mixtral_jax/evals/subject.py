"""A model under evaluation, with all that an evaluation may ask for."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from mixtral_jax.config import Config
from mixtral_jax.data import Corpus
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.evals.scorer import Scorer
from mixtral_jax.evals.settings import Settings
from mixtral_jax.evals.work import Work, key_of
from mixtral_jax.fingerprint import fingerprints
from mixtral_jax.models.decode import Prepared, prepare
from mixtral_jax.models.mixtral import Mixtral


@dataclasses.dataclass(frozen=True)
class Subject:
    """What an evaluation is given. Its mesh is the current one (`jax.set_mesh`) while evaluations run."""

    name: str  # in words: whose results these are
    config: Config  # for the devices here, of a model whose adapters are merged
    model: Mixtral
    mesh: Mesh
    tokenizer: Tokenizer
    settings: Settings
    open_corpus: Callable[[], Corpus]  # the run's own
    note: Callable[[str], None]  # shows a line to the user
    meta: dict = dataclasses.field(default_factory=dict)  # what the checkpoint notes, see load.stored_meta
    folder: Path | None = None  # where finished pieces are kept; None: nowhere
    own_text: bool = True  # False: what it was trained on is not known, as of files of others
    spare_memory: bool = False  # generate from the training layout, slower and without a second copy of the weights

    @functools.cached_property
    def corpus(self) -> Corpus:
        """The text that the run was trained on, and what it held out."""
        return self.open_corpus()

    @functools.cached_property
    def key(self) -> str:
        """Whose answers these are: a hash of the weights' bits, the model's shape and the tokenizer."""
        # How a model is computed is not who it is: an interrupted evaluation may go on with another kernel or mesh.
        shape = {
            name: value
            for name, value in self.config.to_dict()["model"].items()
            if name not in ("attention", "expert_backend", "dispatch", "expert_block", "remat", "scan_layers")
        }
        weights = fingerprints(self.model)
        return key_of({"weights": weights, "model": shape, "tokenizer": self.tokenizer.fingerprint})

    @functools.cached_property
    def scorer(self) -> Scorer:
        """Scores continuations with the model: `subject.scorer(subject.model, requests)`."""
        return Scorer(self.config, self.settings.batch_tokens)

    @functools.cached_property
    def decoder(self) -> Prepared | Mixtral:
        """The weights laid out for generation: a second copy of them, made when first asked for, unless memory is spared."""
        return self.model if self.spare_memory else prepare(self.model)

    @property
    def longest(self) -> int:
        """Tokens that the model can read."""
        return self.config.model.max_seq_len

    @property
    def window(self) -> int:
        """Tokens of a text that are read at once."""
        return min(self.settings.window or self.config.train.seq_len, self.longest)

    def work(self, name: str, /, **what: Any) -> Work:
        """Opens what is finished of an evaluation of this model; `what` is everything else that decides its results."""
        return Work(self.folder, name, key_of({"subject": self.key, "seed": self.settings.seed} | what))
