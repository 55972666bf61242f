"""Fused searches against a dictionary of exact fractions and a walk over the whole corpus."""

from fractions import Fraction

import numpy as np
import pytest
import thorough
from hypothesis import given, settings
from hypothesis import strategies as st

from grape_jax.retrieval import fusion
from grape_jax.types import NO_RANK


def _naive_fusion(lists):
    scores = {}
    for rows in lists:
        for rank, row in enumerate((row for row in rows if row >= 0), start=1):
            scores[row] = scores.get(row, 0) + Fraction(1, 60 + rank)
    return sorted(scores, key=lambda row: (-scores[row], row))


@st.composite
def searches(draw):
    """A corpus, some ranked lists of it of unequal depth, and targets, a subset, an exclusion."""
    size = draw(st.integers(2, 14))
    rows = range(size)
    excluded = draw(st.sampled_from([-1, *rows]))
    left = [row for row in rows if row != excluded]
    depth = draw(st.integers(1, size))
    lists = []
    for _ in range(draw(st.integers(1, 4))):
        kept = draw(st.permutations(left))[: draw(st.integers(0, depth))]
        lists.append(kept + [-1] * (depth - len(kept)))
    targets = draw(st.lists(st.sampled_from(left), min_size=1, max_size=3, unique=True))
    subset = draw(st.lists(st.sampled_from(left), max_size=5))
    return size, np.array(lists), excluded, np.array([*targets, -1]), np.array([*subset, -1])


@given(searches())
@settings(max_examples=thorough.examples(150), deadline=None)
def test_fusion_and_its_ranks_match_a_dictionary(search):
    size, lists, excluded, targets, subset = search
    fused = fusion.reciprocal_rank_fusion(lists)
    naive = _naive_fusion(lists.tolist())
    assert fused[fused >= 0].tolist() == naive
    whole = naive + [row for row in range(size) if row not in naive and row != excluded]

    def walked(among):
        ranks = [
            1 + sum(r in among and r not in targets for r in whole[: whole.index(target)])
            for target in targets[:-1]
        ]
        return [*ranks, NO_RANK]

    found = fusion.ranks_in(fused, targets, excluded=excluded)
    assert found.tolist() == walked(range(size))
    found = fusion.ranks_in(fused, targets, among=subset, excluded=excluded)
    assert found.tolist() == walked(set(subset.tolist()))


def test_fusion_with_numbers_worked_by_hand():
    # 1/61 + 1/63 beats 1/62 + 1/62; rows 4 and 7 tie and stand in the order of their numbers.
    fused = fusion.reciprocal_rank_fusion([[9, 5, 7], [4, 5, 9]])
    assert fused.tolist() == [9, 5, 4, 7, -1, -1]
    assert fusion.reciprocal_rank_fusion([[7, 4], [4, 7]]).tolist() == [4, 7, -1, -1]
    # A list against itself changes nothing.
    assert fusion.reciprocal_rank_fusion([[3, 1, 2]] * 3).tolist()[:3] == [3, 1, 2]


def test_sums_that_are_equal_tie_whatever_their_order():
    # 1/70 + 1/105 = 1/84 + 1/84, which float64 adds up to another last bit.
    lists = np.full((2, 45), -1)
    lists[0] = np.arange(100, 145)
    lists[1] = np.arange(200, 245)
    lists[0, 9], lists[1, 44] = 2, 2
    lists[0, 23], lists[1, 23] = 1, 1
    fused = fusion.reciprocal_rank_fusion(lists)
    assert fused[:2].tolist() == [1, 2] and fused[fused >= 0].tolist() == _naive_fusion(lists)


def test_mean_embedding_is_the_direction_of_the_mean():
    generator = np.random.default_rng(0)
    emb_MxQxE = generator.normal(size=(3, 20, 8))
    emb_MxQxE /= np.linalg.norm(emb_MxQxE, axis=-1, keepdims=True)
    found = fusion.mean_embedding(emb_MxQxE.astype(np.float32))
    assert found.dtype == np.float32
    for q in range(20):
        total = sum(emb_MxQxE[m, q] for m in range(3))
        np.testing.assert_allclose(found[q], total / np.sqrt(total @ total), rtol=1e-5, atol=1e-6)
    same = fusion.mean_embedding(emb_MxQxE[[0, 0]])
    np.testing.assert_allclose(same, emb_MxQxE[0], rtol=1e-6)


def test_vectors_that_cancel_out_leave_the_first():
    one = np.array([[1.0, 0.0], [0.6, 0.8]])
    assert fusion.mean_embedding(np.stack([one, -one])) == pytest.approx(one)
