"""SigLIP's two towers, as transformers' `SiglipModel` computes them (Zhai et al. 2023).

Text: a transformer without mask, pooled at its last position, so that a text is always padded to
the whole context. Images: a ViT without class token, pooled by one learned query that attends to
all patches. SigLIP 2 (Tschannen et al. 2025) at a fixed resolution is the same model with another
tokenizer.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from grape_jax.models.encoder import (
    Params,
    Tower,
    attention,
    dense,
    layers,
    mlp,
    norm,
    patchify,
    table,
    unit_length,
    vector,
)


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """Architecture of a SigLIP, as in transformers' config.json."""

    text: Tower
    vision: Tower
    vocab: int
    context: int  # text positions, to which every text is padded
    image_size: int  # pixels, square
    patch: int  # pixels, square

    @property
    def projection(self) -> int:
        """E, width of the shared space."""
        return self.vision.width


def init(config: SiglipConfig, key: jax.Array) -> Params:
    """Random float32 parameters, boxed with their logical axes."""
    text_key, vision_key = jax.random.split(key)
    tokens_1xL = jnp.zeros((1, config.context), jnp.int32)
    pixels = jnp.zeros((1, config.image_size, config.image_size, 3), jnp.float32)
    text = TextTower(config).init(text_key, tokens_1xL)
    vision = VisionTower(config).init(vision_key, pixels)
    return {"text": text["params"], "vision": vision["params"]}


def embed_texts(config: SiglipConfig, params: Params, tokens_NxL: jax.Array) -> jax.Array:
    """Embeds texts.

    Args:
      tokens_NxL: int32, padded by the tokenizer to L = config.context.

    Returns:
      float32 `[N, E]` of unit length.
    """
    raw_NxE: Any = TextTower(config).apply({"params": params["text"]}, tokens_NxL)
    return unit_length(raw_NxE)


def embed_images(config: SiglipConfig, params: Params, pixels_NxHxWx3: jax.Array) -> jax.Array:
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
    """Token ids `[N, L]` to projected states of the last positions, `[N, E]`."""

    config: SiglipConfig

    @nn.compact
    def __call__(self, tokens_NxL: jax.Array) -> jax.Array:
        config, tower = self.config, self.config.text
        token_VxD = table(self, "token_embedding", (config.vocab, tower.width), "vocab")
        position_LxD = table(self, "position_embedding", (config.context, tower.width), "position")
        x_NxLxD, _ = layers(tower)(token_VxD[tokens_NxL] + position_LxD, None)
        # The norm is per position: only that of the pooled position is computed.
        x_NxD = norm(tower, "final_norm")(x_NxLxD[:, -1])
        return dense(config.projection, ("embed", "projection"), "head")(x_NxD)


class VisionTower(nn.Module):
    """Pixels `[N, H, W, 3]` to pooled states, `[N, E]`."""

    config: SiglipConfig

    @nn.compact
    def __call__(self, pixels_NxHxWx3: jax.Array) -> jax.Array:
        config, tower = self.config, self.config.vision
        x_NxLxD = image_states(self, tower, config.image_size, config.patch, pixels_NxHxWx3)
        return PoolingHead(tower, name="head")(x_NxLxD)


def image_states(
    module: nn.Module, tower: Tower, image_size: int, patch: int, pixels_NxHxWx3: jax.Array
) -> jax.Array:
    """Normed states of all patches, `[N, L, D]`.

    Called inside a compact method of `module`, which owns the parameters.
    """
    count = (image_size // patch) ** 2
    position_LxD = table(module, "position_embedding", (count, tower.width), "position")
    patches_NxLxF = patchify(pixels_NxHxWx3.astype(position_LxD.dtype), patch)
    embed = dense(tower.width, ("pixels", "embed"), "patch_embedding")
    x_NxLxD, _ = layers(tower)(embed(patches_NxLxF) + position_LxD, None)
    return norm(tower, "post_norm")(x_NxLxD)


class PoolingHead(nn.Module):
    """Attention pooling with one learned query, followed by an MLP with a residual connection."""

    tower: Tower

    @nn.compact
    def __call__(self, x_NxLxD: jax.Array) -> jax.Array:
        probe_D = vector(self, "probe", self.tower.width)
        probe_Nx1xD = jnp.broadcast_to(probe_D, (x_NxLxD.shape[0], 1, self.tower.width))
        y_Nx1xD = attention(self.tower, probe_Nx1xD, x_NxLxD, None)
        return (y_Nx1xD + mlp(self.tower, norm(self.tower, "norm")(y_Nx1xD)))[:, 0]
