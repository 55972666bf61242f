"""Advantages, KL, clipping and rewards against hand-computed tables."""

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


def test_rank_rewards():
    ranks = jnp.asarray([1, 10, 100])
    np.testing.assert_allclose(
        rewards.rank_reward(ranks, 100, "linear"), [1, 1 - 9 / 99, 0], atol=1e-6
    )
    np.testing.assert_allclose(rewards.rank_reward(ranks, 100, "log"), [1, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(
        rewards.rank_reward(ranks, 100, "reciprocal"), [1, 0.1, 0.01], rtol=1e-6
    )
    for shape in rewards.SHAPES:
        assert rewards.rank_reward(jnp.asarray(1), 1, shape) == 1
    with pytest.raises(ValueError, match="unknown"):
        rewards.rank_reward(ranks, 100, "cubic")


def test_a_malformed_answer_is_paid_nothing():
    got = rewards.combine(jnp.asarray([[0.9, 0.9]]), jnp.asarray([[True, False]]), 0.1)
    np.testing.assert_allclose(got, [[1.0, 0.0]])
