"""CLIP's two towers, as transformers' `CLIPModel` computes them (Radford et al. 2021).

Text: a causal transformer, pooled at the end token. Images: a ViT, pooled at the class token. Both
end in a projection to one shared space, normalised to unit length. `embed_texts` and `embed_images`
are pure functions, which may run inside a jitted training step.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from grape_jax.models.encoder import (
    Params,
    Tower,
    dense,
    layers,
    norm,
    patchify,
    table,
    unit_length,
    vector,
)

# With this end token in the config, transformers pools at the largest token id of a text.
LEGACY_END_TOKEN = 2


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Architecture of a CLIP, as in transformers' config.json."""

    text: Tower
    vision: Tower
    vocab: int
    context: int  # text positions, start and end tokens included
    end_token: int
    image_size: int  # pixels, square
    patch: int  # pixels, square
    projection: int  # E, width of the shared space
    logit_scale: float = math.log(1 / 0.07)  # initial value, natural logarithm


def init(config: ClipConfig, key: jax.Array) -> Params:
    """Random float32 parameters, boxed with their logical axes."""
    text_key, vision_key = jax.random.split(key)
    tokens_1xL = jnp.zeros((1, config.context), jnp.int32)
    pixels = jnp.zeros((1, config.image_size, config.image_size, 3), jnp.float32)
    text = TextTower(config).init(text_key, tokens_1xL, tokens_1xL == 0)
    vision = VisionTower(config).init(vision_key, pixels)
    scale = jnp.asarray(config.logit_scale, jnp.float32)
    return {"text": text["params"], "vision": vision["params"], "logit_scale": scale}


def embed_texts(
    config: ClipConfig, params: Params, tokens_NxL: jax.Array, mask_NxL: jax.Array
) -> jax.Array:
    """Embeds texts.

    Args:
      tokens_NxL: int32, start token first, end token last, then padding; L <= config.context.
      mask_NxL: bool, False on padding.

    Returns:
      float32 `[N, E]` of unit length.
    """
    raw_NxE: Any = TextTower(config).apply({"params": params["text"]}, tokens_NxL, mask_NxL)
    return unit_length(raw_NxE)


def embed_images(config: ClipConfig, params: Params, pixels_NxHxWx3: jax.Array) -> jax.Array:
    """Embeds images.

    Args:
      pixels_NxHxWx3: float32, H = W = config.image_size, normalised with the checkpoint's mean and
        standard deviation.

    Returns:
      float32 `[N, E]` of unit length.
    """
    raw_NxE: Any = VisionTower(config).apply({"params": params["vision"]}, pixels_NxHxWx3)
    return unit_length(raw_NxE)


class TextTower(nn.Module):
    """Token ids and mask `[N, L]` to projected states of the end tokens, `[N, E]`."""

    config: ClipConfig

    @nn.compact
    def __call__(self, tokens_NxL: jax.Array, mask_NxL: jax.Array) -> jax.Array:
        config, tower = self.config, self.config.text
        length = tokens_NxL.shape[1]
        token_VxD = table(self, "token_embedding", (config.vocab, tower.width), "vocab")
        position_LxD = table(self, "position_embedding", (config.context, tower.width), "position")
        x_NxLxD = token_VxD[tokens_NxL] + position_LxD[:length]

        causal_LxL = jnp.tril(jnp.ones((length, length), bool))
        visible_Nx1xLxL = (causal_LxL & mask_NxL[:, None, :])[:, None]
        x_NxLxD, _ = layers(tower)(x_NxLxD, visible_Nx1xLxL)

        end_N = _end_position(config, tokens_NxL)
        x_NxD = jnp.take_along_axis(x_NxLxD, end_N[:, None, None], axis=1)[:, 0]
        # The norm is per position: only that of the pooled position is computed.
        x_NxD = norm(tower, "final_norm")(x_NxD)
        return dense(config.projection, ("embed", "projection"), "projection", use_bias=False)(
            x_NxD
        )


class VisionTower(nn.Module):
    """Pixels `[N, H, W, 3]` to projected states of the class tokens, `[N, E]`."""

    config: ClipConfig

    @nn.compact
    def __call__(self, pixels_NxHxWx3: jax.Array) -> jax.Array:
        config, tower = self.config, self.config.vision
        x_NxLxD = image_states(self, tower, config.image_size, config.patch, pixels_NxHxWx3)
        x_NxD = norm(tower, "post_norm")(x_NxLxD[:, 0])
        return dense(config.projection, ("embed", "projection"), "projection", use_bias=False)(
            x_NxD
        )


def image_states(
    module: nn.Module,
    tower: Tower,
    image_size: int,
    patch: int,
    pixels_NxHxWx3: jax.Array,
) -> jax.Array:
    """States after the last layer, the class token first: `[N, 1 + patches, D]`.

    Called inside a compact method of `module`, which owns the parameters.
    """
    count = (image_size // patch) ** 2
    class_D = vector(module, "class_embedding", tower.width)
    position_LxD = table(module, "position_embedding", (count + 1, tower.width), "position")

    patches_NxLxF = patchify(pixels_NxHxWx3.astype(position_LxD.dtype), patch)
    embed = dense(tower.width, ("pixels", "embed"), "patch_embedding", use_bias=False)
    x_NxLxD = embed(patches_NxLxF) + position_LxD[1:]

    class_Nx1xD = jnp.broadcast_to(class_D + position_LxD[0], (x_NxLxD.shape[0], 1, tower.width))
    x_NxLxD = jnp.concatenate([class_Nx1xD, x_NxLxD], axis=1)
    x_NxLxD = norm(tower, "pre_norm")(x_NxLxD)
    x_NxLxD, _ = layers(tower)(x_NxLxD, None)
    return x_NxLxD


def _end_position(config: ClipConfig, tokens_NxL: jax.Array) -> jax.Array:
    """Position of each text's first end token, int32 `[N]`."""
    if config.end_token == LEGACY_END_TOKEN:
        return jnp.argmax(tokens_NxL, axis=1)
    return jnp.argmax(tokens_NxL == config.end_token, axis=1)
