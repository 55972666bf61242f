"""The corpus bank: embeddings of a whole corpus, cached on disk by content."""

import functools
import hashlib
import io
import os
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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

DIGEST_ROWS = 1 << 14  # hashed at one time
PART = 8 * BATCH  # embeddings that are written to disk at one time: what a kill can cost


def corpus_bank(
    retriever: Retriever, items: Sequence[Picture], cache_dir: str | Path
) -> np.ndarray:
    """The embeddings of a corpus: float32 [N, E] of unit length.

    Each embedding is kept in `cache_dir` under the content of its checkpoint and of its item. What
    is known is not computed again, whichever corpus it stands in; a run that was killed goes on
    with what is missing. A damaged file is computed anew with a warning.

    Args:
      items: pictures, or texts where the retriever reads text only. They are asked for one by one,
        twice where they are new.

    Raises:
      UserError: a file is missing or not a picture; the processes have different ones.
    """
    digests = processes.raise_together(lambda: _digests(retriever, items))
    if jax.process_count() > 1:
        # Each process embeds a part for all of them.
        processes.refuse_differences({"pictures of the corpus": digest_of(digests)})
    rows_of: dict[bytes, list[int]] = {}
    for row, digest in enumerate(digests):
        rows_of.setdefault(digest, []).append(row)
    bank_NxE = np.empty((len(items), retriever.config.projection), np.float32)
    folder = Path(cache_dir) / retriever.fingerprint
    missing_N = np.zeros(len(items), bool)
    missing_N[[rows[0] for rows in rows_of.values()]] = True
    for digest, emb_E in _known(folder, rows_of, bank_NxE.shape[1]):
        bank_NxE[rows_of[digest]] = emb_E
        missing_N[rows_of[digest][0]] = False
    # Processes embed together, also what one alone does not find on its disk.
    new = np.flatnonzero(processes.any_of_each(missing_N))
    batches = text_batches if retriever.preprocess is None else image_batches
    together = rows_together(retriever)
    part = -(-PART // together) * together
    silent = not len(new) or not processes.is_main()
    with tqdm(total=len(new), desc="embedding the corpus", disable=silent) as bar:
        for start in range(0, len(new), part):
            processes.preparing(f"embedding the corpus, {start} of {len(new)} new items")
            rows = new[start : start + part]
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


def _digests(retriever: Retriever, items: Sequence[Picture]) -> list[bytes]:
    """A SHA-256 of each item."""
    content = str.encode if retriever.preprocess is None else pictures.content
    digest = lambda row: hashlib.sha256(content(items[row])).digest()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(digest, range(len(items))))


def _known(folder: Path, wanted: dict, width: int) -> Iterator[tuple[bytes, np.ndarray]]:
    """Digest and embedding of what is wanted and on disk; a damaged part is deleted."""
    for path in sorted(folder.glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as part:
                digests = [bytes(digest) for digest in part["digests"]]
                found = [i for i, digest in enumerate(digests) if digest in wanted]
                emb_NxE = part["embeddings"] if found else None
            if found and emb_NxE.shape != (len(digests), width):
                raise ValueError(f"shape {emb_NxE.shape} instead of {(len(digests), width)}")
            if found and not np.allclose(np.linalg.norm(emb_NxE, axis=1), 1, atol=1e-3):
                raise ValueError("its rows are not of unit length")
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            warnings.warn(f"{path} is damaged ({error}): it is computed anew.", stacklevel=3)
            path.unlink(missing_ok=True)  # another process may have done so
            continue
        yield from ((digests[i], emb_NxE[i]) for i in found if digests[i] in wanted)


def _write_part(folder: Path, digests: list[bytes], emb_NxE: np.ndarray) -> None:
    """Writes the file, but where another process with the same disk just did."""
    path = folder / f"{digest_of(digests)}.npz"
    if path.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows = np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1)
    content = io.BytesIO()
    np.savez(content, digests=rows, embeddings=emb_NxE)
    files.replace(path, content.getvalue())


def bank_digest(rows_NxE: np.ndarray) -> str:
    """A hash of embeddings, which may be memory-mapped and larger than memory."""
    total = hashlib.sha256(str(rows_NxE.shape).encode())
    for start in range(0, len(rows_NxE), DIGEST_ROWS):
        total.update(np.ascontiguousarray(rows_NxE[start : start + DIGEST_ROWS]))
    files.release(rows_NxE)
    return total.hexdigest()[:32]
