"""Text from a model: `generate` for whole texts, `stream` for pieces as they come, `reply` for a conversation's next
answer, `sample` for training's samples."""

from mixtral_jax.generate.chat import encode_chat, reply
from mixtral_jax.generate.engine import Continuation, generate, sample, stream
from mixtral_jax.generate.sampling import Sampling

__all__ = ["Continuation", "Sampling", "encode_chat", "generate", "reply", "sample", "stream"]
