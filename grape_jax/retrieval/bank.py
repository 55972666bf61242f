"""Embeddings of a corpus or of captions, cached on disk by content."""

import functools
import hashlib
import io
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from tqdm import tqdm

from grape_jax.data import pictures
from grape_jax.data.pictures import Picture
from grape_jax.retrieval.encoder import (
    BATCH,
    Retriever,
    digest_of,
    image_batches,
    rows_together,
    text_batches,
)
from grape_jax.runtime import files, processes

DIGEST_ROWS = 1 << 14  # rows hashed at a time
# Embeddings in one file: at most these are lost when a process is killed. Texts are embedded by
# length, so that a larger part has fuller batches.
PART, TEXT_PART = 8 * BATCH, 32 * BATCH


def corpus_bank(
    retriever: Retriever, items: Sequence[Picture], cache_dir: str | Path
) -> np.ndarray:
    """Embeddings of a corpus: float32 `[N, E]` of unit length, cached in `cache_dir`.

    An embedding is cached under the fingerprint of its retriever and the hash of its item, so it
    is computed once for all corpora. An interrupted call resumes where it stopped. A damaged cache
    file is deleted with a warning, and its embeddings are computed again.

    Args:
      items: pictures, or texts if the retriever reads text only. The sequence may be lazy: an item
        is read once for its hash, and once more if it is new.
      cache_dir: the cache, shared by all corpora and retrievers.

    Raises:
      UserError: a file is missing or is not a picture, or the processes have different items.
    """
    if retriever.preprocess is None:
        return text_bank(retriever, cast(Sequence[str], items), cache_dir)
    return _cached(retriever, items, pictures.content, image_batches, cache_dir, PART)


def text_bank(retriever: Retriever, texts: Sequence[str], cache_dir: str | Path) -> np.ndarray:
    """Embeddings of documents, float32 `[N, E]` of unit length, cached as by `corpus_bank`.

    Texts are read with the retriever's whole context and its document prompt.
    """
    content = lambda text: (retriever.document_prompt + text).encode()
    return _cached(retriever, texts, content, text_batches, cache_dir, TEXT_PART)


def _cached(
    retriever: Retriever,
    items: Sequence,
    content: Callable[[Any], bytes],
    batches: Callable[[Retriever, Sequence, Sequence[int]], Iterator[np.ndarray]],
    cache_dir: str | Path,
    part: int,
) -> np.ndarray:
    """`corpus_bank` for one kind of items.

    Args:
      content: maps an item to the bytes that identify it.
      batches: embeds the items in the given rows, a batch at a time.
      part: embeddings in one file, rounded up to what all devices embed together.
    """
    digests_Nx32 = processes.raise_together(lambda: _digests(items, content))
    if jax.process_count() > 1:
        # Each process embeds a part for all of them.
        processes.refuse_differences({"items of the corpus": digest_of(map(bytes, digests_Nx32))})
    unique_U, first_U, place_N = np.unique(
        _keys(digests_Nx32), return_index=True, return_inverse=True
    )
    bank_NxE = np.empty((len(items), retriever.config.projection), np.float32)
    folder = Path(cache_dir) / retriever.fingerprint
    missing_N = np.zeros(len(items), bool)
    missing_N[first_U] = True
    for place, emb_RxE in _read_parts(folder, unique_U, bank_NxE.shape[1]):
        bank_NxE[first_U[place]] = emb_RxE
        missing_N[first_U[place]] = False
    # Embedding is collective: all processes compute what is missing on the disk of any.
    new = np.flatnonzero(processes.any_of_each(missing_N))
    together = rows_together(retriever)
    part = -(-part // together) * together
    # None: drawn on terminals only; a log file would hold every redrawing.
    silent = True if not len(new) or not processes.is_main() else None
    with tqdm(total=len(new), desc="embedding the corpus", disable=silent) as bar:
        for start in range(0, len(new), part):
            processes.preparing(f"embedding the corpus, {start} of {len(new)} new items")
            rows = new[start : start + part]
            parts = []
            for emb_RxE in batches(retriever, items, rows.tolist()):
                parts.append(emb_RxE)
                bar.update(len(emb_RxE))
            bank_NxE[rows] = np.concatenate(parts)
            keys = [bytes(digest) for digest in digests_Nx32[rows]]
            processes.main_process_first(
                functools.partial(_write_part, folder, keys, bank_NxE[rows])
            )
    repeated = np.flatnonzero(first_U[place_N] != np.arange(len(items)))
    bank_NxE[repeated] = bank_NxE[first_U[place_N[repeated]]]
    return bank_NxE


def _digests(items: Sequence, content: Callable[[Any], bytes]) -> np.ndarray:
    """The SHA-256 of each item's content: uint8 `[N, 32]`."""
    digest = lambda row: hashlib.sha256(content(items[row])).digest()
    digests_Nx32 = np.empty((len(items), 32), np.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        # Block by block: a pool holds an object for each call that waits.
        for start in range(0, len(items), DIGEST_ROWS):
            rows = range(start, min(start + DIGEST_ROWS, len(items)))
            joined = b"".join(threads.map(digest, rows))
            digests_Nx32[rows.start : rows.stop] = np.frombuffer(joined, np.uint8).reshape(-1, 32)
    return digests_Nx32


def _keys(digests_Nx32: np.ndarray) -> np.ndarray:
    """Digests as sortable values `[N]`."""
    return np.ascontiguousarray(digests_Nx32).view("S32").reshape(-1)


def _read_parts(
    folder: Path, wanted_U: np.ndarray, width: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the places in `wanted_U` and the embeddings of each file; deletes damaged files.

    Args:
      wanted_U: the keys of the wanted items, ascending.
    """
    for path in sorted(folder.glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as part:
                keys = _keys(part["digests"])
                place = np.minimum(np.searchsorted(wanted_U, keys), len(wanted_U) - 1)
                found = np.flatnonzero(wanted_U[place] == keys)
                if not len(found):
                    continue
                emb_NxE = part["embeddings"]
            if emb_NxE.shape != (len(keys), width):
                raise ValueError(f"shape {emb_NxE.shape} instead of {(len(keys), width)}")
            if not np.allclose(np.linalg.norm(emb_NxE, axis=1), 1, atol=1e-3):
                raise ValueError("its rows are not of unit length")
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            warnings.warn(
                f"{path} is damaged ({error}); its embeddings are computed again.", stacklevel=4
            )
            path.unlink(missing_ok=True)  # another process may have deleted it
            continue
        yield place[found], emb_NxE[found]


def _write_part(folder: Path, digests: list[bytes], emb_NxE: np.ndarray) -> None:
    """Writes embeddings to a file, unless a process with the same disk has just done so."""
    path = folder / f"{digest_of(digests)}.npz"
    if path.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows = np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1)
    content = io.BytesIO()
    np.savez(content, digests=rows, embeddings=emb_NxE)
    files.replace(path, content.getvalue())


def bank_digest(rows_NxE: np.ndarray) -> str:
    """SHA-256 of embeddings as 32 hexadecimal digits; they may be memory-mapped and exceed RAM."""
    total = hashlib.sha256(str(rows_NxE.shape).encode())
    for start in range(0, len(rows_NxE), DIGEST_ROWS):
        total.update(np.ascontiguousarray(rows_NxE[start : start + DIGEST_ROWS]).data)
    files.release(rows_NxE)
    return total.hexdigest()[:32]
