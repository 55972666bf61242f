"""Properties of every reward that is a function of the rank alone."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import thorough
from hypothesis import given, settings
from hypothesis import strategies as st

from grape_jax.reporting import metrics
from grape_jax.retrieval import ranking
from grape_jax.rl import rewards
from grape_jax.rl.scoring import RewardConfig, reward_score
from grape_jax.runtime import sharding
from grape_jax.types import NO_RANK, Ranks

SIZES = st.integers(2, 16_000_000)
OF_RANK = {
    "linear": lambda rank, size: rewards.linear(rank, size),
    "log": lambda rank, size: rewards.log(rank, size),
    "reciprocal": lambda rank, size: rewards.reciprocal(rank),
    "ndcg": lambda rank, size: rewards.ndcg(rank[:, None], 10),
    "recall": lambda rank, size: rewards.recall(rank[:, None], 10),
    "rank_incentive": lambda rank, size: rewards.rank_incentive(rank),
    "improvement": lambda rank, size: rewards.improvement(rank, jnp.full(rank.shape, 7)),
}


@pytest.mark.parametrize("shape", OF_RANK)
@given(data=st.data())
@settings(max_examples=thorough.examples(40), deadline=None)
def test_a_better_rank_is_never_paid_less(shape, data):
    size = data.draw(SIZES)
    ranks = sorted(data.draw(st.lists(st.integers(1, size), min_size=4, max_size=4)))
    paid = np.asarray(OF_RANK[shape](jnp.asarray([1, *ranks, size], jnp.int32), size))
    assert np.isfinite(paid).all() and (np.diff(paid) <= 0).all()
    assert paid[-1] >= -1 - 1e-6 and paid[0] <= (2 if shape == "rank_incentive" else 1)


@given(
    st.lists(st.tuples(st.floats(-2, 2, width=32), st.booleans(), st.booleans()), min_size=1),
    st.sampled_from(rewards.FORMAT_RULES),
)
@settings(max_examples=thorough.examples(40), deadline=None)
def test_a_malformed_answer_is_never_paid_for_its_format(rows, rule):
    rows = [(score, ok and has_text, has_text) for score, ok, has_text in rows]
    score, well_formed, has_text = (np.asarray(column) for column in zip(*rows, strict=True))
    parts = rewards.parts(
        score.astype(np.float32), well_formed, has_text,
        weight=1.0, format_weight=0.1, format_rule=rule, malformed=-0.1,
    )  # fmt: skip
    assert (np.asarray(parts["format"])[~well_formed] <= 0).all()
    np.testing.assert_array_equal(np.asarray(parts["rank"])[~has_text], 0)
    np.testing.assert_allclose(parts["rank"][well_formed], score[well_formed], rtol=1e-6)


def graded_reference(scores_N, gains_N, k):
    """nDCG@k of one query from its whole ranked list, as trec_eval defines it."""
    order = np.argsort(-scores_N, kind="stable")
    discount_N = 1 / np.log2(2.0 + np.arange(len(scores_N)))
    dcg = (gains_N[order] * discount_N)[:k].sum()
    return dcg / (np.sort(gains_N)[::-1] * discount_N)[:k].sum()


@given(seed=st.integers(0, 2**32 - 1), k=st.sampled_from([1, 3, 10]))
@settings(max_examples=thorough.examples(25), deadline=None)
def test_graded_ndcg_is_that_of_the_whole_list(seed, k):
    """Several targets, ties, and documents that nobody has judged; ranks from the kernel."""
    Q, N, P = 8, 40, 5
    rng = np.random.default_rng(seed)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    # Small whole numbers: their products are exact, and many are equal.
    corpus_NxE = rng.integers(-1, 2, (N, 3)).astype(np.float32)
    emb_QxE = rng.integers(-1, 2, (Q, 3)).astype(np.float32)
    targets_QxP, gains_QxN = np.full((Q, P), -1, np.int32), np.zeros((Q, N))
    gains_QxP = np.zeros((Q, P), np.int32)
    for i in range(Q):
        rows = np.sort(rng.choice(N, rng.integers(1, P + 1), replace=False))
        targets_QxP[i, : len(rows)] = rows
        gains_QxP[i, : len(rows)] = rng.integers(1, 4, len(rows))
        gains_QxN[i, rows] = gains_QxP[i, : len(rows)]
    index = ranking.shard_corpus(mesh, corpus_NxE)
    ranks = ranking.target_ranks(emb_QxE, index, targets_QxP, mesh=mesh, size=N)
    got_Q = rewards.graded_ndcg(ranks.rank_QxP, ranks.similarity_QxP, gains_QxP, k)
    scores_QxN = emb_QxE @ corpus_NxE.T
    want_Q = [graded_reference(*one, k) for one in zip(scores_QxN, gains_QxN, strict=True)]
    np.testing.assert_allclose(got_Q, want_Q, rtol=1e-5)
    ranks_QxP, similarity_QxP = np.asarray(ranks.rank_QxP), np.asarray(ranks.similarity_QxP)
    placed_QxP = metrics.places(ranks_QxP, -similarity_QxP)
    np.testing.assert_array_equal(np.sort(placed_QxP), metrics.among_all(ranks_QxP))
    np.testing.assert_allclose(metrics.ndcg_at(placed_QxP, k, gains_QxP), want_Q, rtol=1e-12)


def test_graded_ndcg_with_equal_gains_is_ndcg():
    rank = jnp.asarray([[3, 1, 3], [7, 2, NO_RANK]], jnp.int32)
    similarity = jnp.asarray([[0.4, 0.9, 0.5], [0.1, 0.7, 0.0]])
    for gain in (1, 3):
        gains = gain * (rank < NO_RANK)
        got = rewards.graded_ndcg(rank, similarity, gains, 10)
        np.testing.assert_allclose(got, rewards.ndcg(rank, 10), rtol=1e-6)


def test_the_ndcg_reward_reads_relevance_grades():
    """Two documents at ranks 1 and 2: the order that puts the higher grade first is paid more."""
    config = RewardConfig(
        reward_shape="ndcg", reward_normalised=True, reward_k=10, reward_temperature=0.01,
        reward_weight=1.0, format_weight=0.1, format_rule="gate", malformed_reward=0.0,
        truncated_penalty=0.0,
    )  # fmt: skip
    scorer = types.SimpleNamespace(reward=config, corpus_size=9)
    rank_BxKxP = jnp.ones((1, 2, 2), jnp.int32)
    similarity_BxKxP = jnp.asarray([[[0.9, 0.8], [0.8, 0.9]]])
    ranks = Ranks(rank_BxKxP, similarity_BxKxP, jnp.zeros((1, 2)))
    gains_BxP = jnp.asarray([[3, 1]])
    best, other = np.asarray(reward_score(scorer, ranks, None, gains_BxP))[0]
    want = (1 / np.log2(2) + 3 / np.log2(3)) / (3 / np.log2(2) + 1 / np.log2(3))
    np.testing.assert_allclose([best, other], [1, want], rtol=1e-6)
    np.testing.assert_allclose(reward_score(scorer, ranks, None), 1, rtol=1e-6)
