"""Captions that describe a picture to a policy that reads text only."""

from pathlib import Path

import numpy as np
from scipy.special import logsumexp

from grape_jax.runtime.errors import UserError

CHUNK = 512  # pictures or captions compared at a time
TEMPERATURE = 0.02  # of the softmax over the gallery


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


def popularity(bank_CxE: np.ndarray, gallery_NxE: np.ndarray) -> np.ndarray:
    """The logarithm of the sum over a gallery of each caption's exponential similarities.

    Some captions are similar to many pictures ("woman"), and would be the closest to most of them.
    Subtracted from the similarities, this gives the inverted softmax of Smith et al. (2017,
    arXiv:1702.03859): how probable a picture is among those of the gallery, given the caption.

    Args:
      bank_CxE: float32 unit embeddings of the captions.
      gallery_NxE: float32 unit embeddings of the gallery's pictures.

    Returns:
      float32 `[C]`, in units of similarity.
    """
    sums = [
        logsumexp(bank_CxE[start : start + CHUNK] @ gallery_NxE.T / TEMPERATURE, axis=1)
        for start in range(0, len(bank_CxE), CHUNK)
    ]
    return TEMPERATURE * np.concatenate(sums)


def closest(
    bank_CxE: np.ndarray, popularity_C: np.ndarray, emb_QxE: np.ndarray, count: int
) -> np.ndarray:
    """The captions that describe each picture best, best first; ties in the order of the captions.

    Args:
      bank_CxE: float32 unit embeddings of the captions.
      popularity_C: of the captions, in the gallery of the pictures.
      emb_QxE: float32 unit embeddings of the pictures.
      count: captions per picture; fewer if the bank is smaller.

    Returns:
      int `[Q, count]`, rows of `bank_CxE`.
    """
    rows = []
    for start in range(0, len(emb_QxE), CHUNK):
        score_QxC = emb_QxE[start : start + CHUNK] @ bank_CxE.T - popularity_C
        rows.append(np.argsort(-score_QxC, axis=1, kind="stable")[:, :count])
    return np.concatenate(rows) if rows else np.zeros((0, count), np.int64)
