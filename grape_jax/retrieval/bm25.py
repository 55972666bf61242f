"""BM25, a search by words as a baseline (Robertson and Zaragoza 2009), computed by bm25s.

Lucene's variant with k1 = 1.5 and b = 0.75. A word is a run of letters, digits and underscores in
lower case; there is neither stemming nor a list of stop words.
"""

import dataclasses
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from bm25s import BM25

WORD = re.compile(r"\w+")


@dataclasses.dataclass(frozen=True)
class WordIndex:
    """The words of a corpus, indexed."""

    scorer: "BM25 | None"  # None: the corpus has no words
    vocabulary: dict[str, int]
    size: int  # documents

    def scores(self, text: str) -> np.ndarray:
        """The score of every document: float32 `[N]`, 0 for those that share no word."""
        known = [self.vocabulary[word] for word in words(text) if word in self.vocabulary]
        if self.scorer is None or not known:
            return np.zeros(self.size, np.float32)
        return self.scorer.get_scores_from_ids(known)


def words(text: str) -> list[str]:
    """The words of a text, in its order."""
    return WORD.findall(text.lower())


def build(texts: Sequence[str]) -> WordIndex:
    """Indexes the words of a corpus; its texts are read one after the other."""
    vocabulary: dict[str, int] = {}
    number = lambda word: vocabulary.setdefault(word, len(vocabulary))
    ids = [np.fromiter(map(number, words(text)), np.int32) for text in texts]
    if not vocabulary:
        return WordIndex(None, {}, len(texts))
    # Its import runs a computation of JAX, which must not precede `jax.distributed.initialize`.
    from bm25s import BM25

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    scorer = BM25()
    scorer.index((ids, dict(vocabulary)), create_empty_token=False, show_progress=False)
    return WordIndex(scorer, vocabulary, len(texts))


def best_rows(scores_N: np.ndarray, depth: int) -> np.ndarray:
    """The rows of the best scores, best first, ties by row: int `[min(depth, N)]`."""
    depth = min(depth, len(scores_N))
    if depth < len(scores_N):
        # Only rows that reach the last score of the list, so that few are sorted.
        last = np.partition(scores_N, len(scores_N) - depth)[len(scores_N) - depth]
        rows = np.flatnonzero(scores_N >= last)
    else:
        rows = np.arange(len(scores_N))
    return rows[np.argsort(-scores_N[rows], kind="stable")][:depth]


def ranks(scores_N: np.ndarray, targets_P: np.ndarray) -> np.ndarray:
    """Ranks of targets, defined as by `ranking.target_ranks`: int64 `[P]`.

    Args:
      targets_P: int corpus rows, without padding.
    """
    other_N = np.ones(len(scores_N), bool)
    other_N[targets_P] = False
    rows_N = np.arange(len(scores_N))
    ahead = [
        ((scores_N > scores_N[row]) | ((scores_N == scores_N[row]) & (rows_N < row))) & other_N
        for row in targets_P
    ]
    return np.array([1 + int(one.sum()) for one in ahead], np.int64)
