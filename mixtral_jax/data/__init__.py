"""Text to batches: sources, tokenizers, the token cache, the packing plan and the loader. NumPy only, no JAX."""

from mixtral_jax.data.cache import Corpus, Source, TokenFile, build_cache
from mixtral_jax.data.loader import Batches, prefetch
from mixtral_jax.data.packing import Plan, pack
from mixtral_jax.data.text import Document, documents, is_heldout
from mixtral_jax.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

open_corpus = build_cache

__all__ = [
    "Batches",
    "Corpus",
    "Document",
    "Plan",
    "Source",
    "TokenFile",
    "Tokenizer",
    "build_cache",
    "documents",
    "is_heldout",
    "load_tokenizer",
    "open_corpus",
    "pack",
    "prefetch",
    "train_sentencepiece",
]
