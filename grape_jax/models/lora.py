"""Low-rank adapters (Hu et al. 2021): y = x W + (alpha / rank) (x A) B, with W frozen.

The adapter is a collection of its own, "lora", beside "params"; leaving it out gives the base
model.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp


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
        if self.lora is None or self.name not in self.lora.targets:
            return y.reshape(*lead, -1)
        # B starts at zero, so that training starts from the base model itself.
        a_init = declare(nn.initializers.he_uniform(), (self.axes[0], "rank"))
        b_init = declare(nn.initializers.zeros, ("rank", self.axes[1]))
        rank = self.lora.rank
        key = lambda: self.make_rng("lora")
        a = self.variable("lora", "a", lambda: a_init(key(), (shape[0], rank), jnp.float32)).value
        b = self.variable("lora", "b", lambda: b_init(key(), (rank, shape[1]), jnp.float32)).value
        y += (x @ a.astype(x.dtype)) @ b.astype(x.dtype) * self.lora.scale
        return y.reshape(*lead, -1)


def merge(params, adapter, config: LoraConfig):
    """The base parameters with the adapter added in: for sampling, and for export."""

    def merged(layer, low_rank):
        delta = jnp.einsum("ydr,yrf->ydf", low_rank["a"], low_rank["b"]) * config.scale
        return layer | {"kernel": layer["kernel"] + delta.astype(layer["kernel"].dtype)}

    layers = {
        name: merged(layer, adapter[name]) if name in adapter else layer
        for name, layer in params["layers"].items()
    }
    return params | {"layers": layers}
