"""Text to batches: sources, tokenizers, the token cache, packing, mixtures, streams. NumPy only, no JAX."""

from mixtral_jax.data.batch import Batch
from mixtral_jax.data.cache import Corpus, Source, TokenFile, build_cache
from mixtral_jax.data.chat import encode_chat, encode_conversation
from mixtral_jax.data.chat_corpus import open_chat_corpus
from mixtral_jax.data.corpus import first_documents, open_batches, open_corpus, stream_corpus
from mixtral_jax.data.loader import Batches
from mixtral_jax.data.mixture import Mixture, Schedule, Usage
from mixtral_jax.data.packing import Plan, pack, pack_pairs
from mixtral_jax.data.prefetch import prefetch
from mixtral_jax.data.text import Document, documents, is_heldout
from mixtral_jax.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from mixtral_jax.data.windows import StreamedBatches

__all__ = [
    "Batch",
    "Batches",
    "Corpus",
    "Document",
    "Mixture",
    "Plan",
    "Schedule",
    "Source",
    "StreamedBatches",
    "TokenFile",
    "Tokenizer",
    "Usage",
    "build_cache",
    "documents",
    "encode_chat",
    "encode_conversation",
    "first_documents",
    "is_heldout",
    "load_tokenizer",
    "open_batches",
    "open_chat_corpus",
    "open_corpus",
    "pack",
    "pack_pairs",
    "prefetch",
    "stream_corpus",
    "train_sentencepiece",
]
