"""BM25 ranks and lists against a sorted list, and scores against the formula."""

import math

import numpy as np
import pytest

from grape_jax.retrieval import bm25

TEXTS = ["the red fox", "blue sky and the sea", "The the fox", "", "Füße 火箭", "the red fox"]


@pytest.fixture(scope="module")
def index():
    return bm25.build(TEXTS)


@pytest.mark.parametrize("text", ["red fox", "THE sea", "nothing", "", "火箭 the", "fox fox"])
def test_ranks_and_lists_are_those_of_the_sorted_scores(index, text):
    scores_N = index.scores(text)
    order = np.argsort(-scores_N, kind="stable")
    for depth in (1, 3, 6, 9):
        np.testing.assert_array_equal(bm25.best_rows(scores_N, depth), order[:depth])
    for targets in ([2], [0, 5], [1, 3, 4]):
        others = [row for row in order if row not in targets]
        want = []
        for target in targets:
            ahead = [
                row
                for row in others
                if scores_N[row] > scores_N[target]
                or (scores_N[row] == scores_N[target] and row < target)
            ]
            want.append(1 + len(ahead))
        np.testing.assert_array_equal(bm25.ranks(scores_N, np.asarray(targets)), want)


def test_a_score_is_that_of_the_formula(index):
    """Lucene's BM25 of one word: idf * tf / (tf + k1 (1 - b + b length / mean length))."""
    lengths = [len(bm25.words(text)) for text in TEXTS]
    mean = sum(lengths) / len(lengths)
    idf = math.log(1 + (6 - 3 + 0.5) / (3 + 0.5))
    for row, count in ((0, 1), (2, 1), (5, 1)):
        norm = 1.5 * (1 - 0.75 + 0.75 * lengths[row] / mean)
        assert index.scores("fox")[row] == pytest.approx(idf * count / (count + norm), rel=1e-5)


def test_a_corpus_without_words_scores_nothing():
    np.testing.assert_array_equal(bm25.build(["", "!"]).scores("a"), [0, 0])
