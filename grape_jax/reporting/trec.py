"""Ranked lists and right answers in TREC's formats, for trec_eval and ir-measures.

A run's line is `query Q0 item position score tag`, and one of the qrels `query 0 item grade`.
"""

import re
from collections.abc import Iterator, Sequence
from urllib.parse import quote

import numpy as np


def run_lines(
    queries: Sequence[str], items: Sequence[str], rows_QxD: np.ndarray, tag: str
) -> Iterator[str]:
    """Lines of a run file.

    Readers sort by score and break ties differently, so the scores are D, D - 1, ..., which encode
    only the order.

    Args:
      queries: Q ids.
      items: ids of the whole corpus.
      rows_QxD: int, corpus rows, best first, then -1 as padding.
      tag: the name of the run.
    """
    tag = word(tag)
    depth = rows_QxD.shape[1]
    for query, rows in zip(queries, rows_QxD, strict=True):
        name = word(query)
        for i, row in enumerate(rows[rows >= 0].tolist()):
            yield f"{name} Q0 {word(items[row])} {i + 1} {depth - i} {tag}\n"


def qrel_lines(
    queries: Sequence[str],
    items: Sequence[str],
    targets: Sequence[Sequence[int]],
    gains: Sequence[Sequence[int]] = (),
) -> Iterator[str]:
    """Lines of a qrels file; none for queries whose right items are withheld.

    Args:
      queries: ids.
      items: ids of the whole corpus.
      targets: corpus rows of each query's right items.
      gains: their relevance grades; those of a query without any are 1.
    """
    grades = gains or [()] * len(queries)
    for query, rows, given in zip(queries, targets, grades, strict=True):
        for row, grade in zip(rows, given or [1] * len(rows), strict=True):
            yield f"{word(query)} 0 {word(items[row])} {grade}\n"


def word(name: str) -> str:
    """An id without white space, which separates columns: it becomes %20 and the like."""
    return re.sub(r"[\s%]", lambda character: quote(character[0]), name) or "%"
