"""From ranks and well-formedness to one reward a rewrite. Arrays only.

The paper's reward is linear in the rank (arXiv 2509.23370); the others stress the top.
"""

import jax
import jax.numpy as jnp

SHAPES = ("linear", "log", "reciprocal")


def rank_reward(rank: jax.Array, size: int, shape: str) -> jax.Array:
    """Maps ranks 1..size to rewards 1..0 (`reciprocal`: 1..1/size). float32, same shape."""
    rank = rank.astype(jnp.float32)
    if shape == "linear":
        return 1 - (rank - 1) / max(1, size - 1)
    if shape == "log":
        return 1 - jnp.log(rank) / jnp.log(max(2, size))
    if shape == "reciprocal":
        return 1 / rank
    raise ValueError(f"unknown reward shape {shape!r}")


def combine(
    rank_reward_BxK: jax.Array, well_formed_BxK: jax.Array, format_weight: float
) -> jax.Array:
    """Rank reward plus weighted format reward; a malformed answer gets neither.

    The gate is ours: without it an answer that rambles past its budget would still be paid for the
    words that happened to be read.
    """
    return jnp.where(well_formed_BxK, rank_reward_BxK + format_weight, 0.0)
