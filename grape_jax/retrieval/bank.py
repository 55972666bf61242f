"""Embeddings of a corpus or of captions, cached on disk by content."""

import functools
import hashlib
import io
import os
import warnings
import zipfile
from collections.abc import Callable, Container, Iterator, Sequence
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
PART = 8 * BATCH  # embeddings in one file: at most these are lost when a process is killed


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
    return _cached(retriever, items, pictures.content, image_batches, cache_dir)


def text_bank(retriever: Retriever, texts: Sequence[str], cache_dir: str | Path) -> np.ndarray:
    """Embeddings of texts, float32 `[N, E]` of unit length, cached as by `corpus_bank`."""
    return _cached(retriever, texts, str.encode, text_batches, cache_dir)


def _cached(
    retriever: Retriever,
    items: Sequence,
    content: Callable[[Any], bytes],
    batches: Callable[[Retriever, Sequence, Sequence[int]], Iterator[np.ndarray]],
    cache_dir: str | Path,
) -> np.ndarray:
    """`corpus_bank` for one kind of items.

    Args:
      content: maps an item to the bytes that identify it.
      batches: embeds the items in the given rows, a batch at a time.
    """
    digests = processes.raise_together(lambda: _digests(items, content))
    if jax.process_count() > 1:
        # Each process embeds a part for all of them.
        processes.refuse_differences({"items of the corpus": digest_of(digests)})
    rows_of: dict[bytes, list[int]] = {}
    for row, digest in enumerate(digests):
        rows_of.setdefault(digest, []).append(row)
    bank_NxE = np.empty((len(items), retriever.config.projection), np.float32)
    folder = Path(cache_dir) / retriever.fingerprint
    missing_N = np.zeros(len(items), bool)
    missing_N[[rows[0] for rows in rows_of.values()]] = True
    for digest, emb_E in _read_parts(folder, rows_of, bank_NxE.shape[1]):
        bank_NxE[rows_of[digest]] = emb_E
        missing_N[rows_of[digest][0]] = False
    # Embedding is collective: all processes compute what is missing on the disk of any.
    new = np.flatnonzero(processes.any_of_each(missing_N))
    together = rows_together(retriever)
    part = -(-PART // together) * together
    silent = not len(new) or not processes.is_main()
    with tqdm(total=len(new), desc="embedding the corpus", disable=silent) as bar:
        for start in range(0, len(new), part):
            processes.preparing(f"embedding the corpus, {start} of {len(new)} new items")
            rows = new[start : start + part].tolist()
            parts = []
            for emb_NxE in batches(retriever, items, rows):
                parts.append(emb_NxE)
                bar.update(len(emb_NxE))
            emb_NxE = np.concatenate(parts)
            keys = [digests[row] for row in rows]
            processes.main_process_first(functools.partial(_write_part, folder, keys, emb_NxE))
            for key, emb_E in zip(keys, emb_NxE, strict=True):
                bank_NxE[rows_of[key]] = emb_E
    return bank_NxE


def _digests(items: Sequence, content: Callable[[Any], bytes]) -> list[bytes]:
    """The SHA-256 of each item's content."""
    digest = lambda row: hashlib.sha256(content(items[row])).digest()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(digest, range(len(items))))


def _read_parts(
    folder: Path, wanted: Container[bytes], width: int
) -> Iterator[tuple[bytes, np.ndarray]]:
    """Yields digest and embedding of each wanted item on disk; deletes damaged files."""
    for path in sorted(folder.glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as part:
                digests = [bytes(digest) for digest in part["digests"]]
                found = [i for i, digest in enumerate(digests) if digest in wanted]
                if not found:
                    continue
                emb_NxE = part["embeddings"]
            if emb_NxE.shape != (len(digests), width):
                raise ValueError(f"shape {emb_NxE.shape} instead of {(len(digests), width)}")
            if not np.allclose(np.linalg.norm(emb_NxE, axis=1), 1, atol=1e-3):
                raise ValueError("its rows are not of unit length")
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            warnings.warn(
                f"{path} is damaged ({error}); its embeddings are computed again.", stacklevel=4
            )
            path.unlink(missing_ok=True)  # another process may have deleted it
            continue
        yield from ((digests[i], emb_NxE[i]) for i in found)


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
