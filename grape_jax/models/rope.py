"""Rotary position embedding (Su et al. 2021) with the scalings that real checkpoints ask for."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("linear", "dynamic", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a model reads positions beyond those of its pretraining."""

    kind: str  # one of KINDS
    factor: float  # how much longer the context becomes
    original_length: int = 0  # positions of the pretraining; llama3, yarn
    low_frequency: float = 1.0  # rotations in the original length: fewer are stretched; llama3
    high_frequency: float = 4.0  # more are left alone; llama3
    beta_fast: float = 32.0  # as high_frequency; yarn
    beta_slow: float = 1.0  # as low_frequency; yarn
    truncate: bool = True  # the ramp's ends rounded outwards to whole dimensions; yarn
    attention_factor: float = 1.0  # on queries and keys; yarn


def rotate(
    x_BxNxHxd: jax.Array,
    positions_BxN: jax.Array,
    theta: float,
    scaling: RopeScaling | None = None,
    max_length: int = 0,
) -> jax.Array:
    """Rotates queries or keys, halves convention (as in Llama's Hugging Face layout).

    Args:
      max_length: positions up to which "dynamic" scaling changes nothing. A row that goes further
        is rotated by frequencies for its own length.
    """
    d = x_BxNxHxd.shape[-1]
    if scaling is not None and scaling.kind == "dynamic":
        length_Bx1 = positions_BxN.max(axis=-1, keepdims=True) + 1
        frequencies = dynamic_frequencies(d, theta, scaling.factor, length_Bx1, max_length)
    else:
        frequencies = jnp.asarray(scaled_frequencies(d, theta, scaling), jnp.float32)
    angles = positions_BxN[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    if scaling is not None and scaling.attention_factor != 1:
        cos, sin = cos * scaling.attention_factor, sin * scaling.attention_factor
    cos, sin = cos.astype(x_BxNxHxd.dtype), sin.astype(x_BxNxHxd.dtype)
    a, b = x_BxNxHxd[..., : d // 2], x_BxNxHxd[..., d // 2 :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def scaled_frequencies(d: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians a position for each of d / 2 pairs, for every kind but "dynamic"."""
    frequencies = theta ** (-np.arange(0, d, 2, dtype=np.float64) / d)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    stretched = _stretched_llama3 if scaling.kind == "llama3" else _stretched_yarn
    weight = stretched(frequencies, theta, scaling)
    return frequencies * (1 - weight) + frequencies / scaling.factor * weight


def dynamic_frequencies(
    d: int, theta: float, factor: float, length: jax.Array, max_length: int
) -> jax.Array:
    """Frequencies for a sequence of `length`: a larger base past the context.

    Source: "dynamic NTK" scaling, as transformers computes it for a whole sequence.

    Returns:
      `[..., d / 2]` for lengths `[...]`.
    """
    growth = factor * jnp.maximum(length, max_length) / max_length - (factor - 1)
    base = theta * growth[..., None] ** (d / (d - 2))
    return base ** (-jnp.arange(0, d, 2, dtype=jnp.float32) / d)


def _stretched_llama3(frequencies: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    """1 for slow pairs, which are stretched, 0 for fast ones (Llama 3.1)."""
    rotations = scaling.original_length * frequencies / (2 * math.pi)
    width = scaling.high_frequency - scaling.low_frequency
    return 1 - np.clip((rotations - scaling.low_frequency) / width, 0, 1)


def _stretched_yarn(frequencies: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    """1 for slow pairs, 0 for fast ones, a ramp over the pairs between (Peng et al. 2023)."""
    pairs = len(frequencies)

    def pair_with(rotations: float) -> float:
        wavelength = scaling.original_length / (rotations * 2 * math.pi)
        return pairs * math.log(wavelength) / math.log(theta)

    low, high = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    # A ramp of no width is a step.
    return np.clip((np.arange(pairs) - low) / ((high - low) or 1e-3), 0, 1)
