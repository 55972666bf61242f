"""Retrieval metrics from ranks: arrays in, numbers out.

A rank counts from 1, the best, and belongs to one query with one right answer. Uncertainty comes
from a bootstrap over clusters: queries about the same concept share their target, so they are drawn
together or not at all.
"""

import dataclasses

import numpy as np

from grape_jax.errors import UserError

CONFIDENCE = 95  # per cent, of every interval here
CELLS_A_BLOCK = 4_000_000  # the bootstrap draws at most this many cluster indices at once


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval, in the unit of the values."""

    mean: float
    low: float
    high: float

    @property
    def clear_of_zero(self) -> bool:
        """True where the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def recall_at(ranks: np.ndarray, k: int) -> float:
    """The share of queries whose target is among the best `k`, 0 to 1.

    Args:
      ranks: int [n], 1 is best.
      k: at least 1.

    Raises:
      UserError: no ranks, a rank below 1, or `k` below 1.
    """
    return float(hits_at(ranks, k).mean())


def hits_at(ranks: np.ndarray, k: int) -> np.ndarray:
    """float64 [n], 1.0 where the target is among the best `k`: the values behind `recall_at`."""
    if k < 1:
        raise UserError(f"Recall@{k} does not exist: choose k of at least 1.")
    return (_checked(ranks) <= k).astype(np.float64)


def median_rank(ranks: np.ndarray) -> float:
    """The median of int [n] ranks; halfway between the middle two where n is even."""
    return float(np.median(_checked(ranks)))


def mrr(ranks: np.ndarray) -> float:
    """Mean reciprocal rank of int [n] ranks, 0 to 1."""
    return float((1.0 / _checked(ranks)).mean())


def ndcg_at(ranks: np.ndarray, k: int) -> float:
    """nDCG@k of int [n] ranks where each query has a single target, 0 to 1.

    With one target the ideal gain is 1, so a query scores 1 / log2(1 + rank), or 0 beyond `k`
    (Järvelin and Kekäläinen, 2002).
    """
    hits = hits_at(ranks, k)
    return float((hits / np.log2(1.0 + np.asarray(ranks))).mean())


def clustered_bootstrap(
    values: np.ndarray, clusters: np.ndarray, draws: int = 2000, seed: int = 0
) -> Interval:
    """The mean of `values` with its percentile interval over resampled clusters.

    Clusters are drawn with replacement, as many as there are, and every value of a drawn cluster
    counts as often as its cluster was drawn (Davison and Hinkley, 1997, section 3.8). The same
    clusters, draws and seed give the same resamples whatever the values are.

    Args:
      values: numbers [n].
      clusters: labels [n], of any type that sorts; equal labels are one cluster.
      draws: how many resamples.
      seed: of the draws.

    Returns:
      The interval, in the unit of `values`. One single cluster gives an interval without width.

    Raises:
      UserError: no values, or not one label for each value.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise UserError("There are no values to average: give the bootstrap at least one query.")
    if np.shape(clusters) != values.shape:
        raise UserError(
            f"Each value needs one cluster label: got {values.size} values "
            f"and labels of shape {np.shape(clusters)}."
        )
    _, cluster_of = np.unique(clusters, return_inverse=True)
    # A resample needs only each cluster's sum and size, however many values it holds.
    means = _resampled_means(np.bincount(cluster_of, values), np.bincount(cluster_of), draws, seed)
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def paired_difference(
    a: np.ndarray, b: np.ndarray, clusters: np.ndarray, draws: int = 2000, seed: int = 0
) -> Interval:
    """The mean of `a` - `b` with its interval; both sides see the same resamples.

    Args:
      a, b: numbers [n], two methods' values on the same queries in the same order.
      clusters, draws, seed: as in `clustered_bootstrap`.

    Raises:
      UserError: the two sides differ in length, or as in `clustered_bootstrap`.
    """
    if np.shape(a) != np.shape(b):
        raise UserError(
            f"A paired difference needs the same queries on both sides: "
            f"got {np.shape(a)} and {np.shape(b)} values."
        )
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return clustered_bootstrap(difference, clusters, draws, seed)


def _resampled_means(sums: np.ndarray, sizes: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """float64 [draws], the mean over all values of each resample of the clusters."""
    generator = np.random.default_rng(seed)
    count = len(sums)
    rows = max(1, CELLS_A_BLOCK // count)
    means = []
    for start in range(0, draws, rows):
        drawn = generator.integers(count, size=(min(rows, draws - start), count))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    return np.concatenate(means)


def _checked(ranks: np.ndarray) -> np.ndarray:
    ranks = np.asarray(ranks)
    if ranks.ndim != 1 or ranks.size == 0:
        raise UserError("There are no ranks to score: give at least one query.")
    if (ranks < 1).any():
        raise UserError(f"A rank counts from 1, the best: got {ranks.min()}.")
    return ranks
