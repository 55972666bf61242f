"""One function for the text towers of all families, and one for the picture towers.

A retriever's config says of which family it is; what is fixed when a step is compiled is that
config, so the right tower stands in the jitted step without anything being looked up there.
"""

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
    """Token ids int32, with a mask that is False on padding, to float32 [N, E] of unit length."""
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
    """Normalised pixels to float32 [N, E] of unit length."""
    match config:
        case ClipConfig():
            return clip.embed_images(config, params, pixels_NxHxWx3)
        case SiglipConfig():
            return siglip.embed_images(config, params, pixels_NxHxWx3)


def shapes(config: RetrieverConfig) -> Params:
    """The shape of each parameter, boxed with its logical axes."""
    match config:
        case ClipConfig():
            init = clip.boxed_init
        case SiglipConfig():
            init = siglip.init
        case SentenceConfig():
            init = sentence.init
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def shardings(config: RetrieverConfig, mesh: Mesh) -> Params:
    """Where each parameter lives on a mesh."""
    return sharding.of_parameters(mesh, shapes(config))


def gather(params: Params, mesh: Mesh | None) -> Params:
    """Brings split parameters together for the moment in which they are used.

    A product that is summed over several devices has other last bits than on one, and an embedding
    with other bits has other ranks. None: they are whole already.
    """
    if mesh is None:
        return params
    return jax.lax.with_sharding_constraint(params, sharding.replicated(mesh))


def shortest_text(config: RetrieverConfig) -> int:
    """How many token positions a text must have at least, start, end and padding included.

    SigLIP reads its last position whatever stands there: its texts always fill the context.
    """
    return config.context if isinstance(config, SiglipConfig) else 2
