"""The transformer encoder of all retriever families: CLIP, SigLIP and BERT.

`attention`, `mlp`, `dense`, `norm`, `table` and `vector` create submodules or parameters. They are
called inside a compact method, of the module that owns what they create.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from grape_jax.types import Params as Params


@dataclasses.dataclass(frozen=True)
class Tower:
    """Size and variant of one transformer."""

    width: int
    layers: int
    heads: int
    mlp: int
    activation: str = "quick_gelu"  # a key of ACTIVATIONS
    norm_eps: float = 1e-5
    norm_first: bool = True  # False: post-norm, as in BERT


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class Block(nn.Module):
    """One transformer layer. As a scan body it returns a pair."""

    tower: Tower

    @nn.compact
    def __call__(self, x_NxLxD: jax.Array, visible: jax.Array | None) -> tuple[jax.Array, None]:
        tower = self.tower
        if tower.norm_first:
            normed = norm(tower, "norm1")(x_NxLxD)
            x_NxLxD = x_NxLxD + attention(tower, normed, normed, visible)
            x_NxLxD = x_NxLxD + mlp(tower, norm(tower, "norm2")(x_NxLxD))
        else:
            mixed = attention(tower, x_NxLxD, x_NxLxD, visible)
            x_NxLxD = norm(tower, "norm1")(x_NxLxD + mixed)
            x_NxLxD = norm(tower, "norm2")(x_NxLxD + mlp(tower, x_NxLxD))
        return x_NxLxD, None


def layers(tower: Tower) -> nn.Module:
    """All layers as one stacked module, unrolled, which is several times faster on XLA:CPU."""
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


def attention(
    tower: Tower, x_NxQxD: jax.Array, source_NxLxD: jax.Array, visible: jax.Array | None
) -> jax.Array:
    """Multi-head attention of Q positions to the L positions of a source.

    Args:
      x_NxQxD: queries.
      source_NxLxD: keys and values.
      visible: bool `[N, 1, Q, L]`, or None: every position is visible.

    Returns:
      `[N, Q, D]`.
    """
    width, heads = tower.width, tower.heads

    def split(name: str, y: jax.Array) -> jax.Array:
        y = dense(width, ("embed", "heads"), name)(y)
        return y.reshape(*y.shape[:2], heads, width // heads)

    q, k, v = split("q", x_NxQxD), split("k", source_NxLxD), split("v", source_NxLxD)
    scores_NxHxQxL = jnp.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(width // heads)
    scores_NxHxQxL = scores_NxHxQxL.astype(jnp.float32)
    if visible is not None:
        # Finite, so that the softmax of a fully masked row is finite.
        scores_NxHxQxL = jnp.where(visible, scores_NxHxQxL, jnp.finfo(jnp.float32).min)
    weights_NxHxQxL = jax.nn.softmax(scores_NxHxQxL, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("nhqk,nkhd->nqhd", weights_NxHxQxL, v).reshape(x_NxQxD.shape)
    return dense(width, ("heads", "embed"), "out")(mixed)


def mlp(tower: Tower, x_NxLxD: jax.Array) -> jax.Array:
    """The two-layer perceptron of a block, `[N, L, D]`."""
    # As a matrix: XLA:CPU has no fast path for a batched product.
    x_MxD = x_NxLxD.reshape(-1, tower.width)
    x_MxF = dense(tower.mlp, ("embed", "mlp"), "up")(x_MxD)
    x_MxF = ACTIVATIONS[tower.activation](x_MxF)
    return dense(tower.width, ("mlp", "embed"), "down")(x_MxF).reshape(x_NxLxD.shape)


def dense(features: int, axes: tuple[str, str], name: str, use_bias: bool = True) -> nn.Dense:
    """A linear layer whose kernel and bias have logical axes."""
    kernel = nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes)
    bias = nn.with_logical_partitioning(nn.initializers.zeros, axes[1:])
    return nn.Dense(features, use_bias=use_bias, kernel_init=kernel, bias_init=bias, name=name)


def norm(tower: Tower, name: str) -> nn.LayerNorm:
    """The tower's layer norm."""
    return layer_norm(tower.norm_eps, name)


def layer_norm(eps: float, name: str) -> nn.LayerNorm:
    """A layer norm whose parameters have logical axes."""
    one = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
    zero = nn.with_logical_partitioning(nn.initializers.zeros, ("embed",))
    # The two-pass variance: the fast one is inaccurate if the mean is large.
    return nn.LayerNorm(
        epsilon=eps,
        use_fast_variance=False,
        scale_init=one,
        bias_init=zero,
        name=name,
    )


def table(module: nn.Module, name: str, shape: tuple[int, int], rows: str) -> jax.Array:
    """A parameter `shape` with one vector per row; `rows` is the logical axis of the rows."""
    init: Any = nn.with_logical_partitioning(nn.initializers.normal(0.02), (rows, "embed"))
    return module.param(name, init, shape)


def vector(module: nn.Module, name: str, width: int) -> jax.Array:
    """A parameter that is one vector."""
    init: Any = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed",))
    return module.param(name, init, (width,))


def patchify(pixels_NxHxWx3: jax.Array, patch: int) -> jax.Array:
    """`[N, H, W, 3]` to `[N, patches, patch * patch * 3]`, row by row; a partial patch is dropped.

    A convolution with a stride equal to its kernel is one product with these.
    """
    n, height, width, channels = pixels_NxHxWx3.shape
    rows, columns = height // patch, width // patch
    x = pixels_NxHxWx3[:, : rows * patch, : columns * patch]
    x = x.reshape(n, rows, patch, columns, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, rows * columns, patch * patch * channels)


def unit_length(x_NxE: jax.Array) -> jax.Array:
    """Rows divided by their norm, float32."""
    x_NxE = x_NxE.astype(jnp.float32)
    return x_NxE / jnp.linalg.norm(x_NxE, axis=-1, keepdims=True)
