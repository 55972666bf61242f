"""The vision encoder of Idefics3 and SmolVLM (Laurençon et al. 2024, Marafioti et al. 2025).

A SigLIP image tower without head, a pixel shuffle, and one linear connector. A large picture is
read as several tiles and a small copy of the whole, each a picture of its own here. The decoder
beside them is `models/policy.py`.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from grape_jax.models import siglip
from grape_jax.models.encoder import Params, Tower, dense


@dataclasses.dataclass(frozen=True)
class Idefics3Config:
    """Architecture of tower and connector, as in transformers' config.json."""

    tower: Tower
    image_size: int  # pixels of a tile, square
    patch: int  # pixels, square
    shuffle: int  # patches along each side that become one feature
    width: int  # D, of the decoder

    @property
    def features(self) -> int:
        """Features of one tile."""
        return (self.image_size // self.patch // self.shuffle) ** 2


class VisionEncoder(nn.Module):
    """Pixels `[N, H, W, 3]` to features `[N, features, D]`."""

    config: Idefics3Config

    @nn.compact
    def __call__(self, pixels_NxHxWx3: jax.Array) -> jax.Array:
        c = self.config
        x_NxLxD = SiglipTower(c, name="tower")(pixels_NxHxWx3)
        shuffled = pixel_shuffle(x_NxLxD, c.shuffle)
        return dense(c.width, ("embed", "mlp"), "connector", use_bias=False)(shuffled)


class SiglipTower(nn.Module):
    """Pixels `[N, H, W, 3]` to normed states of the patches `[N, L, tower.width]`."""

    config: Idefics3Config

    @nn.compact
    def __call__(self, pixels_NxHxWx3: jax.Array) -> jax.Array:
        c = self.config
        # transformers finds the row of a patch in the position table by float32 fractions. For the
        # sizes of published models (26, 27 and 32 patches a side) these are the rows in order.
        return siglip.image_states(self, c.tower, c.image_size, c.patch, pixels_NxHxWx3)


def pixel_shuffle(x_NxLxD: jax.Array, side: int) -> jax.Array:
    """Joins squares of `side` x `side` patches: `[N, L, D]` to `[N, L / side^2, side^2 * D]`."""
    n, length, width = x_NxLxD.shape
    rows = round(length**0.5) // side
    x = x_NxLxD.reshape(n, rows, side, rows, side, width).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, rows * rows, side * side * width)


def init(config: Idefics3Config, key: jax.Array) -> Params:
    """Random float32 parameters, boxed with their logical axes."""
    pixels = jnp.zeros((1, config.image_size, config.image_size, 3))
    return VisionEncoder(config).init(key, pixels)["params"]
