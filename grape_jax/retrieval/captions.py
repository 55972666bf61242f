"""A picture in words, for a policy that reads no pixels: the captions that lie closest to it."""

import hashlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from grape_jax.retrieval.encoder import Retriever
from grape_jax.runtime import files, processes
from grape_jax.runtime.errors import UserError

CHUNK = 512  # pictures compared with the bank at one time


def read_bank(path: str | Path) -> list[str]:
    """The captions of a text file, one a line; blank and repeated ones are passed over.

    Raises:
      UserError: the file is missing, is not UTF-8 or holds no caption.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the caption bank {path} cannot be read as text: {error}.") from error
    captions = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not captions:
        raise UserError(f"the caption bank {path} is empty: give a text file, a caption a line.")
    return captions


def embed_bank(retriever: Retriever, captions: Sequence[str], cache_dir: str | Path) -> np.ndarray:
    """The captions' embeddings `[C, E]`, computed once and then read from `cache_dir`.

    The file is named by the content of the checkpoint and of the captions.
    """
    content = "\0".join([retriever.fingerprint, *captions]).encode()
    path = Path(cache_dir) / f"captions-{hashlib.sha256(content).hexdigest()[:32]}.npy"
    bank_CxE = _kept(path, (len(captions), retriever.config.projection))
    missing = bank_CxE is None
    # Processes embed together, also what one alone does not find on its disk.
    if processes.any_of(missing):
        bank_CxE = retriever.embed_texts(captions, retriever.context)
        processes.main_process_first(lambda: _keep(path, bank_CxE) if missing else None)
    return bank_CxE


def _kept(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """What the file holds; None where there is none, or a damaged one, with a warning."""
    if not path.exists():
        return None
    try:
        bank_CxE = np.load(path, allow_pickle=False)
        if bank_CxE.shape != shape:
            raise ValueError(f"shape {bank_CxE.shape} instead of {shape}")
        return bank_CxE
    except (ValueError, OSError, EOFError) as error:
        warnings.warn(f"{path} is damaged ({error}): it is computed anew.", stacklevel=3)
        return None


def _keep(path: Path, bank_CxE: np.ndarray) -> None:
    written = io.BytesIO()
    np.save(written, bank_CxE)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, written.getvalue())


def closest(bank_CxE: np.ndarray, emb_QxE: np.ndarray, count: int) -> np.ndarray:
    """The rows of the `count` captions most similar to each picture, best first: int `[Q, count]`.

    Equal ones stand in the order of the bank.
    """
    rows = [
        np.argsort(-(emb_QxE[start : start + CHUNK] @ bank_CxE.T), axis=1, kind="stable")[:, :count]
        for start in range(0, len(emb_QxE), CHUNK)
    ]
    return np.concatenate(rows) if rows else np.zeros((0, count), np.int64)
