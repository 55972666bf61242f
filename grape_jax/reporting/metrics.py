"""Retrieval metrics of ranks, with bootstrap intervals and tests.

`ranks` are int `[n]`, or `[n, P]` if queries have several right items, padded with `NO_RANK`; 1 is
best. A rank counts all items ahead, other right ones included; `among_all` makes such ranks from
those of `ranking.py`. Each metric returns one value a query, equal to trec_eval's; tables show
their mean. Uncertainty is estimated by resampling clusters, such as all queries with the same right
item.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from grape_jax.runtime.errors import UserError
from grape_jax.types import NO_RANK

CONFIDENCE = 95  # per cent
CELLS_A_BLOCK = 4_000_000  # the most cluster indices in memory


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval, in the unit of the values."""

    mean: float
    low: float
    high: float

    @property
    def clear_of_zero(self) -> bool:
        """Whether the interval does not contain zero."""
        return self.low > 0 or self.high < 0


def among_all(rank_QxP: np.ndarray) -> np.ndarray:
    """Ranks among all items, from ranks that exclude the query's other targets.

    The i-th best target of a query has the i - 1 better targets ahead of it.

    Args:
      rank_QxP: int, as in `types.Ranks`; `NO_RANK` is padding.

    Returns:
      int `[Q, P]`, the ranks of each row in ascending order, then padding.
    """
    rank_QxP = np.asarray(rank_QxP, np.int64)
    rising = np.sort(rank_QxP, axis=1)
    return np.where(rising < NO_RANK, rising + np.arange(rank_QxP.shape[1]), NO_RANK)


def places(rank_QxP: np.ndarray, order_QxP: np.ndarray) -> np.ndarray:
    """Ranks among all items, each in the place of its target.

    Args:
      rank_QxP: int, as in `types.Ranks`; `NO_RANK` is padding.
      order_QxP: by which targets of equal rank are ordered, the lowest first; then by column.

    Returns:
      int `[Q, P]`, a permutation of each row of `among_all`.
    """
    column_QxP = np.broadcast_to(np.arange(rank_QxP.shape[1]), rank_QxP.shape)
    order = np.lexsort((column_QxP, order_QxP, rank_QxP), axis=1)
    placed_QxP = np.empty(rank_QxP.shape, np.int64)
    np.put_along_axis(placed_QxP, order, among_all(rank_QxP), axis=1)
    return placed_QxP


def hits_at(ranks: np.ndarray, k: int) -> np.ndarray:
    """Hit rate: float64 `[n]`, 1.0 if any right item is among the best `k`."""
    return (best(ranks) <= _cutoff(k)).astype(np.float64)


def recalls_at(ranks: np.ndarray, k: int) -> np.ndarray:
    """Recall: float64 `[n]`, the share of a query's right items among the best `k`."""
    ranks = _checked(ranks)
    return (ranks <= _cutoff(k)).sum(axis=1) / (ranks < NO_RANK).sum(axis=1)


def reciprocal_ranks(ranks: np.ndarray, k: int = NO_RANK) -> np.ndarray:
    """MRR: float64 `[n]`, 1 / rank of the best right item; 0 beyond rank `k`."""
    return np.where(best(ranks) <= _cutoff(k), 1.0 / best(ranks), 0.0)


def average_precisions(ranks: np.ndarray) -> np.ndarray:
    """MAP: float64 `[n]`, the mean over the right items of the precision at their ranks."""
    ranks = np.sort(_checked(ranks), axis=1)
    real = ranks < NO_RANK
    precision = np.where(real, (1.0 + np.arange(ranks.shape[1])) / ranks, 0.0)
    return precision.sum(axis=1) / real.sum(axis=1)


def ndcg_at(ranks: np.ndarray, k: int, gains: np.ndarray | None = None) -> np.ndarray:
    """nDCG: float64 `[n]`.

    DCG is the sum of gain / log2(1 + rank) over the right items among the best `k`. It is divided
    by the DCG of a list with the right items at the top, in the order of their gains (Järvelin and
    Kekäläinen, 2002).

    Args:
      gains: numbers `[n, P]`, the relevance grade of the item of each rank, 0 is padding; None: all
        are relevant alike.
    """
    ranks = _checked(ranks)
    if gains is not None:
        discount = 1.0 / np.log2(2.0 + np.arange(min(k, ranks.shape[1])))
        falling = -np.sort(-np.asarray(gains, np.float64), axis=1)[:, : len(discount)]
        found = np.where(ranks <= _cutoff(k), gains / np.log2(1.0 + ranks), 0.0).sum(axis=1)
        return found / (falling * discount).sum(axis=1)
    found = np.where(ranks <= _cutoff(k), 1.0 / np.log2(1.0 + ranks), 0.0).sum(axis=1)
    ideal = np.cumsum(1.0 / np.log2(2.0 + np.arange(min(k, ranks.shape[1]))))
    return found / ideal[np.minimum((ranks < NO_RANK).sum(axis=1), k) - 1]


def best(ranks: np.ndarray) -> np.ndarray:
    """The rank of each query's best right item: int `[n]`."""
    return _checked(ranks).min(axis=1)


def clustered_bootstrap(
    values: np.ndarray, clusters: np.ndarray, draws: int = 2000, seed: int = 0
) -> list[Interval]:
    """The mean of each column with a percentile interval from resampled clusters.

    A resample draws as many clusters as there are, with replacement, and each value counts as often
    as its cluster was drawn (Davison and Hinkley, 1997, section 3.8). All columns share the
    resamples, so that intervals of differences between methods are paired.

    Args:
      values: numbers `[n, M]`, M measures of the same queries.
      clusters: labels `[n]` of any sortable type; equal labels are one cluster.
      draws: the number of resamples.
      seed: determines the resamples.

    Returns:
      M intervals, in the unit of `values`; of width 0 if there is only one cluster.

    Raises:
      UserError: there are no values, or not one label for each row.
    """
    sums_CxM, sizes_C = _by_cluster(values, clusters)
    means = []
    for drawn_RxC in _blocks_of_draws(len(sizes_C), draws, seed):
        R, C = drawn_RxC.shape
        cells = drawn_RxC + C * np.arange(R)[:, None]
        times_RxC = np.bincount(cells.ravel(), minlength=R * C).reshape(R, C).astype(np.float64)
        means.append((times_RxC @ sums_CxM) / (times_RxC @ sizes_C)[:, None])
    tail = (100 - CONFIDENCE) / 2
    low_M, high_M = np.percentile(np.concatenate(means), [tail, 100 - tail], axis=0)
    mean_M = sums_CxM.sum(axis=0) / sizes_C.sum()
    return [Interval(*map(float, one)) for one in zip(mean_M, low_M, high_M, strict=True)]


def sign_flip_test(
    differences: np.ndarray, clusters: np.ndarray, draws: int = 10_000, seed: int = 0
) -> list[float]:
    """Two-sided p-values of paired differences, by random sign flips of whole clusters.

    If two methods do not differ, the difference of a cluster is equally likely to have either sign.
    The p-value is the share of flips whose mean is at least as far from zero as the observed mean,
    which is counted as one of them (Phipson and Smyth, 2010), so that it is never 0.

    Args:
      differences: numbers `[n, M]`, method minus baseline on the same queries.
      clusters: labels `[n]`, as in `clustered_bootstrap`.
      draws: the number of random flips.
      seed: determines the flips.

    Returns:
      M p-values, at least 1 / (draws + 1).
    """
    sums_CxM, sizes_C = _by_cluster(differences, clusters)
    observed_M = np.abs(sums_CxM.sum(axis=0))
    # A margin for equal sums that are added in another order.
    threshold_M = observed_M - 1e-9 * np.abs(sums_CxM).sum(axis=0)
    as_far_M = np.ones(len(observed_M))
    for drawn_RxC in _blocks_of_draws(len(sizes_C), draws, seed, choices=2):
        as_far_M += (np.abs((2.0 * drawn_RxC - 1.0) @ sums_CxM) >= threshold_M).sum(axis=0)
    return (as_far_M / (draws + 1)).tolist()


def _blocks_of_draws(count: int, draws: int, seed: int, choices: int = 0) -> Iterator[np.ndarray]:
    """Blocks int `[R, count]` of random integers below `choices` or `count`, of `draws` rows."""
    generator = np.random.default_rng(seed)
    rows = max(1, CELLS_A_BLOCK // count)
    for start in range(0, draws, rows):
        yield generator.integers(choices or count, size=(min(rows, draws - start), count))


def _by_cluster(values: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sum of each cluster and column, float64 `[C, M]`, and its size, float64 `[C]`."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.size == 0:
        raise UserError("There are no values to average: give at least one query.")
    if np.shape(clusters) != values.shape[:1]:
        raise UserError(
            f"Each value needs a cluster label: got {len(values)} values "
            f"and labels of shape {np.shape(clusters)}."
        )
    _, cluster_of = np.unique(clusters, return_inverse=True)
    sizes_C = np.bincount(cluster_of).astype(np.float64)
    sums = [np.bincount(cluster_of, column) for column in values.T]
    return np.stack(sums, axis=1), sizes_C


def _cutoff(k: int) -> int:
    if k < 1:
        raise UserError(f"A cutoff of {k} does not exist: choose k of at least 1.")
    return k


def _checked(ranks: np.ndarray) -> np.ndarray:
    """The ranks as int `[n, P]`, with a rank for every query."""
    ranks = np.asarray(ranks)
    ranks = ranks[:, None] if ranks.ndim == 1 else ranks
    if ranks.ndim != 2 or ranks.size == 0:
        raise UserError("There are no ranks to score: give at least one query.")
    if (ranks < 1).any() or (ranks.min(axis=1) >= NO_RANK).any():
        raise UserError(
            "Ranks start at 1, and every query needs one: leave out queries whose right items are "
            "not known."
        )
    return ranks
