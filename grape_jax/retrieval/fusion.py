"""Fusion of several searches: of their embeddings, or of their ranked lists. NumPy arrays only."""

from collections.abc import Sequence

import numpy as np

from grape_jax.types import NO_RANK

RRF_K = 60  # of Cormack, Clarke and Büttcher (2009); it damps the top ranks of a single list


def mean_embedding(emb_MxQxE: np.ndarray, weights_M: Sequence[float] | None = None) -> np.ndarray:
    """The normalised mean of unit vectors.

    With a query and its rewrite, this is the fusion of SQUARE; with captions and the query, that of
    HyDE. Where the mean is zero, the first vector is returned.

    Args:
      emb_MxQxE: float32, unit embeddings of M searches for each of Q queries.
      weights_M: of the searches, with a sum above 0; None: equal.

    Returns:
      float32 `[Q, E]` of unit length.
    """
    mean_QxE = np.average(np.asarray(emb_MxQxE, np.float64), axis=0, weights=weights_M)
    length_Q = np.linalg.norm(mean_QxE, axis=-1, keepdims=True)
    found = mean_QxE / np.where(length_Q > 1e-6, length_Q, 1)
    return np.where(length_Q > 1e-6, found, emb_MxQxE[0]).astype(np.float32)


def reciprocal_rank_fusion(rows_MxD: np.ndarray) -> np.ndarray:
    """One ranked list out of M, by the sum of 1 / (60 + rank) over the lists.

    A row missing from a list gets nothing from it. Ties are ordered by row (Cormack, Clarke and
    Büttcher 2009).

    Args:
      rows_MxD: int, corpus rows of each list, best first; -1 is padding at the end.

    Returns:
      int `[M * D]`, the rows of all lists, best first, then -1.
    """
    rows_MxD = np.asarray(rows_MxD)
    weights_MxD = np.broadcast_to(1.0 / (RRF_K + 1 + np.arange(rows_MxD.shape[1])), rows_MxD.shape)
    real = rows_MxD >= 0
    rows, place = np.unique(rows_MxD[real], return_inverse=True)
    # Rounded, so that the order of summation does not break ties.
    scores = np.round(np.bincount(place, weights_MxD[real], minlength=len(rows)), 12)
    fused = np.full(rows_MxD.size, -1, rows_MxD.dtype)
    fused[: len(rows)] = rows[np.lexsort((rows, -scores))]
    return fused


def ranks_in(
    list_D: np.ndarray, targets: np.ndarray, among: np.ndarray | None = None, excluded: int = -1
) -> np.ndarray:
    """Ranks of targets in a fused list, defined as by `ranking.target_ranks`.

    Corpus rows missing from the list follow it in ascending order.

    Args:
      list_D: int, corpus rows, best first, then -1.
      targets: int `[P]`, corpus rows; -1 is padding.
      among: int `[X]`, rows that the targets compete with, -1 is padding; None: the whole corpus.
      excluded: a row left out of the corpus, which the list does not contain; -1: none.

    Returns:
      int64 `[P]`, 1 is best, `NO_RANK` where the target is padding.
    """
    listed = list_D[list_D >= 0]
    competes = np.ones(len(listed), bool) if among is None else np.isin(listed, among)
    competes &= ~np.isin(listed, targets)
    ahead_in_list = np.concatenate([[0], np.cumsum(competes)])

    def rank(target: int) -> int:
        if target < 0:
            return NO_RANK
        (place,) = np.nonzero(listed == target)
        if len(place):
            return 1 + int(ahead_in_list[place[0]])
        lower = np.arange(target) if among is None else np.unique(among[among < target])
        candidates = lower[(lower >= 0) & (lower != excluded)]
        unlisted = ~np.isin(candidates, listed) & ~np.isin(candidates, targets)
        return 1 + int(ahead_in_list[-1]) + int(unlisted.sum())

    return np.array([rank(int(target)) for target in targets], np.int64)
