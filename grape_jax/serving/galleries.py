"""The gallery that a server searches: the run's own, or another one on disk."""

import warnings
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from grape_jax.data import embedded, local
from grape_jax.retrieval import encoder, ranking
from grape_jax.retrieval.bank import corpus_bank
from grape_jax.retrieval.encoder import Retriever
from grape_jax.run.galleries import Gallery
from grape_jax.run.rewriter import Rewriter
from grape_jax.runtime.errors import UserError
from grape_jax.serving.engine import EmbeddedPicture
from grape_jax.serving.service import Picture, Query

EXAMPLES = 6  # queries of each shift


def open_gallery(rewriter: Rewriter, path: str | None, split: str) -> Gallery:
    """The gallery of a run's split, or the one at `path` if that is given.

    Raises:
      UserError: as `read`, or the run has no such split.
    """
    if path is None:
        return rewriter.gallery(split)
    run = rewriter.context
    return read(run.config, run.retriever, run.mesh, path)


def read(config: ConfigDict, retriever: Retriever, mesh: Mesh, path: str) -> Gallery:
    """A gallery of the user's pictures or embeddings, for the retriever of a run.

    Args:
      config: of the run.
      retriever: of the run.
      mesh: over which the gallery is sharded.
      path: a directory of pictures, which are embedded and cached in the run's `data_dir`, or
        embeddings in a layout of `data.embedded`.

    Raises:
      UserError: there is nothing to read, a picture is damaged, or another model made the
        embeddings.
    """
    data_dir = Path(config.data_dir)
    place = Path(path).expanduser()
    if not place.exists():
        raise UserError(
            f"there is no gallery {path}: give a directory of pictures, or embeddings in "
            f"{', '.join(embedded.SUFFIXES)}."
        )
    if place.is_dir() and not (place / "img_emb").is_dir():
        if retriever.preprocess is None:
            raise UserError(
                f"the run's retriever reads text only: give embeddings in place of {path}."
            )
        corpus = local.pictures_in(place)
        assert corpus.images is not None
        try:
            bank_NxE = corpus_bank(retriever, corpus.images, data_dir / "banks")
        except UserError as error:
            raise UserError(f"the gallery {path} cannot be embedded: {error}") from error
    else:
        corpus, given = local.embeddings_in(place, data_dir)
        encoder.check_embeddings(retriever, given.name, given.texts, given.texts_NxE)
        bank_NxE = given.bank_NxE
        if not given.texts:
            warnings.warn(
                f"{path} has no texts to check with: the run's retriever must have made it.",
                stacklevel=2,
            )
    index = ranking.shard_corpus(mesh, bank_NxE, config.retriever.corpus_dtype)
    return Gallery(corpus, bank_NxE, index, mesh)


def examples(rewriter: Rewriter, gallery: Gallery, split: str) -> list[Query]:
    """A few of the run's queries; none if they are not on this disk.

    Args:
      gallery: that of the split.
    """
    try:
        return [
            Query(query.text, shift, _picture(gallery, query.image))
            for shift in rewriter.shifts
            for query in rewriter.context.queries.split(shift, split, EXAMPLES)
        ]
    except (UserError, OSError):  # a run can be served without its queries
        return []


def _picture(gallery: Gallery, row: int) -> Picture | None:
    return Picture(f"row {row}", EmbeddedPicture(gallery.bank_NxE[row], row)) if row >= 0 else None
