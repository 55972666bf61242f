"""Ranked lists and ranks of queries in a gallery, by the kernels that training ranks with."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from grape_jax.data.benchmark import Query, excluded_of, gains_of, targets_of
from grape_jax.reporting import metrics
from grape_jax.retrieval import bm25, fusion, ranking
from grape_jax.retrieval.bm25 import WordIndex
from grape_jax.retrieval.encoder import Retriever
from grape_jax.run.galleries import Gallery
from grape_jax.types import NO_RANK

FUSED_DEPTH = 1000  # length of the lists that are fused
FUSED_CHUNK = 512  # queries whose lists are fused at one time


@dataclasses.dataclass(frozen=True)
class Found:
    """The results of a search, in the order of the queries."""

    ranks_QxP: np.ndarray  # int, as in `types.Ranks`: other targets left out
    subset_QxP: np.ndarray | None  # the same among each query's subset
    rows_QxD: np.ndarray  # int, the beginning of each ranked list, -1 is padding
    # int, relevance grades in the order of the targets' ranks, 0 is padding; None: all are equal
    gains_QxP: np.ndarray | None = None


def search(gallery: Gallery, emb_QxE: np.ndarray, queries: Sequence[Query], depth: int) -> Found:
    """Ranks the targets of queries and lists the nearest items.

    Args:
      emb_QxE: one embedding a query.
      depth: length of each ranked list; less if the gallery is smaller.
    """
    subset_QxX = _subsets_of(queries)
    parts = []
    for emb, targets, excluded, members in _tiles(
        emb_QxE, targets_of(queries, _most_targets(queries)), excluded_of(queries), subset_QxX
    ):
        where = {"mesh": gallery.mesh, "size": len(gallery)}
        depth = min(depth, len(gallery))
        found = ranking.target_ranks(emb, gallery.index, targets, excluded, **where)
        rows = ranking.nearest_rows(emb, gallery.index, excluded, depth=depth, **where)
        subset = None
        if members is not None:
            subset = ranking.subset_ranks(emb, gallery.index, targets, members, mesh=gallery.mesh)
        parts.append((found.rank_QxP, subset, rows, found.similarity_QxP))
    joined = jax.tree.map(lambda *x: np.concatenate(x)[: len(emb_QxE)], *jax.device_get(parts))
    ranks_QxP, subset_QxP, rows_QxD, similarity_QxP = joined
    gains_QxP = _gains_by_rank(queries, ranks_QxP, -similarity_QxP)
    return Found(ranks_QxP, subset_QxP, rows_QxD, gains_QxP)


def search_words(
    index: WordIndex, texts: Sequence[str], queries: Sequence[Query], depth: int
) -> Found:
    """`search` by words. Documents that share no word with the text come last, in their order."""
    most, depth = _most_targets(queries), min(depth, index.size)
    ranks_QxP = np.full((len(queries), most), NO_RANK, np.int64)
    score_QxP = np.zeros((len(queries), most))
    rows_QxD = np.full((len(queries), depth), -1, np.int32)
    for i, (text, query) in enumerate(zip(texts, queries, strict=True)):
        scores_N, targets_P = index.scores(text), np.asarray(query.targets, np.int64)
        ranks_QxP[i, : len(targets_P)] = bm25.ranks(scores_N, targets_P)
        score_QxP[i, : len(targets_P)] = scores_N[targets_P]
        rows_QxD[i] = bm25.best_rows(scores_N, depth)
    return Found(ranks_QxP, None, rows_QxD, _gains_by_rank(queries, ranks_QxP, -score_QxP))


def search_hybrid(
    gallery: Gallery,
    index: WordIndex,
    texts: Sequence[str],
    emb_QxE: np.ndarray,
    queries: Sequence[Query],
    depth: int,
) -> Found:
    """`search` by words and by embeddings, the two ranked lists fused by reciprocal rank.

    The list of the words ends with the last document that shares one.

    Args:
      emb_QxE: of the texts.
    """
    parts = []
    for start in range(0, len(queries), FUSED_CHUNK):
        chunk = slice(start, start + FUSED_CHUNK)
        asked = queries[chunk]
        dense = search(gallery, emb_QxE[chunk], asked, FUSED_DEPTH)
        length = dense.rows_QxD.shape[1]
        by_words = np.full((len(asked), length), -1, np.int32)
        for i, text in enumerate(texts[chunk]):
            scores_N = index.scores(text)
            rows = bm25.best_rows(scores_N, length)
            rows = rows[scores_N[rows] > 0]
            by_words[i, : len(rows)] = rows
        rows_2xQxD = np.stack([dense.rows_QxD, by_words])
        parts.append(_fuse(rows_2xQxD, asked, _most_targets(queries), depth))
    return _join(parts)


def search_fused(
    gallery: Gallery,
    retriever: Retriever,
    texts_MxQ: Sequence[Sequence[str]],
    queries: Sequence[Query],
    depth: int,
) -> Found:
    """`search` with M texts a query, their ranked lists fused by reciprocal rank."""
    parts = []
    most = _most_targets(queries)
    for start in range(0, len(queries), FUSED_CHUNK):
        chunk = slice(start, start + FUSED_CHUNK)
        asked = queries[chunk]
        lists = [
            search(gallery, retriever.embed_texts(list(texts[chunk])), asked, FUSED_DEPTH)
            for texts in texts_MxQ
        ]
        parts.append(_fuse(np.stack([found.rows_QxD for found in lists]), asked, most, depth))
    return _join(parts)


def _fuse(rows_MxQxD: np.ndarray, queries: Sequence[Query], most: int, depth: int) -> Found:
    """Fuses the M ranked lists of each query by reciprocal rank.

    Args:
      most: P, the largest number of targets of a query.
    """
    parts = []
    targets_QxP, subset_QxX = targets_of(queries, most), _subsets_of(queries)
    for i, query in enumerate(queries):
        fused_D = fusion.reciprocal_rank_fusion(rows_MxQxD[:, i])
        ranks_P = fusion.ranks_in(fused_D, targets_QxP[i], excluded=query.image)
        subset_P = None
        if subset_QxX is not None:
            subset_P = fusion.ranks_in(fused_D, targets_QxP[i], subset_QxX[i], query.image)
        rows_D = np.full(depth, -1)
        rows_D[: len(fused_D)] = fused_D[:depth]
        # Targets of equal rank stand beside each other in the list, or follow it in their order.
        listed = fused_D[:, None] == targets_QxP[i]
        place_P = np.where(listed.any(0), listed.argmax(0), len(fused_D))
        parts.append((ranks_P, subset_P, rows_D, place_P))
    stacked = jax.tree.map(lambda *x: np.stack(x), *parts)
    ranks_QxP, subset_QxP, rows_QxD, place_QxP = stacked
    return Found(ranks_QxP, subset_QxP, rows_QxD, _gains_by_rank(queries, ranks_QxP, place_QxP))


def _join(parts: Sequence[Found]) -> Found:
    """The results of consecutive queries."""
    names = [field.name for field in dataclasses.fields(Found)]
    fields: list[Any] = [[getattr(part, name) for part in parts] for name in names]
    joined: list[Any] = [None if one[0] is None else np.concatenate(one) for one in fields]
    return Found(*joined)


def _gains_by_rank(
    queries: Sequence[Query], ranks_QxP: np.ndarray, order_QxP: np.ndarray
) -> np.ndarray | None:
    """Relevance grades in the order of `metrics.among_all`; None if no query has grades.

    Args:
      order_QxP: orders targets of equal rank, the lowest first.
    """
    gains_QxP = gains_of(queries, ranks_QxP.shape[1])
    if gains_QxP is None:
        return None
    by_rank = np.argsort(metrics.places(ranks_QxP, order_QxP), axis=1)
    return np.take_along_axis(gains_QxP, by_rank, axis=1)


def target_ranks(
    gallery: Gallery, emb_QxE: np.ndarray, queries: Sequence[Query], targets_QxP: np.ndarray
) -> np.ndarray:
    """The rank of every target, int `[Q, P]`; `NO_RANK` where it is padding.

    Args:
      emb_QxE: one embedding a query.
      targets_QxP: as `Queries.targets` gives them.
    """
    ranks = [
        ranking.target_ranks(
            emb, gallery.index, targets, excluded, mesh=gallery.mesh, size=len(gallery)
        ).rank_QxP
        for emb, targets, excluded, _ in _tiles(emb_QxE, targets_QxP, excluded_of(queries))
    ]
    return np.concatenate(jax.device_get(ranks))[: len(queries)]


def best_ranks(
    gallery: Gallery, emb_QxE: np.ndarray, queries: Sequence[Query], targets_QxP: np.ndarray
) -> np.ndarray:
    """The best rank of any target, int `[Q]`; `NO_RANK` where the truth is withheld."""
    return target_ranks(gallery, emb_QxE, queries, targets_QxP).min(axis=1)


def nearest(
    bank_NxE: np.ndarray, emb_QxE: np.ndarray, top: int, excluded_Qx1: np.ndarray | None = None
) -> np.ndarray:
    """Corpus rows of the `top` most similar items, best first, ties by row: int `[Q, top]`.

    Args:
      excluded_Qx1: a row that leaves the corpus for each query, -1 is none (`excluded_of`).
    """
    rows = []
    for query, emb in enumerate(emb_QxE):
        similarity_N = bank_NxE @ emb
        if excluded_Qx1 is not None and excluded_Qx1[query, 0] >= 0:
            similarity_N[excluded_Qx1[query, 0]] = -np.inf
        rows.append(_highest(similarity_N, top))
    return np.stack(rows) if rows else np.zeros((0, top), np.int64)


def _highest(similarity_N: np.ndarray, top: int) -> np.ndarray:
    """The rows of the highest similarities, best first, ties by row, without sorting the others."""
    size = len(similarity_N)
    if 0 < top < size:
        least = np.partition(similarity_N, size - top)[size - top]
        candidates = np.flatnonzero(similarity_N >= least)
    else:
        candidates = np.arange(size)
    order = np.argsort(-similarity_N[candidates], kind="stable")
    return candidates[order[:top]]


def _tiles(emb_QxE, targets_QxP, excluded_Qx1=None, subset_QxX=None):
    """Yields whole tiles of queries, padded, so that their number compiles nothing new."""
    tile = ranking.QUERY_TILE
    missing = -len(emb_QxE) % tile
    arrays = [(emb_QxE, 0), (targets_QxP, -1), (excluded_Qx1, -1), (subset_QxX, -1)]
    padded = [
        x if x is None else np.pad(x, ((0, missing), (0, 0)), constant_values=fill)
        for x, fill in arrays
    ]
    for start in range(0, len(emb_QxE), tile):
        yield tuple(x if x is None else x[start : start + tile] for x in padded)


def _subsets_of(queries: Sequence[Query]) -> np.ndarray | None:
    """The rows of the subsets, int32 `[Q, X]` padded with -1; None unless all queries have one."""
    if not all(query.subset for query in queries):
        return None
    subset_QxX = np.full((len(queries), max(len(query.subset) for query in queries)), -1, np.int32)
    for row, query in enumerate(queries):
        subset_QxX[row, : len(query.subset)] = query.subset
    return subset_QxX


def _most_targets(queries: Sequence[Query]) -> int:
    return max(1, max(len(query.targets) for query in queries))
