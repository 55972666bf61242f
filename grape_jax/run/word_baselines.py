"""Baselines of a text collection: search by words (BM25), alone and beside the embeddings."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from grape_jax.reporting.results import BM25, HYBRID, RAW, by_words, hybrid
from grape_jax.retrieval import bm25
from grape_jax.run.answers import QuerySet
from grape_jax.run.galleries import Gallery
from grape_jax.run.search import Found, search_hybrid, search_words


def word_baselines(
    gallery: Gallery,
    one: QuerySet,
    searched: Mapping[str, tuple[Sequence[str], np.ndarray]],
    depth: int,
) -> Iterator[tuple[str, Sequence[str], Found]]:
    """Yields method, texts and results of the queries, then of the rewrites of each policy.

    Args:
      gallery: of documents.
      searched: texts with their embeddings, of the raw queries (`RAW`) and by policy.
      depth: length of each ranked list.
    """
    assert gallery.corpus.texts is not None
    index = bm25.build(gallery.corpus.texts)
    for method, (texts, emb_QxE) in searched.items():
        words_alone, with_embeddings = by_words(method), hybrid(method)
        if method == RAW:
            words_alone, with_embeddings = BM25, HYBRID
        yield words_alone, texts, search_words(index, texts, one.queries, depth)
        found = search_hybrid(gallery, index, texts, emb_QxE, one.queries, depth)
        yield with_embeddings, texts, found
