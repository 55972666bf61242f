"""Ranks against a stable numpy argsort: ties, duplicates, padding, exclusions, several targets."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grape_jax import ranking
from grape_jax.errors import UserError
from grape_jax.sharding import make_mesh


def mesh_of(count):
    return make_mesh(devices=jax.devices()[:count])


def rank(emb, corpus, targets, excluded=None, devices=1):
    mesh = mesh_of(devices)
    return jax.device_get(
        ranking.target_ranks(
            emb.astype(np.float32),
            ranking.shard_corpus(mesh, corpus),
            np.asarray(targets, np.int32),
            None if excluded is None else np.asarray(excluded, np.int32),
            mesh=mesh,
            size=len(corpus),
        )
    )


def naive_rank(scores, target, others, excluded):
    """Position in a stable descending argsort of what is left in the corpus."""
    kept = [i for i in range(len(scores)) if i == target or i not in {*others, *excluded}]
    order = np.argsort(-scores[kept], kind="stable")
    return [kept[i] for i in order].index(target) + 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_equals_a_stable_argsort(seed):
    """Small integers as coordinates: every product is exact, and ties abound."""
    rng = np.random.default_rng(seed)
    emb = rng.integers(-2, 3, (7, 4))
    corpus = rng.integers(-2, 3, (300, 4))
    targets = np.stack([rng.permutation(300)[:3] for _ in range(7)])
    targets[rng.random(targets.shape) < 0.3] = -1
    excluded = rng.integers(-1, 300, (7, 2))
    excluded[np.isin(excluded, targets)] = -1
    got = rank(emb, corpus, targets, excluded)
    scores = emb @ corpus.T
    for q in range(7):
        for p, target in enumerate(targets[q]):
            if target < 0:
                assert got.rank_QxP[q, p] == 0
            else:
                assert got.rank_QxP[q, p] == naive_rank(scores[q], target, targets[q], excluded[q])
                assert got.similarity_QxP[q, p] == scores[q, target]


def test_a_corpus_of_equal_items_ranks_by_row():
    got = rank(np.ones((3, 4)), np.ones((300, 4)), [[0], [150], [299]])
    assert got.rank_QxP[:, 0].tolist() == [1, 151, 300]


def test_ranks_do_not_depend_on_batch_or_devices():
    """Near ties everywhere: the rows differ by a few last bits."""
    rng = np.random.default_rng(0)
    corpus = 1 + 1e-7 * rng.standard_normal((700, 33))
    emb = 1 + 1e-7 * rng.standard_normal((70, 33))
    targets = rng.integers(0, 700, (70, 1))
    whole = rank(emb, corpus, targets)
    assert len(np.unique(whole.rank_QxP)) > 20
    for devices in (2, 8):
        np.testing.assert_array_equal(
            rank(emb, corpus, targets, devices=devices).rank_QxP, whole.rank_QxP
        )
    alone = [rank(emb[i : i + 1], corpus, targets[i : i + 1]).rank_QxP[0] for i in (0, 5, 69)]
    np.testing.assert_array_equal(alone, whole.rank_QxP[[0, 5, 69]])


def test_log_partition_is_over_the_real_items():
    rng = np.random.default_rng(0)
    emb, corpus = rng.standard_normal((3, 8)), rng.standard_normal((300, 8))
    emb, corpus = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (emb, corpus))
    got = rank(emb, corpus, [[0], [1], [2]], devices=8)
    expected = np.log(np.exp(emb @ corpus.T / 0.01).sum(1))
    np.testing.assert_allclose(got.log_partition_Q, expected, rtol=1e-5)


def test_bad_corpora_are_refused():
    corpus = np.ones((3, 4))
    corpus[1, 2] = np.nan
    with pytest.raises(UserError, match="row 1 is not finite"):
        ranking.shard_corpus(mesh_of(1), corpus)
    with pytest.raises(UserError, match="not empty"):
        ranking.shard_corpus(mesh_of(1), np.zeros((0, 4)))
