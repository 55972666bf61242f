"""A BERT sentence encoder (Devlin et al. 2019; Reimers and Gurevych 2019).

The layers are those of transformers' `BertModel`, `RobertaModel` or `XLMRobertaModel`, without the
pooler; the pooling and the linear layers behind it are those of sentence-transformers. Queries and
corpus are both text. `embed_texts` is a pure function, which may run inside a jitted training step.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from grape_jax.models.encoder import Params, Tower, dense, layers, norm, table, unit_length

POOLINGS = ("mean", "cls")
HEAD_ACTIVATIONS = {"tanh": jnp.tanh, "identity": lambda x: x}


@dataclasses.dataclass(frozen=True)
class Head:
    """A linear layer behind the pooling."""

    width: int  # of its output
    bias: bool
    activation: str  # a key of HEAD_ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class SentenceConfig:
    """Architecture of a BERT, as in transformers' config.json."""

    text: Tower
    vocab: int
    context: int  # text positions, start and end tokens included
    token_types: int
    first_position: int = 0  # row of the first token's position; RoBERTa's is the pad id + 1
    pooling: str = "mean"  # one of POOLINGS
    heads: tuple[Head, ...] = ()

    @property
    def projection(self) -> int:
        """E, width of the embedding."""
        return self.heads[-1].width if self.heads else self.text.width

    @property
    def positions(self) -> int:
        """Rows of the table of positions."""
        return self.first_position + self.context


def init(config: SentenceConfig, key: jax.Array) -> Params:
    """Random float32 parameters, boxed with their logical axes."""
    tokens_1xL = jnp.zeros((1, config.context), jnp.int32)
    text = TextTower(config).init(key, tokens_1xL, tokens_1xL == 0)
    return {"text": text["params"]}


def embed_texts(
    config: SentenceConfig, params: Params, tokens_NxL: jax.Array, mask_NxL: jax.Array
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


class TextTower(nn.Module):
    """Token ids and mask `[N, L]` to pooled states, `[N, E]`."""

    config: SentenceConfig

    @nn.compact
    def __call__(self, tokens_NxL: jax.Array, mask_NxL: jax.Array) -> jax.Array:
        config, tower = self.config, self.config.text
        token_VxD = table(self, "token_embedding", (config.vocab, tower.width), "vocab")
        shape = config.positions, tower.width
        position_LxD = table(self, "position_embedding", shape, "position")[config.first_position :]
        type_SxD = table(self, "type_embedding", (config.token_types, tower.width), "position")
        # All tokens of a single text are of the first type.
        x_NxLxD = token_VxD[tokens_NxL] + type_SxD[0] + position_LxD[: tokens_NxL.shape[1]]
        x_NxLxD = norm(tower, "embedding_norm")(x_NxLxD)
        x_NxLxD, _ = layers(tower)(x_NxLxD, mask_NxL[:, None, None, :])
        x_NxE = _pool(config.pooling, x_NxLxD, mask_NxL)
        for i, head in enumerate(config.heads):
            x_NxE = dense(head.width, ("embed", "mlp"), f"head_{i}", head.bias)(x_NxE)
            x_NxE = HEAD_ACTIVATIONS[head.activation](x_NxE)
        return x_NxE


def _pool(pooling: str, x_NxLxD: jax.Array, mask_NxL: jax.Array) -> jax.Array:
    """States of the first token, or the mean over all tokens, in float32 for all dtypes."""
    x_NxLxD = x_NxLxD.astype(jnp.float32)
    if pooling == "cls":
        return x_NxLxD[:, 0]
    kept_NxLxD = jnp.where(mask_NxL[..., None], x_NxLxD, 0.0)
    return kept_NxLxD.sum(axis=1) / jnp.maximum(mask_NxL.sum(axis=1), 1)[:, None]
