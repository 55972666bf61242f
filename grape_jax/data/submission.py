"""The two files that CIRR's server judges the split test1 by (version rc2)."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from grape_jax.data.benchmark import Query
from grape_jax.runtime import files

RECALL_DEPTH = 50  # names a query in the file of the recall
SUBSET_DEPTH = 3  # and in that of the subset recall


def write(
    folder: str | Path,
    queries: Sequence[Query],
    ids: Sequence[str],
    bank_NxE: np.ndarray,
    emb_QxE: np.ndarray,
    name: str = "cirr",
) -> tuple[Path, Path]:
    """Writes `<name>_recall.json` and `<name>_recall_subset.json`, each in one move.

    The query's own picture is in neither; equal similarities stand in the order of the corpus.

    Args:
      queries: of test1; their ids are pair ids.
      ids: the names of the corpus's pictures.
      bank_NxE: the corpus, unit rows.
      emb_QxE: what each query searches with, unit rows.

    Returns:
      The paths of the two files.
    """
    recall = {"version": "rc2", "metric": "recall"}
    subset = {"version": "rc2", "metric": "recall_subset"}
    for query, emb in zip(queries, emb_QxE, strict=True):
        order = np.argsort(-(bank_NxE @ emb), kind="stable")
        order = order[order != query.image]
        recall[query.id] = [ids[row] for row in order[:RECALL_DEPTH]]
        members = order[np.isin(order, query.subset)]
        subset[query.id] = [ids[row] for row in members[:SUBSET_DEPTH]]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for content in (recall, subset):
        paths.append(folder / f"{name}_{content['metric']}.json")
        files.replace(paths[-1], json.dumps(content))
    return tuple(paths)
