"""Ranked lists and ranks of queries in a gallery, by the kernels that training ranks with."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from grape_jax.data.benchmark import Query, excluded_of, targets_of
from grape_jax.retrieval import fusion, ranking
from grape_jax.retrieval.encoder import Retriever
from grape_jax.run.galleries import Gallery

FUSED_DEPTH = 1000  # length of the lists that are fused
FUSED_CHUNK = 512  # queries whose lists are fused at one time


@dataclasses.dataclass(frozen=True)
class Found:
    """The results of a search, in the order of the queries."""

    ranks_QxP: np.ndarray  # int, as in `types.Ranks`: other targets left out
    subset_QxP: np.ndarray | None  # the same among each query's subset
    rows_QxD: np.ndarray  # int, the beginning of each ranked list, -1 is padding


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
        ranks = ranking.target_ranks(emb, gallery.index, targets, excluded, **where).rank_QxP
        rows = ranking.nearest_rows(emb, gallery.index, excluded, depth=depth, **where)
        subset = None
        if members is not None:
            subset = ranking.subset_ranks(emb, gallery.index, targets, members, mesh=gallery.mesh)
        parts.append((ranks, subset, rows))
    joined = jax.tree.map(lambda *x: np.concatenate(x)[: len(emb_QxE)], *jax.device_get(parts))
    return Found(*joined)


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
        rows_MxQxD = np.stack([found.rows_QxD for found in lists])
        targets_QxP = targets_of(asked, most)
        subset_QxX = _subsets_of(asked)
        for i, query in enumerate(asked):
            fused_D = fusion.reciprocal_rank_fusion(rows_MxQxD[:, i])
            ranks_P = fusion.ranks_in(fused_D, targets_QxP[i], excluded=query.image)
            subset_P = None
            if subset_QxX is not None:
                subset_P = fusion.ranks_in(fused_D, targets_QxP[i], subset_QxX[i], query.image)
            rows_D = np.full(depth, -1)
            rows_D[: len(fused_D)] = fused_D[:depth]
            parts.append((ranks_P, subset_P, rows_D))
    return Found(*jax.tree.map(lambda *x: np.stack(x), *parts))


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
