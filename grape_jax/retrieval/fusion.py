"""Several searches made into one: of their embeddings, or of their ranked lists. Arrays only."""

import numpy as np

from grape_jax.types import NO_RANK

RRF_K = 60  # Cormack, Clarke and Büttcher (2009): what keeps one list's top from deciding alone


def mean_embedding(emb_MxQxE: np.ndarray) -> np.ndarray:
    """The direction of the mean of unit vectors: float32 `[Q, E]`.

    Of a query and its rewrite, this is SQUARE's fusion; of captions and the query, HyDE's.

    Where they cancel out there is no direction, and the first is taken.
    """
    mean_QxE = np.asarray(emb_MxQxE, np.float64).mean(axis=0)
    length_Q = np.linalg.norm(mean_QxE, axis=-1, keepdims=True)
    found = mean_QxE / np.where(length_Q > 1e-6, length_Q, 1)
    return np.where(length_Q > 1e-6, found, emb_MxQxE[0]).astype(np.float32)


def reciprocal_rank_fusion(rows_MxD: np.ndarray) -> np.ndarray:
    """One ranked list out of M: corpus rows by the sum of 1 / (60 + rank) over the lists.

    A list says nothing about rows that it does not hold. Rows that the sums do not tell apart stand
    in the order of their numbers (Cormack, Clarke and Büttcher, 2009).

    Args:
      rows_MxD: int, each list's corpus rows, best first; -1 is padding behind them.

    Returns:
      int [M * D], every row that any list holds, best first, -1 behind them.
    """
    rows_MxD = np.asarray(rows_MxD)
    weights_MxD = np.broadcast_to(1.0 / (RRF_K + 1 + np.arange(rows_MxD.shape[1])), rows_MxD.shape)
    real = rows_MxD >= 0
    rows, place = np.unique(rows_MxD[real], return_inverse=True)
    # Rounded, so that the order of a sum breaks no tie.
    scores = np.round(np.bincount(place, weights_MxD[real], minlength=len(rows)), 12)
    fused = np.full(rows_MxD.size, -1, rows_MxD.dtype)
    fused[: len(rows)] = rows[np.lexsort((rows, -scores))]
    return fused


def ranks_in(
    list_D: np.ndarray, targets: np.ndarray, among: np.ndarray | None = None, excluded: int = -1
) -> np.ndarray:
    """Ranks that leave other targets out, as `ranking.target_ranks` gives them, in a fused list.

    Corpus rows that the list does not hold stand behind it, in the order of their numbers.

    Args:
      list_D: int, corpus rows, best first, -1 behind them.
      targets: int [P], corpus rows; -1 is padding.
      among: int [X], the rows that targets compete with, -1 is padding; None is the whole corpus.
      excluded: a row that leaves the corpus, which the list does not hold; -1 is none.

    Returns:
      int [P], 1 is best, `NO_RANK` where the target is padding.
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
        behind = lower[(lower >= 0) & (lower != excluded)]
        unlisted = ~np.isin(behind, listed) & ~np.isin(behind, targets)
        return 1 + int(ahead_in_list[-1]) + int(unlisted.sum())

    return np.array([rank(int(target)) for target in targets], np.int64)
