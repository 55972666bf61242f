"""Text and image towers of all retriever families, selected by the type of the config.

The config is static under jit, so that the selection happens at compilation.
"""

import functools
from typing import cast

import jax
from jax.sharding import Mesh

from grape_jax.models import clip, sentence, siglip
from grape_jax.models.clip import ClipConfig
from grape_jax.models.encoder import Params
from grape_jax.models.sentence import SentenceConfig
from grape_jax.models.siglip import SiglipConfig
from grape_jax.runtime import sharding

RetrieverConfig = ClipConfig | SiglipConfig | SentenceConfig


def embed_texts(
    config: RetrieverConfig, params: Params, tokens_NxL: jax.Array, mask_NxL: jax.Array
) -> jax.Array:
    """Embeds texts with the family's text tower.

    Args:
      tokens_NxL: int32 token ids, padded as the family's tokenizer pads.
      mask_NxL: bool, False on padding.

    Returns:
      float32 `[N, E]` of unit length.
    """
    match config:
        case ClipConfig():
            return clip.embed_texts(config, params, tokens_NxL, mask_NxL)
        case SiglipConfig():
            return siglip.embed_texts(config, params, tokens_NxL)
        case SentenceConfig():
            return sentence.embed_texts(config, params, tokens_NxL, mask_NxL)


def embed_images(
    config: ClipConfig | SiglipConfig, params: Params, pixels_NxHxWx3: jax.Array
) -> jax.Array:
    """Embeds images with the family's image tower.

    Args:
      pixels_NxHxWx3: float32, normalised by `preprocessing.preprocess`.

    Returns:
      float32 `[N, E]` of unit length.
    """
    match config:
        case ClipConfig():
            return clip.embed_images(config, params, pixels_NxHxWx3)
        case SiglipConfig():
            return siglip.embed_images(config, params, pixels_NxHxWx3)


@functools.cache  # asked for several times at a start, and traced each time
def shapes(config: RetrieverConfig) -> Params:
    """Shapes of the parameters, boxed with their logical axes."""
    key = jax.random.key(0)
    match config:
        case ClipConfig():
            return jax.eval_shape(lambda: clip.init(config, key))
        case SiglipConfig():
            return jax.eval_shape(lambda: siglip.init(config, key))
        case SentenceConfig():
            return jax.eval_shape(lambda: sentence.init(config, key))


def shardings(config: RetrieverConfig, mesh: Mesh) -> Params:
    """Shardings of the parameters on a mesh."""
    return cast(Params, sharding.of_parameters(mesh, shapes(config)))


def gather(params: Params, mesh: Mesh | None) -> Params:
    """Replicates sharded parameters inside a jitted function; without a mesh, a no-op.

    Embeddings then have the same bits on any mesh, and so have ranks: a product summed over devices
    would differ in its last bits.
    """
    if mesh is None:
        return params
    return jax.lax.with_sharding_constraint(params, sharding.replicated(mesh))


def shortest_text(config: RetrieverConfig) -> int:
    """Fewest token positions a text can be padded to, including start and end tokens.

    SigLIP reads the last position of its context, so its texts always fill the context.
    """
    return config.context if isinstance(config, SiglipConfig) else 2
