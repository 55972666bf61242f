"""Rotary position embedding (Su et al. 2021), with the scalings of published checkpoints."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("linear", "dynamic", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of positions beyond the context of pretraining."""

    kind: str  # one of KINDS
    factor: float  # extension of the context
    original_length: int = 0  # context of the pretraining; llama3, yarn
    low_frequency: float = 1.0  # pairs with fewer rotations in it are scaled fully; llama3
    high_frequency: float = 4.0  # pairs with more rotations in it are not scaled; llama3
    beta_fast: float = 32.0  # as high_frequency; yarn
    beta_slow: float = 1.0  # as low_frequency; yarn
    truncate: bool = True  # round the ramp's ends outwards to whole dimensions; yarn
    attention_factor: float = 1.0  # multiplies queries and keys; yarn


def rotate(
    x_BxNxHxd: jax.Array,
    positions_BxN: jax.Array,
    theta: float,
    scaling: RopeScaling | None = None,
    max_length: int = 0,
    axes: tuple[int, ...] | None = None,
) -> jax.Array:
    """Rotates queries or keys; pairs are i and i + d/2, as in transformers' Llama.

    Args:
      x_BxNxHxd: queries or keys.
      positions_BxN: int32; with `axes` also `[B, N, 3]`, the time, row and column of a token
        (M-RoPE, Wang et al. 2024).
      max_length: length up to which "dynamic" scaling changes nothing; a longer row is rotated with
        frequencies for its own length.
      axes: which of the three positions turns each pair; None: there is one position.

    Returns:
      `[B, N, H, d]`.
    """
    d = x_BxNxHxd.shape[-1]
    if scaling is not None and scaling.kind == "dynamic":
        length_Bx1 = positions_BxN.max(axis=-1, keepdims=True) + 1
        frequencies = dynamic_frequencies(d, theta, scaling.factor, length_Bx1, max_length)
    else:
        frequencies = jnp.asarray(scaled_frequencies(d, theta, scaling), jnp.float32)
    if positions_BxN.ndim == 3:
        positions = positions_BxN[..., np.asarray(axes)]
    else:
        positions = positions_BxN[..., None]
    return turn(
        x_BxNxHxd,
        positions.astype(jnp.float32) * frequencies,
        1.0 if scaling is None else scaling.attention_factor,
    )


def turn(x: jax.Array, angles: jax.Array, factor: float = 1.0) -> jax.Array:
    """Turns the pairs i and i + d/2 of `[..., H, d]` by float32 angles `[..., d / 2]`."""
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    if factor != 1:
        cos, sin = cos * factor, sin * factor
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def scaled_frequencies(d: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Frequencies of the pairs for all kinds of scaling but "dynamic".

    Returns:
      float64 `[d / 2]`, radians per position (NumPy).
    """
    frequencies = theta ** (-np.arange(0, d, 2, dtype=np.float64) / d)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    scaled_share = _scaled_share_llama3 if scaling.kind == "llama3" else _scaled_share_yarn
    weight = scaled_share(frequencies, theta, scaling)
    return frequencies * (1 - weight) + frequencies / scaling.factor * weight


def dynamic_frequencies(
    d: int, theta: float, factor: float, length: jax.Array, max_length: int
) -> jax.Array:
    """Frequencies for sequences beyond the context, with a larger base.

    Source: "dynamic NTK" scaling, as transformers computes it for a whole sequence.

    Args:
      factor: of the scaling.
      length: int32 `[...]`, lengths of the sequences.
      max_length: the context.

    Returns:
      float32 `[..., d / 2]`, radians per position.
    """
    growth = factor * jnp.maximum(length, max_length) / max_length - (factor - 1)
    base = theta * growth[..., None] ** (d / (d - 2))
    return base ** (-jnp.arange(0, d, 2, dtype=jnp.float32) / d)


def _scaled_share_llama3(frequencies: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    """1 for slow pairs, which are scaled, 0 for fast ones, a ramp between (Llama 3.1)."""
    rotations = scaling.original_length * frequencies / (2 * math.pi)
    width = scaling.high_frequency - scaling.low_frequency
    return 1 - np.clip((rotations - scaling.low_frequency) / width, 0, 1)


def _scaled_share_yarn(frequencies: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    """1 for slow pairs, which are scaled, 0 for fast ones, a ramp between (Peng et al. 2023)."""
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
