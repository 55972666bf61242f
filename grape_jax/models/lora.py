"""Low-rank adapters (Hu et al. 2021): y = x W + (alpha / rank) (x A) B, with W frozen.

The adapter is a collection of its own, "lora", beside "params"; leaving it out gives the base
model.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

PROJECTED = "projected"  # names what a projection gives, for those who choose what to keep


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    rank: int
    alpha: float
    targets: tuple[str, ...]  # of q, k, v, o, gate, up, down

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Linear(nn.Module):
    """A projection that declares its logical axes, adapted when `lora` names it."""

    features: int
    axes: tuple[str, str]
    lora: LoraConfig | None = None
    bias: bool = False

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1], self.features)
        declare = nn.with_logical_partitioning
        kernel = self.param("kernel", declare(nn.initializers.lecun_normal(), self.axes), shape)
        # As one matrix: XLA on CPUs takes twice as long for the backward pass of a stack of them.
        lead, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
        y = x @ kernel.astype(x.dtype)
        if self.bias:
            zeros = declare(nn.initializers.zeros, self.axes[1:])
            y += self.param("bias", zeros, (self.features,)).astype(x.dtype)
        if self.lora is not None and self.name in self.lora.targets:
            y += self._low_rank(x)
        return checkpoint_name(y, PROJECTED).reshape(*lead, -1)

    def _low_rank(self, x):
        # B starts at zero, so that training starts from the base model itself.
        declare, rank, key = nn.with_logical_partitioning, self.lora.rank, self.make_rng
        a_init = declare(nn.initializers.he_uniform(), (self.axes[0], "rank"))
        b_init = declare(nn.initializers.zeros, ("rank", self.axes[1]))
        shapes = (x.shape[-1], rank), (rank, self.features)
        a = self.variable("lora", "a", lambda: a_init(key("lora"), shapes[0], jnp.float32)).value
        b = self.variable("lora", "b", lambda: b_init(key("lora"), shapes[1], jnp.float32)).value
        # Scaled while it is narrow, so that no gradient of y's size is written for it.
        return (x @ a.astype(x.dtype) * self.lora.scale) @ b.astype(x.dtype)


def merge(params, adapter, config: LoraConfig):
    """The base parameters with the adapter merged in, in float32, for export.

    A bfloat16 sum would lose updates below half an ulp of a weight.
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
