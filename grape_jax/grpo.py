"""Group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300). Arrays only."""

import jax
import jax.numpy as jnp

ADVANTAGE_EPS = 1e-4  # as in TRL


def advantages(reward_BxK: jax.Array, scale: str = "group") -> jax.Array:
    """Rewards centred inside their group; divided by the group's std (ddof 1) for `group`.

    `none` leaves the scale (Liu et al. 2025, Dr. GRPO): groups that differ more weigh more.
    """
    centred = reward_BxK - reward_BxK.mean(axis=1, keepdims=True)
    if scale == "none":
        return centred
    if scale == "group":
        return centred / (reward_BxK.std(axis=1, ddof=1, keepdims=True) + ADVANTAGE_EPS)
    raise ValueError(f"unknown advantage scale {scale!r}")


def kl_to_reference(logprobs: jax.Array, reference: jax.Array) -> jax.Array:
    """Per-token estimate of KL(policy, reference): k3 of Schulman (2020), never negative."""
    log_ratio = reference - logprobs
    return jnp.exp(log_ratio) - log_ratio - 1


def clipped_objective(
    logprobs_BxKxT: jax.Array,
    old_logprobs_BxKxT: jax.Array,
    advantages_BxK: jax.Array,
    clip_low: float,
    clip_high: float,
) -> tuple[jax.Array, jax.Array]:
    """Per-token clipped surrogate, to be maximised, and whether the clip was active."""
    ratio = jnp.exp(logprobs_BxKxT - old_logprobs_BxKxT)
    gain = ratio * advantages_BxK[..., None]
    clipped_gain = jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages_BxK[..., None]
    return jnp.minimum(gain, clipped_gain), clipped_gain < gain


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over all tokens that count, whichever sequence they are in (DAPO's aggregation)."""
    return jnp.sum(x * mask) / jnp.maximum(jnp.sum(mask), 1)
