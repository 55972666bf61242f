"""Advantages, KL, clipping and rewards against hand-computed tables."""

import ir_measures as ir
import jax.numpy as jnp
import numpy as np
import pytest

from grape_jax import grpo, rewards


def test_advantages_are_centred_in_their_own_group():
    reward = jnp.asarray([[0.0, 1.0, 2.0, 3.0], [5.0, 5.0, 5.0, 5.0]])
    std = np.std([0, 1, 2, 3], ddof=1)
    expected = np.array([[-1.5, -0.5, 0.5, 1.5], [0, 0, 0, 0]])
    np.testing.assert_allclose(
        grpo.advantages(reward, "group")[0], expected[0] / (std + 1e-4), rtol=1e-6
    )
    np.testing.assert_allclose(grpo.advantages(reward, "group")[1], 0)
    np.testing.assert_allclose(grpo.advantages(reward, "none"), expected)


def test_kl_is_zero_at_the_reference_and_positive_elsewhere():
    logprobs = jnp.asarray([-1.0, -2.0, -3.0])
    np.testing.assert_allclose(grpo.kl_to_reference(logprobs, logprobs), 0)
    got = grpo.kl_to_reference(logprobs, jnp.asarray([-2.0, -1.0, -3.5]))
    log_ratio = np.array([-1.0, 1.0, -0.5])
    np.testing.assert_allclose(got, np.exp(log_ratio) - log_ratio - 1, rtol=1e-6)
    assert (got > 0).all()


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "clipped"),
    [
        (1.5, 1.0, 1.3, True),  # too likely already: no more credit
        (0.5, 1.0, 0.5, False),
        (0.5, -1.0, -0.8, True),
        (1.5, -1.0, -1.5, False),  # a bad one that grew likelier is punished in full
        (1.1, 1.0, 1.1, False),
    ],
)
def test_the_clip_is_asymmetric_and_pessimistic(ratio, advantage, objective, clipped):
    new, old = jnp.full((1, 1, 1), np.log(ratio)), jnp.zeros((1, 1, 1))
    got, active = grpo.clipped_objective(new, old, jnp.asarray([[advantage]]), 0.2, 0.3)
    np.testing.assert_allclose(got.item(), objective, rtol=1e-6)
    assert active.item() == clipped


def test_a_mean_is_over_tokens_not_over_sequences():
    mask = jnp.asarray([[True, False, False], [True, True, True]])
    x = jnp.asarray([[4.0, 99.0, 99.0], [0.0, 0.0, 0.0]])
    assert grpo.masked_mean(x, mask) == 1.0
    assert grpo.masked_mean(x, jnp.zeros_like(mask)) == 0.0


def close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


def test_rank_rewards_follow_their_tables():
    ranks = jnp.asarray([1, 10, 11, 100, 101])
    close(rewards.linear(ranks, 101), [1, 0.91, 0.9, 0.01, 0])
    close(rewards.linear(ranks, 101, normalised=False), [100, 91, 90, 1, 0])
    close(rewards.log(jnp.asarray([1, 10, 100]), 100), [1, 0.5, 0])
    close(rewards.reciprocal(ranks), [1, 1 / 10, 1 / 11, 1 / 100, 1 / 101])
    close(rewards.rank_incentive(ranks), [2, 1, 10 / 9 - 11 / 90, 0, 0])


def test_a_corpus_of_one_item_pays_in_full():
    one = jnp.asarray(1)
    assert rewards.linear(one, 1) == rewards.log(one, 1) == rewards.reciprocal(one) == 1
    assert rewards.linear(one, 1, normalised=False) == 0
    assert rewards.ndcg(one[None], 10) == rewards.recall(one[None], 10) == 1
    assert rewards.contrastive(one[None], jnp.asarray([0.3]), jnp.asarray(0.3 / 0.1), 0.1) == 0
    assert rewards.improvement(one, one) == 0


def test_top_k_rewards_of_several_targets_match_ir_measures():
    """Each rank leaves the other targets out, so places in the list are worked out first."""
    rng = np.random.default_rng(0)
    lists = [np.sort(rng.permutation(30)[: rng.integers(1, 6)]) + 1 for _ in range(40)]  # places
    ranks = np.zeros((40, 5), np.int32)
    for row, places in zip(ranks, lists, strict=True):
        row[: len(places)] = places - np.arange(len(places))
        rng.shuffle(row)
    qrels = [ir.Qrel(str(q), str(p), 1) for q, places in enumerate(lists) for p in places]
    run = [ir.ScoredDoc(str(q), str(p), -float(p)) for q in range(40) for p in range(1, 31)]
    for k in (1, 3, 10):
        for measure, reward in ((ir.nDCG @ k, rewards.ndcg), (ir.R @ k, rewards.recall)):
            wanted = {m.query_id: m.value for m in ir.iter_calc([measure], qrels, run)}
            close(reward(jnp.asarray(ranks), k), [wanted[str(q)] for q in range(40)])


def test_similarity_and_contrast_read_the_real_targets_only():
    rank, scores = jnp.asarray([[0, 7, 3]]), jnp.asarray([[0.9, 0.2, 0.1]])
    close(rewards.similarity(rank, scores), [0.2])
    log_partition = jnp.asarray([np.log(np.exp(2) + np.exp(1) + np.exp(5))])
    wanted = np.log((np.exp(2) + np.exp(1)) / (np.exp(2) + np.exp(1) + np.exp(5)))
    close(rewards.contrastive(rank, scores, log_partition, 0.1), [wanted])
    assert rewards.best_rank(rank) == 3


def test_improvement_is_a_share_of_the_worse_rank():
    close(rewards.improvement(jnp.asarray([1, 10, 40]), jnp.asarray([10, 10, 10])), [0.9, 0, -0.75])


@pytest.mark.parametrize(
    ("rule", "rank", "form"),
    [("gate", [1.8, 0, 0], [0.1, -0.1, -0.1]), ("sum", [1.8, 1.8, 0], [0.1, 0, 0])],
)
def test_what_a_malformed_and_an_empty_answer_are_paid(rule, rank, form):
    got = rewards.parts(
        jnp.full(3, 0.9),
        jnp.asarray([True, False, False]),
        jnp.asarray([True, True, False]),
        weight=2.0,
        format_weight=0.1,
        format_rule=rule,
        malformed=-0.1,
    )
    close(got["rank"], rank)
    close(got["format"], form)
