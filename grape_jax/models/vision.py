"""Image features of a vision-language policy, for all families, selected by the type of the config.

The config is static under jit, so that the selection happens at compilation.
"""

import functools
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grape_jax.models import idefics3, llava, qwen_vision
from grape_jax.models.encoder import Params
from grape_jax.models.idefics3 import Idefics3Config
from grape_jax.models.llava import LlavaConfig
from grape_jax.models.qwen_vision import QwenVisionConfig
from grape_jax.models.towers import gather
from grape_jax.runtime import sharding

VisionConfig = LlavaConfig | Idefics3Config | QwenVisionConfig


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def features(
    config: VisionConfig, params: Params, pixels: Any, *, mesh: Mesh | None = None
) -> jax.Array:
    """Features of the pictures of B prompts, in the dtype of the parameters.

    One tile of each prompt is computed at a time, which bounds the memory of attention.

    Args:
      pixels: from a `PictureProcessor`: float32 `[B, P, H, W, 3]`, P tiles a prompt, or
        `qwen_vision.Patches`.
      mesh: over which the parameters are sharded; gathered for use, so that features have the same
        bits on every mesh. None: not sharded.

    Returns:
      `[B, I, D]`, in the order of the image tokens.
    """
    params = gather(params, mesh)
    batch = lambda x: sharding.constrain(mesh, x, "batch", *[None] * (x.ndim - 1))

    def see(pixels: Any) -> jax.Array:
        seen: Any = _encoder(config).apply({"params": params}, jax.tree.map(batch, pixels))
        return batch(seen)

    if isinstance(config, QwenVisionConfig):
        return see(pixels)
    tiles_PxBxFxD = jax.lax.map(see, jnp.moveaxis(pixels, 1, 0))
    B, D = len(pixels), tiles_PxBxFxD.shape[-1]
    return batch(jnp.moveaxis(tiles_PxBxFxD, 0, 1).reshape(B, -1, D))


def shapes(config: VisionConfig) -> Params:
    """Shapes of the parameters, boxed with their logical axes."""
    key = jax.random.key(0)
    match config:
        case LlavaConfig():
            return jax.eval_shape(lambda: llava.init(config, key))
        case Idefics3Config():
            return jax.eval_shape(lambda: idefics3.init(config, key))
        case QwenVisionConfig():
            return jax.eval_shape(lambda: qwen_vision.init(config, key))


def empty(config: VisionConfig, prompts: int, parts: int, features: int) -> Any:
    """Padding in place of the pictures of `prompts` prompts (NumPy), as `features` takes it.

    Args:
      parts: tiles or windows.
      features: I.
    """
    if isinstance(config, QwenVisionConfig):
        return qwen_vision.empty(config, prompts, parts, features)
    return np.zeros((prompts, parts, config.image_size, config.image_size, 3), np.float32)


def shardings(config: VisionConfig, mesh: Mesh) -> Params:
    """Shardings of the parameters on a mesh."""
    return cast(Params, sharding.of_parameters(mesh, shapes(config)))


def _encoder(config: VisionConfig) -> nn.Module:
    match config:
        case LlavaConfig():
            return llava.VisionEncoder(config)
        case Idefics3Config():
            return idefics3.VisionEncoder(config)
        case QwenVisionConfig():
            return qwen_vision.VisionEncoder(config)
