"""Properties of every reward that is a function of the rank alone."""

import jax.numpy as jnp
import numpy as np
import pytest
import thorough
from hypothesis import given, settings
from hypothesis import strategies as st

from grape_jax.rl import rewards

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
