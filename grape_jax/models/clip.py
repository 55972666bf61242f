"""CLIP's two towers, as `CLIPModel` of transformers computes them (Radford et al. 2021).

Text: a causal transformer, read at the end token. Images: a ViT, read at its class token. Both end
in a projection to one shared space and unit length. The modules are used as init/apply only, so
`embed_texts` and `embed_images` are pure functions that may run inside a jitted training step.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Params = dict[str, Any]

# transformers reads configs with this end token the old way: the end is the largest token id.
LEGACY_END_TOKEN = 2


@dataclasses.dataclass(frozen=True)
class Tower:
    """The size of one transformer."""

    width: int
    layers: int
    heads: int
    mlp: int
    activation: str = "quick_gelu"  # or "gelu" (exact), "gelu_pytorch_tanh"
    norm_eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """What transformers' config.json of a CLIP says."""

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
    """Random float32 parameters; `logical_axes` has the same structure."""
    return nn.meta.unbox(_boxed_init(config, key))


def logical_axes(config: ClipConfig) -> Params:
    """A tree like the parameters with a PartitionSpec of logical axis names at each leaf."""
    boxed = jax.eval_shape(lambda: _boxed_init(config, jax.random.key(0)))
    return nn.get_partition_spec(boxed)


def embed_texts(
    config: ClipConfig, params: Params, tokens_NxL: jax.Array, mask_NxL: jax.Array
) -> jax.Array:
    """Texts into the shared space.

    Args:
      tokens_NxL: int32, start token first, end token last, padding after it. L <= config.context.
      mask_NxL: bool, False on padding.

    Returns:
      float32 [N, E] of unit length.
    """
    raw_NxE = TextTower(config).apply({"params": params["text"]}, tokens_NxL, mask_NxL)
    return _unit_length(raw_NxE)


def embed_images(
    config: ClipConfig,
    params: Params,
    pixels_NxHxWx3: jax.Array,
    patches_NxP: jax.Array | None = None,
) -> jax.Array:
    """Pictures into the shared space.

    Args:
      pixels_NxHxWx3: float32, H = W = config.image_size, normalised as the checkpoint's
        preprocessor_config.json says.
      patches_NxP: int32, look at these patches of each picture only (row-major index): FLIP
        (Li et al. 2023) trains faster so. None: all.

    Returns:
      float32 [N, E] of unit length.
    """
    raw_NxE = VisionTower(config).apply({"params": params["vision"]}, pixels_NxHxWx3, patches_NxP)
    return _unit_length(raw_NxE)


class TextTower(nn.Module):
    config: ClipConfig

    @nn.compact
    def __call__(self, tokens_NxL: jax.Array, mask_NxL: jax.Array) -> jax.Array:
        config, tower = self.config, self.config.text
        length = tokens_NxL.shape[1]
        token_VxD = _table(self, "token_embedding", (config.vocab, tower.width), "vocab")
        position_LxD = _table(self, "position_embedding", (config.context, tower.width), "position")
        x_NxLxD = token_VxD[tokens_NxL] + position_LxD[:length]

        causal_LxL = jnp.tril(jnp.ones((length, length), bool))
        visible_Nx1xLxL = (causal_LxL & mask_NxL[:, None, :])[:, None]
        x_NxLxD, _ = _layers(tower)(x_NxLxD, visible_Nx1xLxL)

        end_N = _end_position(config, tokens_NxL)
        x_NxD = jnp.take_along_axis(x_NxLxD, end_N[:, None, None], axis=1)[:, 0]
        # Normalising the one position read is what normalising all and then reading gives.
        x_NxD = _norm(tower, "final_norm")(x_NxD)
        return _dense(config.projection, ("embed", "projection"), "projection", use_bias=False)(
            x_NxD
        )


class VisionTower(nn.Module):
    config: ClipConfig

    @nn.compact
    def __call__(
        self, pixels_NxHxWx3: jax.Array, patches_NxP: jax.Array | None = None
    ) -> jax.Array:
        config, tower = self.config, self.config.vision
        count = (config.image_size // config.patch) ** 2
        class_D = self.param(
            "class_embedding",
            nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed",)),
            (tower.width,),
        )
        position_LxD = _table(self, "position_embedding", (count + 1, tower.width), "position")

        # A convolution whose stride is its kernel is one matmul over flattened patches.
        patches_NxLxF = _patchify(pixels_NxHxWx3, config.patch)
        position_NxLxD = position_LxD[None, 1:]
        if patches_NxP is not None:
            patches_NxLxF = jnp.take_along_axis(patches_NxLxF, patches_NxP[..., None], axis=1)
            position_NxLxD = position_LxD[1:][patches_NxP]
        embed = _dense(tower.width, ("pixels", "embed"), "patch_embedding", use_bias=False)
        x_NxLxD = embed(patches_NxLxF) + position_NxLxD

        class_Nx1xD = jnp.broadcast_to(
            class_D + position_LxD[0], (x_NxLxD.shape[0], 1, tower.width)
        )
        x_NxLxD = jnp.concatenate([class_Nx1xD, x_NxLxD], axis=1)
        x_NxLxD = _norm(tower, "pre_norm")(x_NxLxD)
        x_NxLxD, _ = _layers(tower)(x_NxLxD, None)
        x_NxD = _norm(tower, "post_norm")(x_NxLxD[:, 0])
        return _dense(config.projection, ("embed", "projection"), "projection", use_bias=False)(
            x_NxD
        )


class Block(nn.Module):
    """One pre-norm transformer layer; a scan body, hence the pair it returns."""

    tower: Tower

    @nn.compact
    def __call__(self, x_NxLxD: jax.Array, visible: jax.Array | None) -> tuple[jax.Array, None]:
        x_NxLxD = x_NxLxD + self._attention(_norm(self.tower, "norm1")(x_NxLxD), visible)
        x_NxLxD = x_NxLxD + self._mlp(_norm(self.tower, "norm2")(x_NxLxD))
        return x_NxLxD, None

    def _attention(self, x_NxLxD: jax.Array, visible: jax.Array | None) -> jax.Array:
        width, heads = self.tower.width, self.tower.heads
        split = (*x_NxLxD.shape[:2], heads, width // heads)
        q = _dense(width, ("embed", "heads"), "q")(x_NxLxD).reshape(split)
        k = _dense(width, ("embed", "heads"), "k")(x_NxLxD).reshape(split)
        v = _dense(width, ("embed", "heads"), "v")(x_NxLxD).reshape(split)
        scores_NxHxLxL = jnp.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(width // heads)
        if visible is not None:
            # Finite, so that a row with nothing visible stays a number.
            scores_NxHxLxL = jnp.where(visible, scores_NxHxLxL, jnp.finfo(jnp.float32).min)
        weights_NxHxLxL = jax.nn.softmax(scores_NxHxLxL, axis=-1)
        mixed = jnp.einsum("nhqk,nkhd->nqhd", weights_NxHxLxL, v).reshape(x_NxLxD.shape)
        return _dense(width, ("heads", "embed"), "out")(mixed)

    def _mlp(self, x_NxLxD: jax.Array) -> jax.Array:
        # Two dimensions: XLA:CPU has no fast path for the matmul of three.
        x_MxD = x_NxLxD.reshape(-1, self.tower.width)
        x_MxF = _dense(self.tower.mlp, ("embed", "mlp"), "up")(x_MxD)
        x_MxF = _activation(self.tower.activation)(x_MxF)
        return _dense(self.tower.width, ("mlp", "embed"), "down")(x_MxF).reshape(x_NxLxD.shape)


def _layers(tower: Tower) -> nn.Module:
    """All layers as one stacked module; unrolled, which XLA:CPU runs several times faster."""
    stacked = nn.scan(
        Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=tower.layers,
        unroll=tower.layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return stacked(tower, name="layers")


def _end_position(config: ClipConfig, tokens_NxL: jax.Array) -> jax.Array:
    if config.end_token == LEGACY_END_TOKEN:
        return jnp.argmax(tokens_NxL, axis=1)
    return jnp.argmax(tokens_NxL == config.end_token, axis=1)


def _patchify(pixels_NxHxWx3: jax.Array, patch: int) -> jax.Array:
    """[N, H, W, 3] to [N, patches, patch * patch * 3], rows first."""
    n, height, width, channels = pixels_NxHxWx3.shape
    grid = (n, height // patch, patch, width // patch, patch, channels)
    x = pixels_NxHxWx3.reshape(grid).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, (height // patch) * (width // patch), patch * patch * channels)


def _activation(name: str) -> Callable[[jax.Array], jax.Array]:
    return {
        "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    }[name]


def _unit_length(x_NxE: jax.Array) -> jax.Array:
    return x_NxE / jnp.linalg.norm(x_NxE, axis=-1, keepdims=True)


def _table(module: nn.Module, name: str, shape: tuple[int, int], rows: str) -> jax.Array:
    start = nn.with_logical_partitioning(nn.initializers.normal(0.02), (rows, "embed"))
    return module.param(name, start, shape)


def _dense(features: int, axes: tuple[str, str], name: str, use_bias: bool = True) -> nn.Dense:
    kernel = nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes)
    bias = nn.with_logical_partitioning(nn.initializers.zeros, axes[1:])
    return nn.Dense(features, use_bias=use_bias, kernel_init=kernel, bias_init=bias, name=name)


def _norm(tower: Tower, name: str) -> nn.LayerNorm:
    one = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
    zero = nn.with_logical_partitioning(nn.initializers.zeros, ("embed",))
    # The two-pass variance: the fast one loses digits where the mean is large.
    return nn.LayerNorm(
        epsilon=tower.norm_eps,
        use_fast_variance=False,
        scale_init=one,
        bias_init=zero,
        name=name,
    )


def _boxed_init(config: ClipConfig, key: jax.Array) -> Params:
    text_key, vision_key = jax.random.split(key)
    tokens_1xL = jnp.zeros((1, config.context), jnp.int32)
    pixels = jnp.zeros((1, config.image_size, config.image_size, 3), jnp.float32)
    text = TextTower(config).init(text_key, tokens_1xL, tokens_1xL == 0)
    vision = VisionTower(config).init(vision_key, pixels)
    scale = jnp.asarray(config.logit_scale, jnp.float32)
    return {"text": text["params"], "vision": vision["params"], "logit_scale": scale}
