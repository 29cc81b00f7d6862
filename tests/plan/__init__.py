"""Plans; most of them of a node of eight GPUs, for which eight fake CPU devices stand in."""

from mixtral_jax.plan import chips

NODE = chips.parse_topology("h100:1x8")
