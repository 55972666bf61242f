"""From embeddings and texts to ranked lists and ranks, whatever a query looks for.

Several right items, none that is known, an own picture that leaves the corpus, a subset that the
targets compete with: `data/benchmark.py` says what a query may have.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from grape_jax.data.benchmark import Query, excluded_of, targets_of
from grape_jax.retrieval import fusion, ranking
from grape_jax.run.context import Job

FUSED_DEPTH = 1000  # how much of each list a fusion of lists reads
FUSED_CHUNK = 512  # queries whose lists are fused at one time


@dataclasses.dataclass(frozen=True)
class Found:
    """What some embeddings find, in the order of their queries."""

    ranks_QxP: np.ndarray  # int, as in `types.Ranks`: other targets left out
    subset_QxP: np.ndarray | None  # the same among each query's subset
    rows_QxD: np.ndarray  # int, the beginning of each ranked list, -1 is padding


def search(
    job: Job, emb_QxE: np.ndarray, queries: Sequence[Query], split: str, depth: int
) -> Found:
    """Ranks these embeddings in the split's corpus, by the kernels that training ranks with.

    Args:
      depth: how much of each ranked list to return; less where the corpus is smaller.
    """
    gallery = job.gallery(split)
    size = len(gallery)
    targets_QxP = targets_of(queries, _most_targets(queries))
    excluded_Qx1, subset_QxX = excluded_of(queries), _subsets_of(queries)
    # Whole tiles, one at a time: another number of texts compiles nothing.
    tile = ranking.QUERY_TILE
    missing = -len(emb_QxE) % tile
    filled = lambda x, fill: np.pad(x, ((0, missing), (0, 0)), constant_values=fill)
    parts = []
    for start in range(0, len(emb_QxE), tile):
        part = slice(start, start + tile)
        emb = filled(emb_QxE, 0)[part]
        targets = filled(targets_QxP, -1)[part]
        excluded = None if excluded_Qx1 is None else filled(excluded_Qx1, -1)[part]
        where = {"mesh": job.mesh, "size": size}
        ranks = ranking.target_ranks(emb, gallery.index, targets, excluded, **where).rank_QxP
        rows = ranking.nearest_rows(emb, gallery.index, excluded, depth=min(depth, size), **where)
        subset = None
        if subset_QxX is not None:
            members = filled(subset_QxX, -1)[part]
            subset = ranking.subset_ranks(emb, gallery.index, targets, members, mesh=job.mesh)
        parts.append((ranks, subset, rows))
    joined = jax.tree.map(lambda *x: np.concatenate(x)[: len(emb_QxE)], *jax.device_get(parts))
    return Found(*joined)


def search_fused(
    job: Job,
    texts_MxQ: Sequence[Sequence[str]],
    queries: Sequence[Query],
    split: str,
    depth: int,
) -> Found:
    """`search` with M texts a query, their ranked lists fused by reciprocal rank."""
    parts = []
    most = _most_targets(queries)
    for start in range(0, len(queries), FUSED_CHUNK):
        chunk = slice(start, start + FUSED_CHUNK)
        asked = queries[chunk]
        lists = [
            search(job, job.retriever.embed_texts(list(texts[chunk])), asked, split, FUSED_DEPTH)
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


def _subsets_of(queries: Sequence[Query]) -> np.ndarray | None:
    """The rows of the subsets, padded with -1: int32 `[Q, X]`; None unless all queries have one."""
    if not all(query.subset for query in queries):
        return None
    subset_QxX = np.full((len(queries), max(len(query.subset) for query in queries)), -1, np.int32)
    for row, query in enumerate(queries):
        subset_QxX[row, : len(query.subset)] = query.subset
    return subset_QxX


def _most_targets(queries: Sequence[Query]) -> int:
    return max(1, max(len(query.targets) for query in queries))
