"""Metrics against naive loops, scipy and ir-measures."""

import ir_measures as ir
import numpy as np
import pytest
import scipy.stats
import thorough
from hypothesis import given, settings
from hypothesis import strategies as st

from grape_jax.reporting import metrics
from grape_jax.runtime.errors import UserError
from grape_jax.types import NO_RANK


def _ranks(n=200, top=60, seed=0):
    return np.random.default_rng(seed).integers(1, top, size=n)


def _several(n=200, size=60, seed=0):
    """[n, 4] ranks among all, in rising order, of one to four targets each."""
    generator = np.random.default_rng(seed)
    ranks = np.full((n, 4), NO_RANK)
    for row in ranks:
        count = generator.integers(1, 5)
        row[:count] = np.sort(generator.choice(np.arange(1, size + 1), count, replace=False))
    return ranks


@pytest.mark.parametrize("ranks", [_ranks()[:, None], _several()], ids=["one", "several"])
@pytest.mark.parametrize("k", [1, 2, 5, 10, 50])
def test_metrics_match_ir_measures(k, ranks):
    qrels = [ir.Qrel(str(i), f"d{r}", 1) for i, row in enumerate(ranks) for r in row if r < NO_RANK]
    run = [
        ir.ScoredDoc(str(i), f"d{position}", -float(position))
        for i in range(len(ranks))
        for position in range(1, 61)
    ]
    wanted = ir.calc_aggregate([ir.R @ k, ir.Success @ k, ir.RR, ir.nDCG @ k], qrels, run)
    found = {
        ir.R @ k: metrics.recalls_at(ranks, k),
        ir.Success @ k: metrics.hits_at(ranks, k),
        ir.RR: metrics.reciprocal_ranks(ranks),
        ir.nDCG @ k: metrics.ndcg_at(ranks, k),
    }
    for measure, values in found.items():
        assert values.mean() == pytest.approx(wanted[measure], abs=1e-12), measure


def test_metrics_match_numbers_worked_by_hand():
    ranks = np.array([1, 3, 10, 11])
    assert metrics.recalls_at(ranks, 1).mean() == 0.25
    assert metrics.hits_at(ranks, 10).mean() == 0.75
    assert metrics.reciprocal_ranks(ranks).tolist() == [1, 1 / 3, 1 / 10, 1 / 11]
    assert metrics.ndcg_at(ranks, 5).tolist() == [1, 1 / 2, 0, 0]
    two = np.array([[2, 7], [4, NO_RANK]])
    assert metrics.recalls_at(two, 5).tolist() == [0.5, 1]
    assert metrics.hits_at(two, 5).tolist() == [1, 1]
    assert metrics.best(two).tolist() == [2, 4]


@given(st.data())
@settings(max_examples=thorough.examples(60), deadline=None)
def test_ranks_among_all_match_a_list_that_is_walked(data):
    """Ranks that leave other targets out, made of a random order, and back."""
    size = data.draw(st.integers(1, 12))
    order = data.draw(st.permutations(range(size)))
    targets = data.draw(st.sets(st.integers(0, size - 1), max_size=4))
    alone = [
        1 + sum(item not in targets for item in order[: order.index(target)]) for target in targets
    ]
    wanted = sorted(order.index(target) + 1 for target in targets)
    padding = [NO_RANK] * (4 - len(targets))
    dtype = data.draw(st.sampled_from([np.int32, np.int64]))  # the kernel's, and a fusion's
    found = metrics.among_all(np.array([padding + alone], dtype))
    assert found.tolist() == [wanted + padding]


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


# Clusters of very unequal size, in no order, with many equal values.
CLUSTERS = ["b", "a", "c", "a", "a", "d", "b", "a", "e", "a"]
VALUES = np.array([[1, 0, 1, 0, 1, 0.5, 1, 0, 1, 0], [-1, 0, 0, -1, 1, 0, 0, 0.25, 0, 1]]).T


@pytest.mark.parametrize("cells_a_block", [7, 4_000_000])
def test_bootstrap_matches_the_naive_loop(monkeypatch, cells_a_block):
    monkeypatch.setattr(metrics, "CELLS_A_BLOCK", cells_a_block)
    found = metrics.clustered_bootstrap(VALUES, CLUSTERS, draws=300, seed=3)
    for got, values in zip(found, VALUES.T, strict=True):
        wanted = _naive_bootstrap(values, CLUSTERS, draws=300, seed=3)
        np.testing.assert_allclose([got.mean, got.low, got.high], wanted, rtol=1e-12, atol=1e-15)


def test_bootstrap_with_a_value_a_cluster_is_that_of_scipy():
    values = _ranks(n=300).astype(float)
    (got,) = metrics.clustered_bootstrap(values[:, None], np.arange(300), draws=20_000)
    wanted = scipy.stats.bootstrap(
        [values], np.mean, n_resamples=20_000, method="percentile", rng=1
    ).confidence_interval
    # Both are means of 300 ranks below 60; 20,000 draws place a bound to about 0.02.
    assert got.low == pytest.approx(wanted.low, abs=0.08)
    assert got.high == pytest.approx(wanted.high, abs=0.08)


def test_copies_of_a_query_do_not_narrow_the_interval():
    hits = metrics.hits_at(_ranks(n=100), 20)[:, None]
    (single,) = metrics.clustered_bootstrap(hits, np.arange(100))
    (copied,) = metrics.clustered_bootstrap(np.repeat(hits, 9, 0), np.repeat(np.arange(100), 9))
    np.testing.assert_allclose(
        [copied.low, copied.mean, copied.high], [single.low, single.mean, single.high], rtol=1e-12
    )


def test_one_cluster_and_one_query_have_no_width():
    (got,) = metrics.clustered_bootstrap([[1.0], [0.0], [0.0], [0.0]], ["same"] * 4)
    assert (got.mean, got.low, got.high) == (0.25, 0.25, 0.25)
    assert got.clear_of_zero
    (got,) = metrics.clustered_bootstrap([[0.5]], ["only"])
    assert (got.mean, got.low, got.high) == (0.5, 0.5, 0.5)
    assert metrics.sign_flip_test([[0.5]], ["only"]) == [1.0]


def test_draws_depend_on_the_seed_alone():
    values, clusters = _ranks().astype(float)[:, None], np.arange(200)
    first = metrics.clustered_bootstrap(values, clusters, seed=1)
    assert first == metrics.clustered_bootstrap(values, clusters, seed=1)
    assert first != metrics.clustered_bootstrap(values, clusters, seed=2)


def _naive_sign_flips(values, clusters, draws, seed):
    labels = sorted(set(clusters))
    generator = np.random.default_rng(seed)
    far = 1
    for _ in range(draws):
        sign = dict(zip(labels, 2 * generator.integers(2, size=len(labels)) - 1, strict=True))
        flipped = [sign[c] * v for v, c in zip(values, clusters, strict=True)]
        far += abs(sum(flipped)) >= abs(sum(values))
    return far / (draws + 1)


@pytest.mark.parametrize("cells_a_block", [7, 4_000_000])
def test_sign_flips_match_the_naive_loop(monkeypatch, cells_a_block):
    monkeypatch.setattr(metrics, "CELLS_A_BLOCK", cells_a_block)
    found = metrics.sign_flip_test(VALUES, CLUSTERS, draws=200, seed=5)
    wanted = [_naive_sign_flips(values, CLUSTERS, 200, 5) for values in VALUES.T.tolist()]
    assert found == pytest.approx(wanted, abs=1e-12)


def test_sign_flips_approach_scipys_exact_test():
    values = np.random.default_rng(4).normal(0.4, 1, size=12)
    (found,) = metrics.sign_flip_test(values[:, None], np.arange(12), draws=40_000)
    mean = lambda x, axis: np.mean(x, axis=axis)
    exact = scipy.stats.permutation_test([values], mean, permutation_type="samples")
    assert 0.02 < exact.pvalue < 0.9
    # 40,000 flips know a share to about 0.0025.
    assert found == pytest.approx(exact.pvalue, abs=0.01)


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.recalls_at(np.array([], int), 1),
        lambda: metrics.best([]),
        lambda: metrics.hits_at([0, 1], 1),  # ranks start at 1
        lambda: metrics.ndcg_at([[2, 3], [NO_RANK, NO_RANK]], 1),  # targets withheld
        lambda: metrics.recalls_at([1], 0),
        lambda: metrics.ndcg_at([1], 0),
        lambda: metrics.clustered_bootstrap(np.zeros((0, 1)), []),
        lambda: metrics.clustered_bootstrap([[1.0], [2.0]], ["a"]),
        lambda: metrics.sign_flip_test([[1.0], [2.0]], ["a"]),
    ],
)
def test_what_has_no_answer_is_refused(call):
    with pytest.raises(UserError):
        call()
