"""The vision encoder of LLaVA 1.5 (Liu et al. 2023): a CLIP image tower and an MLP of two layers.

The decoder beside them is `models/policy.py`.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from grape_jax.models import clip
from grape_jax.models.encoder import ACTIVATIONS, Params, Tower, dense


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """Architecture of tower and connector, as in transformers' config.json."""

    tower: Tower  # as many layers as are read: the states of one of the last are the output
    image_size: int  # pixels, square
    patch: int  # pixels, square
    class_token: bool  # whether the state of the class token is a feature
    activation: str  # of the connector, a key of ACTIVATIONS
    bias: bool  # of the connector
    width: int  # D, of the decoder

    @property
    def features(self) -> int:
        """Features of one picture."""
        return (self.image_size // self.patch) ** 2 + self.class_token


class VisionEncoder(nn.Module):
    """Pixels `[N, H, W, 3]` to features `[N, features, D]`."""

    config: LlavaConfig

    @nn.compact
    def __call__(self, pixels_NxHxWx3: jax.Array) -> jax.Array:
        c = self.config
        x_NxLxD = ClipTower(c, name="tower")(pixels_NxHxWx3)
        up = dense(c.width, ("embed", "mlp"), "up", use_bias=c.bias)
        down = dense(c.width, ("mlp", "embed"), "down", use_bias=c.bias)
        return down(ACTIVATIONS[c.activation](up(x_NxLxD)))


class ClipTower(nn.Module):
    """Pixels `[N, H, W, 3]` to states of the patches `[N, features, tower.width]`."""

    config: LlavaConfig

    @nn.compact
    def __call__(self, pixels_NxHxWx3: jax.Array) -> jax.Array:
        c = self.config
        x_NxLxD = clip.image_states(self, c.tower, c.image_size, c.patch, pixels_NxHxWx3)
        return x_NxLxD if c.class_token else x_NxLxD[:, 1:]


def init(config: LlavaConfig, key: jax.Array) -> Params:
    """Random float32 parameters, boxed with their logical axes."""
    pixels = jnp.zeros((1, config.image_size, config.image_size, 3))
    return VisionEncoder(config).init(key, pixels)["params"]
