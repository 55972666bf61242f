"""Sampling: exact distributions, early stops, and the log-probs that the learner will see."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from grape_jax.models import policy
from grape_jax.rollout import SamplingConfig, draw_tokens, sample
from grape_jax.types import Prompts

CONFIG = policy.PolicyConfig(
    vocab_size=600, width=32, mlp_width=48, layers=2, heads=4, kv_heads=2, head_dim=8,
    rope_theta=1e4, norm_eps=1e-5, tied_embeddings=False, max_length=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def variables():
    made = nn.unbox(policy.init(CONFIG, jax.random.key(0)))
    made["params"]["head"] *= 20  # a distribution with some shape
    return made


@pytest.fixture(scope="module")
def prompts():
    mask = np.ones((4, 6), bool)
    mask[1, :3] = False
    tokens = np.random.default_rng(0).integers(3, 600, (4, 6)).astype(np.int32)
    return Prompts(jnp.asarray(tokens), jnp.asarray(mask))


def test_draws_follow_the_distribution():
    """20,000 draws against the exact probabilities, over several blocks of the vocabulary."""
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 2, 600), jnp.float32)
    rows = jnp.broadcast_to(logits, (100, 200, 600))
    tokens, logprobs = draw_tokens(rows, 0.7, jax.random.key(3))
    probs = np.asarray(jax.nn.softmax(logits / 0.7), np.float64)
    common = probs > 5 / 20_000
    counts = np.bincount(np.asarray(tokens).ravel(), minlength=600)
    seen = np.append(counts[common], counts[~common].sum())
    expected = np.append(probs[common], probs[~common].sum()) * 20_000
    assert stats.chisquare(seen, expected / expected.sum() * seen.sum()).pvalue > 1e-3
    np.testing.assert_allclose(logprobs[0], np.log(probs[np.asarray(tokens[0])]), rtol=1e-4)


def test_a_token_without_probability_is_never_drawn():
    logits = jnp.full((50, 50, 600), -jnp.inf).at[..., 123].set(0.0)
    tokens, logprobs = draw_tokens(logits, 1.0, jax.random.key(0))
    assert (tokens == 123).all() and (logprobs == 0).all()


def test_sampled_logprobs_are_those_of_the_full_pass(variables, prompts):
    sampling = SamplingConfig(3, 5, 0.8, stop_ids=(1,), pad_id=0)
    rollout = sample(CONFIG, sampling, variables, prompts, jax.random.key(1))
    hidden = policy.hidden_states(CONFIG, variables, prompts, rollout.tokens_BxKxT)
    full = jax.nn.log_softmax(policy.logits(variables, hidden) / 0.8)
    chosen = jnp.take_along_axis(full, rollout.tokens_BxKxT[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(
        rollout.logprobs_BxKxT, jnp.where(rollout.mask_BxKxT, chosen, 0), atol=2e-5
    )


def test_rows_of_a_group_differ_and_keys_decide(variables, prompts):
    sampling = SamplingConfig(4, 5, 1.0, stop_ids=(1,), pad_id=0)
    draw = lambda seed: np.asarray(
        sample(CONFIG, sampling, variables, prompts, jax.random.key(seed)).tokens_BxKxT
    )
    one = draw(0)
    assert len({tuple(row) for row in one.reshape(-1, 5)}) == 16
    assert (one == draw(0)).all() and (one != draw(1)).any()


def test_padding_before_a_prompt_changes_no_token(variables, prompts):
    sampling = SamplingConfig(2, 5, 1.0, stop_ids=(1,), pad_id=0)
    wide = Prompts(
        jnp.pad(prompts.tokens_BxS, ((0, 0), (4, 0)), constant_values=9),
        jnp.pad(prompts.mask_BxS, ((0, 0), (4, 0))),
    )
    narrow_out = sample(CONFIG, sampling, variables, prompts, jax.random.key(0))
    wide_out = sample(CONFIG, sampling, variables, wide, jax.random.key(0))
    np.testing.assert_array_equal(narrow_out.tokens_BxKxT, wide_out.tokens_BxKxT)


def test_nothing_follows_the_end_token(variables, prompts):
    """Half the vocabulary ends a completion: rows end early, and the end token itself counts."""
    stops = tuple(range(300))
    sampling = SamplingConfig(8, 6, 1.0, stop_ids=stops, pad_id=599)
    rollout = jax.device_get(sample(CONFIG, sampling, variables, prompts, jax.random.key(2)))
    for tokens, mask, logprobs in zip(
        rollout.tokens_BxKxT.reshape(-1, 6),
        rollout.mask_BxKxT.reshape(-1, 6),
        rollout.logprobs_BxKxT.reshape(-1, 6),
        strict=True,
    ):
        ends = np.flatnonzero(tokens[mask] < 300)
        length = ends[0] + 1 if len(ends) else 6
        assert mask.tolist() == [True] * length + [False] * (6 - length)
        assert (tokens[length:] == 599).all() and (logprobs[length:] == 0).all()
    assert rollout.mask_BxKxT.sum(-1).min() == 1


def test_greedy_takes_the_likeliest_token(variables, prompts):
    sampling = SamplingConfig(1, 5, 0.0, stop_ids=(1,), pad_id=0)
    rollout = sample(CONFIG, sampling, variables, prompts, jax.random.key(0))
    hidden = policy.hidden_states(CONFIG, variables, prompts, rollout.tokens_BxKxT)
    likeliest = jnp.argmax(policy.logits(variables, hidden), -1)
    mask = np.asarray(rollout.mask_BxKxT)
    assert (np.asarray(rollout.tokens_BxKxT)[mask] == np.asarray(likeliest)[mask]).all()
