"""Low-rank adapters (Hu et al. 2021): y = x W + (alpha / rank) (x A) B, with W frozen.

The adapter is the variable collection "lora" beside "params"; without it, the model is the base.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from grape_jax.runtime.errors import UserError, check_choice
from grape_jax.types import Params

# Flax unboxes what it returns; the type of the box would hide that of the array.
declare: Any = nn.with_logical_partitioning

PROJECTED = "projected"  # name of projection outputs, for rematerialisation policies
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")  # the projections of a layer


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Size and targets of the adapters."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # projections to adapt, of TARGETS

    def __post_init__(self) -> None:
        for target in self.targets:
            check_choice("lora.targets", target, TARGETS)
        if self.rank < 1 or not self.targets:
            raise UserError("lora.rank must be 0 or more, and lora.targets not empty above 0.")

    @property
    def scale(self) -> float:
        """The factor alpha / rank."""
        return self.alpha / self.rank


class Linear(nn.Module):
    """A projection with logical axes, adapted if `lora.targets` contains its name."""

    features: int
    axes: tuple[str, str]
    lora: LoraConfig | None = None
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", declare(nn.initializers.lecun_normal(), self.axes), shape)
        # As one matrix: on CPUs, XLA's backward pass of a batched product takes twice as long.
        lead, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
        y = x @ kernel.astype(x.dtype)
        if self.bias:
            zeros = declare(nn.initializers.zeros, self.axes[1:])
            y += self.param("bias", zeros, (self.features,)).astype(x.dtype)
        if self.lora is not None and self.name in self.lora.targets:
            y += self._low_rank(x, self.lora)
        return checkpoint_name(y, PROJECTED).reshape(*lead, -1)

    def _low_rank(self, x: jax.Array, lora: LoraConfig) -> jax.Array:
        """The adapter's product, `[M, features]`."""
        # B is initialised to zero, so that training starts from the base model.
        key = self.make_rng
        a_init = declare(nn.initializers.he_uniform(), (self.axes[0], "rank"))
        b_init = declare(nn.initializers.zeros, ("rank", self.axes[1]))
        shapes = (x.shape[-1], lora.rank), (lora.rank, self.features)
        a = self.variable("lora", "a", lambda: a_init(key("lora"), shapes[0], jnp.float32)).value
        b = self.variable("lora", "b", lambda: b_init(key("lora"), shapes[1], jnp.float32)).value
        # Scaled before the wide product, which saves a gradient of the size of y.
        return (x @ a.astype(x.dtype) * lora.scale) @ b.astype(x.dtype)


def merge(params: Params, adapter: Params, config: LoraConfig) -> Params:
    """Adds the adapter to the base parameters, in float32, for export.

    A bfloat16 sum would lose updates below half a unit in the last place of a weight.

    Args:
      adapter: the collection "lora".

    Returns:
      float32 parameters.
    """
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)

    def merged(layer, low_rank):
        delta = jnp.einsum("ydr,yrf->ydf", low_rank["a"], low_rank["b"]) * config.scale
        return layer | {"kernel": layer["kernel"] + delta}

    layers = {
        name: merged(layer, adapter[name]) if name in adapter else layer
        for name, layer in params["layers"].items()
    }
    return params | {"layers": layers}
