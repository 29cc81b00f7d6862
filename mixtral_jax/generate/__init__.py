"""Text from a model: `generate` for whole texts, `stream` for pieces as they come, `sample` for training's samples."""

from mixtral_jax.generate.engine import Continuation, generate, sample, stream
from mixtral_jax.generate.sampling import Sampling

__all__ = ["Continuation", "Sampling", "generate", "sample", "stream"]
