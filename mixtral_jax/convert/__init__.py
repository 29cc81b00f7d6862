"""Weights in and out: Hugging Face and Mistral directories <-> our checkpoints. `python -m mixtral_jax.convert --help`.

Everything is streamed in blocks of a tensor (`layout.Block`), so memory does not grow with the model.
"""
