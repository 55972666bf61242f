"""Baselines of a text collection: search by words (BM25), alone and beside the embeddings."""

from collections.abc import Iterator, Mapping, Sequence

from grape_jax.reporting.results import BM25, HYBRID, by_words, hybrid
from grape_jax.retrieval import bm25
from grape_jax.retrieval.encoder import Retriever
from grape_jax.run.answers import QuerySet
from grape_jax.run.galleries import Gallery
from grape_jax.run.search import Found, search_hybrid, search_words


def word_baselines(
    gallery: Gallery,
    retriever: Retriever,
    one: QuerySet,
    rewrites: Mapping[str, Sequence[str]],
    depth: int,
) -> Iterator[tuple[str, Sequence[str], Found]]:
    """Yields method, texts and results of the queries, then of the rewrites of each policy.

    Args:
      gallery: of documents.
      rewrites: by policy, in the order of the queries.
      depth: length of each ranked list.
    """
    assert gallery.corpus.texts is not None
    index = bm25.build(gallery.corpus.texts)
    raw = [query.text for query in one.queries]
    searched: list[tuple[str, str, Sequence[str]]] = [(BM25, HYBRID, raw)]
    searched += [(by_words(policy), hybrid(policy), texts) for policy, texts in rewrites.items()]
    for words_alone, with_embeddings, texts in searched:
        yield words_alone, texts, search_words(index, texts, one.queries, depth)
        found = search_hybrid(gallery, retriever, index, texts, one.queries, depth)
        yield with_embeddings, texts, found
