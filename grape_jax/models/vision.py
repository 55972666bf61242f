"""Image features of a policy that sees, for all families, selected by the type of the config.

The config is static under jit, so that the selection happens at compilation.
"""

import functools
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grape_jax.models import idefics3, llava
from grape_jax.models.encoder import Params
from grape_jax.models.idefics3 import Idefics3Config
from grape_jax.models.llava import LlavaConfig
from grape_jax.models.towers import gather
from grape_jax.runtime import sharding

VisionConfig = LlavaConfig | Idefics3Config


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def features(
    config: VisionConfig, params: Params, pixels_BxPxHxWx3: jax.Array, *, mesh: Mesh | None = None
) -> jax.Array:
    """Features of the pictures of B prompts, in the dtype of the parameters.

    One tile of each prompt is computed at a time, which bounds the memory of attention.

    Args:
      pixels_BxPxHxWx3: float32, P tiles a prompt, from a `PictureProcessor`.
      mesh: over which the parameters are sharded; gathered for use, so that features have the same
        bits on every mesh. None: not sharded.

    Returns:
      `[B, I, D]`, tile by tile: I = P * config.features.
    """
    params = gather(params, mesh)
    batch = lambda x: sharding.constrain(mesh, x, "batch", *[None] * (x.ndim - 1))

    def one_tile(pixels_BxHxWx3: jax.Array) -> jax.Array:
        return batch(_eyes(config).apply({"params": params}, batch(pixels_BxHxWx3)))

    tiles_PxBxFxD = jax.lax.map(one_tile, jnp.moveaxis(pixels_BxPxHxWx3, 1, 0))
    B, D = pixels_BxPxHxWx3.shape[0], tiles_PxBxFxD.shape[-1]
    return batch(jnp.moveaxis(tiles_PxBxFxD, 0, 1).reshape(B, -1, D))


def shapes(config: VisionConfig) -> Params:
    """Shapes of the parameters, boxed with their logical axes."""
    key = jax.random.key(0)
    match config:
        case LlavaConfig():
            return jax.eval_shape(lambda: llava.init(config, key))
        case Idefics3Config():
            return jax.eval_shape(lambda: idefics3.init(config, key))


def shardings(config: VisionConfig, mesh: Mesh) -> Params:
    """Shardings of the parameters on a mesh."""
    return cast(Params, sharding.of_parameters(mesh, shapes(config)))


def _eyes(config: VisionConfig) -> nn.Module:
    match config:
        case LlavaConfig():
            return llava.Eyes(config)
        case Idefics3Config():
            return idefics3.Eyes(config)
