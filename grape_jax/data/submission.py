"""Submission files of CIRR's evaluation server for the split test1 (version rc2)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grape_jax.data.benchmark import Query
from grape_jax.runtime import files

RECALL_DEPTH = 50  # pictures per query in the file for recall
SUBSET_DEPTH = 3  # pictures per query in the file for subset recall


def write(
    folder: str | Path,
    queries: Sequence[Query],
    ids: Sequence[str],
    bank_NxE: np.ndarray,
    emb_QxE: np.ndarray,
    name: str = "cirr",
) -> tuple[Path, Path]:
    """Writes `<name>_recall.json` and `<name>_recall_subset.json` atomically.

    Pictures are sorted by similarity, ties in corpus order, without the query's own picture.

    Args:
      folder: created if missing.
      queries: of test1; their ids are pair ids.
      ids: names of the corpus's pictures, `[N]`.
      bank_NxE: embeddings of the corpus, unit rows.
      emb_QxE: embeddings of the rewrites, unit rows.
      name: prefix of the file names.

    Returns:
      The paths of the two files.
    """
    recall: dict[str, Any] = {"version": "rc2", "metric": "recall"}
    subset: dict[str, Any] = {"version": "rc2", "metric": "recall_subset"}
    for query, emb in zip(queries, emb_QxE, strict=True):
        order = np.argsort(-(bank_NxE @ emb), kind="stable")
        order = order[order != query.image]
        recall[query.id] = [ids[row] for row in order[:RECALL_DEPTH]]
        members = order[np.isin(order, query.subset)]
        subset[query.id] = [ids[row] for row in members[:SUBSET_DEPTH]]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"{name}_recall.json", folder / f"{name}_recall_subset.json"
    for path, content in zip(paths, (recall, subset), strict=True):
        files.replace(path, json.dumps(content))
    return paths
