"""Captions nearest to a picture, which describe it to a policy that reads text only."""

from pathlib import Path

import numpy as np

from grape_jax.runtime.errors import UserError

CHUNK = 512  # pictures compared with the captions at a time


def read_bank(path: str | Path) -> list[str]:
    """Reads captions from a UTF-8 text file, one a line; skips blank and repeated lines.

    Raises:
      UserError: the file is missing, is not UTF-8, or has no captions.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the caption bank {path} cannot be read as text: {error}.") from error
    captions = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not captions:
        raise UserError(
            f"the caption bank {path} is empty: give a text file with one caption a line."
        )
    return captions


def closest(bank_CxE: np.ndarray, emb_QxE: np.ndarray, count: int) -> np.ndarray:
    """The captions most similar to each picture, best first; ties in the order of the captions.

    Args:
      bank_CxE: float32 unit embeddings of the captions.
      emb_QxE: float32 unit embeddings of the pictures.
      count: captions per picture; fewer if the bank is smaller.

    Returns:
      int `[Q, count]`, rows of `bank_CxE`.
    """
    rows = [
        np.argsort(-(emb_QxE[start : start + CHUNK] @ bank_CxE.T), axis=1, kind="stable")[:, :count]
        for start in range(0, len(emb_QxE), CHUNK)
    ]
    return np.concatenate(rows) if rows else np.zeros((0, count), np.int64)
