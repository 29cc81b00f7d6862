"""mixtral_jax: the Mixtral stack in JAX."""

__version__ = "0.1.0"
