"""The vision encoders of Qwen2-VL (Wang et al. 2024) and Qwen2.5-VL (Bai et al. 2025).

A ViT for any picture size, and a merger. Most layers of Qwen2.5-VL attend inside windows of 8 x 8
patches. Patches therefore lie window by window, each window padded to its full size: attention
inside windows is a batched product, and only the full layers need all patches of a picture. All
layers of Qwen2-VL are full.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from grape_jax.models.attention import MASKED
from grape_jax.models.encoder import ACTIVATIONS, Params, dense, layer_norm
from grape_jax.models.policy import RmsNorm
from grape_jax.models.rope import turn

THETA = 10_000.0
NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class QwenVisionConfig:
    """Architecture of tower and merger, as in transformers' config.json."""

    width: int
    layers: int
    heads: int
    mlp: int
    patch: int  # pixels, square
    frames: int  # copies of a picture in a patch
    merge: int  # patches along each side that become one feature
    window: int  # features along each side of a window
    full: tuple[int, ...]  # layers that attend to the whole picture
    gated: bool  # Qwen2.5-VL: RMS norm and a gated MLP; Qwen2-VL: layer norm and a plain one
    out_width: int  # D, of the decoder

    @property
    def pixels(self) -> int:
        """F, numbers of one patch."""
        return 3 * self.frames * self.patch**2


class Patches(flax.struct.PyTreeNode):
    """Patches of the pictures of B prompts: W windows of L patches, F numbers each.

    The patches of one feature are consecutive.
    """

    pixels_BxWxLxF: jax.Array  # float32, normalised
    position_BxWxLx2: jax.Array  # int32, row and column in the picture
    mask_BxWxL: jax.Array  # bool, False on padding
    picture_BxW: jax.Array  # int32, 1 + the number of the window's picture; 0: padding
    order_BxI: jax.Array  # int32, the feature of each image token, counted over windows


class VisionEncoder(nn.Module):
    """Patches to features `[B, I, D]`."""

    config: QwenVisionConfig

    @nn.compact
    def __call__(self, patches: Patches) -> jax.Array:
        c = self.config
        # Declared by hand: its dtype is that of the computation.
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("pixels", "embed"))
        kernel_FxD: Any = self.param("patch_embedding", init, (c.pixels, c.width))
        x = patches.pixels_BxWxLxF.astype(kernel_FxD.dtype) @ kernel_FxD
        angles = _angles(c, patches.position_BxWxLx2)
        for layer in range(c.layers):
            x = Block(c, layer in c.full, name=f"layer_{layer}")(x, angles, patches)
        x = _norm(c, "merge_norm")(x)
        B = x.shape[0]
        x = x.reshape(B, -1, c.width * c.merge**2)
        x = dense(c.width * c.merge**2, ("embed", "mlp"), "merge_up")(x)
        x = nn.gelu(x, approximate=False)
        x = dense(c.out_width, ("mlp", "embed"), "merge_down")(x)
        return jnp.take_along_axis(x, patches.order_BxI[..., None], axis=1)


class Block(nn.Module):
    """One layer on `[B, W, L, width]`."""

    config: QwenVisionConfig
    full: bool

    @nn.compact
    def __call__(self, x: jax.Array, angles: jax.Array, patches: Patches) -> jax.Array:
        c = self.config
        h = _norm(c, "norm1")(x)
        split = lambda y: y.reshape(*y.shape[:-1], c.heads, -1)
        q, k, v = (split(dense(c.width, ("embed", "heads"), name)(h)) for name in "qkv")
        q, k = turn(q, angles), turn(k, angles)
        attend = _attend_everywhere if self.full else _attend_in_windows
        mixed = attend(q * (c.width // c.heads) ** -0.5, k, v, patches).reshape(x.shape)
        x += dense(c.width, ("heads", "embed"), "out")(mixed)
        h = _norm(c, "norm2")(x)
        up = dense(c.mlp, ("embed", "mlp"), "up")(h)
        if c.gated:
            up *= nn.silu(dense(c.mlp, ("embed", "mlp"), "gate")(h))
        else:
            up = ACTIVATIONS["quick_gelu"](up)
        return x + dense(c.width, ("mlp", "embed"), "down")(up)


def _norm(config: QwenVisionConfig, name: str) -> nn.Module:
    return RmsNorm(NORM_EPS, name=name) if config.gated else layer_norm(NORM_EPS, name)


def _attend_in_windows(q, k, v, patches: Patches) -> jax.Array:
    """Attention of `[B, W, L, H, d]` inside each window."""
    scores = jnp.einsum("bwqhd,bwkhd->bwhqk", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(patches.mask_BxWxL[:, :, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bwhqk,bwkhd->bwqhd", weights, v)


def _attend_everywhere(q, k, v, patches: Patches) -> jax.Array:
    """Attention of `[B, W, L, H, d]` to all patches of the same picture, window by window."""
    flat = lambda y: y.reshape(y.shape[0], -1, *y.shape[3:])
    k, v, mask_BxN = flat(k), flat(v), flat(patches.mask_BxWxL)
    picture_BxN = jnp.repeat(patches.picture_BxW, patches.mask_BxWxL.shape[2], axis=1)

    def one_window(inputs):
        q_BxLxHxd, picture_B = inputs
        scores = jnp.einsum("bqhd,bkhd->bhqk", q_BxLxHxd, k, preferred_element_type=jnp.float32)
        visible_BxN = mask_BxN & (picture_BxN == picture_B[:, None])
        scores = jnp.where(visible_BxN[:, None, None], scores, MASKED)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)

    by_window = jnp.moveaxis(q, 1, 0), patches.picture_BxW.T
    return jnp.moveaxis(jax.lax.map(one_window, by_window), 0, 1)


def _angles(config: QwenVisionConfig, position_BxWxLx2: jax.Array) -> jax.Array:
    """Rotary angles `[B, W, L, d / 2]`: the first half of the pairs by rows, then by columns."""
    half = config.width // config.heads // 2
    frequencies = jnp.asarray(THETA ** (-np.arange(0, half, 2) / half), jnp.float32)
    angles = position_BxWxLx2[..., None].astype(jnp.float32) * frequencies
    return angles.reshape(*position_BxWxLx2.shape[:-1], half)


def layout(config: QwenVisionConfig, rows: int, columns: int) -> tuple[np.ndarray, int]:
    """Where the features of a picture lie.

    Args:
      rows: features along the height.
      columns: features along the width.

    Returns:
      The place of each feature, row by row, in windows of window^2 features (int
      `[rows * columns]`), and the number of windows.
    """
    side = config.window
    row, column = np.divmod(np.arange(rows * columns), columns)
    across = -(-columns // side)
    window = row // side * across + column // side
    inside = row % side * side + column % side
    return window * side**2 + inside, -(-rows // side) * across


def empty(config: QwenVisionConfig, prompts: int, windows: int, features: int) -> Patches:
    """Padding (NumPy)."""
    L = (config.window * config.merge) ** 2
    shape = (prompts, windows, L)
    zeros: Any = np.zeros  # NumPy arrays are valid leaves of a tree of JAX arrays
    return Patches(
        pixels_BxWxLxF=zeros((*shape, config.pixels), np.float32),
        position_BxWxLx2=zeros((*shape, 2), np.int32),
        mask_BxWxL=zeros(shape, bool),
        picture_BxW=zeros(shape[:2], np.int32),
        order_BxI=zeros((prompts, features), np.int32),
    )


def init(config: QwenVisionConfig, key: jax.Array) -> Params:
    """Random float32 parameters, boxed with their logical axes."""
    patches = jax.tree.map(jnp.asarray, empty(config, 1, 1, 1))
    return VisionEncoder(config).init(key, patches)["params"]
