"""Metrics against naive loops and against ir-measures."""

import ir_measures as ir
import numpy as np
import pytest

from grape_jax import metrics
from grape_jax.errors import UserError


def _ranks(n=200, top=60, seed=0):
    return np.random.default_rng(seed).integers(1, top, size=n)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_metrics_match_ir_measures(k):
    ranks = _ranks()
    qrels = [ir.Qrel(str(i), "target", 1) for i in range(len(ranks))]
    run = [
        ir.ScoredDoc(str(i), "target" if position == rank else f"d{position}", -float(position))
        for i, rank in enumerate(ranks)
        for position in range(1, 61)
    ]
    wanted = ir.calc_aggregate([ir.R @ k, ir.RR, ir.nDCG @ k], qrels, run)
    assert metrics.recall_at(ranks, k) == pytest.approx(wanted[ir.R @ k], abs=1e-12)
    assert metrics.mrr(ranks) == pytest.approx(wanted[ir.RR], abs=1e-12)
    assert metrics.ndcg_at(ranks, k) == pytest.approx(wanted[ir.nDCG @ k], abs=1e-12)


def test_metrics_match_numbers_worked_by_hand():
    ranks = np.array([1, 3, 10, 11])
    assert metrics.recall_at(ranks, 1) == 0.25
    assert metrics.recall_at(ranks, 10) == 0.75
    assert metrics.median_rank(ranks) == 6.5
    assert metrics.median_rank(ranks[:3]) == 3
    assert metrics.mrr(ranks) == pytest.approx((1 + 1 / 3 + 1 / 10 + 1 / 11) / 4)
    assert metrics.ndcg_at(ranks, 5) == pytest.approx((1 + 1 / 2) / 4)


def _naive_bootstrap(values, clusters, draws, seed):
    labels = sorted(set(clusters))
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(draws):
        members = []
        for index in generator.integers(len(labels), size=len(labels)):
            members += [v for v, c in zip(values, clusters, strict=True) if c == labels[index]]
        means.append(np.mean(members))
    return np.mean(values), *np.percentile(means, [2.5, 97.5])


@pytest.mark.parametrize("cells_a_block", [7, 4_000_000])
def test_bootstrap_matches_the_naive_loop(monkeypatch, cells_a_block):
    # Clusters of very unequal size, in no order, with many equal values.
    monkeypatch.setattr(metrics, "CELLS_A_BLOCK", cells_a_block)
    clusters = ["b", "a", "c", "a", "a", "d", "b", "a", "e", "a"]
    values = [1.0, 0.0, 1.0, 0.0, 1.0, 0.5, 1.0, 0.0, 1.0, 0.0]
    got = metrics.clustered_bootstrap(values, clusters, draws=300, seed=3)
    wanted = _naive_bootstrap(values, clusters, draws=300, seed=3)
    np.testing.assert_allclose([got.mean, got.low, got.high], wanted, rtol=1e-12)


def test_bootstrap_with_a_value_a_cluster_is_the_normal_interval():
    hits = metrics.hits_at(_ranks(n=1000), 20)
    got = metrics.clustered_bootstrap(hits, np.arange(1000), draws=4000)
    half = 1.96 * hits.std() / np.sqrt(1000)
    assert got.low == pytest.approx(hits.mean() - half, abs=0.004)
    assert got.high == pytest.approx(hits.mean() + half, abs=0.004)


def test_copies_of_a_query_do_not_narrow_the_interval():
    hits = metrics.hits_at(_ranks(n=100), 20)
    single = metrics.clustered_bootstrap(hits, np.arange(100))
    copied = metrics.clustered_bootstrap(np.repeat(hits, 9), np.repeat(np.arange(100), 9))
    np.testing.assert_allclose(
        [copied.low, copied.mean, copied.high], [single.low, single.mean, single.high], rtol=1e-12
    )


def test_one_cluster_has_no_width():
    got = metrics.clustered_bootstrap([1.0, 0.0, 0.0, 0.0], ["same"] * 4)
    assert (got.mean, got.low, got.high) == (0.25, 0.25, 0.25)
    assert got.clear_of_zero


def test_paired_difference_sees_the_same_clusters_on_both_sides():
    clusters = np.arange(300) // 3
    b = metrics.hits_at(_ranks(n=300), 20)
    same = metrics.paired_difference(b, b, clusters)
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0)
    assert not same.clear_of_zero
    shifted = metrics.paired_difference(b + 0.1, b, clusters)
    assert shifted.low == pytest.approx(0.1) and shifted.high == pytest.approx(0.1)
    reverse = metrics.paired_difference(b, b + 0.1, clusters)
    assert reverse.mean == pytest.approx(-0.1) and reverse.clear_of_zero


def test_draws_depend_on_the_seed_alone():
    values, clusters = _ranks().astype(float), np.arange(200)
    first = metrics.clustered_bootstrap(values, clusters, seed=1)
    assert first == metrics.clustered_bootstrap(values, clusters, seed=1)
    assert first != metrics.clustered_bootstrap(values, clusters, seed=2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.recall_at(np.array([], int), 1),
        lambda: metrics.median_rank([]),
        lambda: metrics.mrr([]),
        lambda: metrics.recall_at([0, 1], 1),  # 0 marks padding: it is not a rank
        lambda: metrics.recall_at([1], 0),
        lambda: metrics.clustered_bootstrap([], []),
        lambda: metrics.clustered_bootstrap([1.0, 2.0], ["a"]),
        lambda: metrics.paired_difference([1.0], [1.0, 2.0], ["a", "b"]),
    ],
)
def test_what_has_no_answer_is_refused(call):
    with pytest.raises(UserError):
        call()
