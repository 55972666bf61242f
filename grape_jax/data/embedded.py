"""Precomputed embeddings of pictures, read block by block.

NAME.npy        [N, E], with NAME.txt beside it: the pictures' ids, one per line
NAME.npz        `embeddings` [N, E] and `ids` [N]
NAME.parquet    columns `embedding` (lists of E numbers) and `id` or `image_path`
a directory     in the layout of clip-retrieval: img_emb/img_emb_0.npy, ..., each with
                metadata/metadata_0.parquet with `image_path`; text_emb/text_emb_0.npy and
                `caption`, if present, serve to check which model made the embeddings
"""

import dataclasses
import hashlib
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from grape_jax.runtime import files
from grape_jax.runtime.errors import UserError

SUFFIXES = (".npy", ".npz", ".parquet")
BLOCK = 4096  # rows in memory at a time
UNIT = 1e-4  # rows whose norms differ more from 1 are scaled
TEXTS = 16  # captions to check the model with


@dataclasses.dataclass(frozen=True)
class Given:
    """Embeddings on disk, not loaded."""

    path: Path  # as given by the user
    ids: list[str]  # of the rows, [N]
    width: int  # E
    blocks: Callable[[], Iterator[np.ndarray]]  # rows in order, at most BLOCK at a time
    single: bool  # `path` is a float32 .npy, which can be memory-mapped
    texts: tuple[tuple[str, str, int], ...] = ()  # caption, file and row of its embedding


@dataclasses.dataclass(frozen=True)
class Checked:
    """Results of one pass over the rows."""

    digest: str  # of ids and rows
    norms: tuple[float, float]  # lowest and highest

    @property
    def unit(self) -> bool:
        """Whether all rows have unit length."""
        return max(abs(norm - 1) for norm in self.norms) <= UNIT


def find(path: str | Path) -> Given:
    """Opens embeddings in one of the layouts of this module's docstring.

    Raises:
      UserError: there are none, or they cannot be read.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"there are no embeddings at {path}: give a file or a directory.")
    try:
        if path.is_dir():
            given = _clip_retrieval(path)
        elif path.suffix == ".npy":
            ids = _lines(path.with_suffix(".txt"))
            given = _of_npy(path, [path], ids, single=_header(path).dtype == np.float32)
        elif path.suffix == ".npz":
            given = _npz(path)
        elif path.suffix == ".parquet":
            given = _parquet(path)
        else:
            raise UserError(f"{path} is none of {', '.join(SUFFIXES)}, and no directory.")
    except UserError:
        raise
    except Exception as error:  # numpy, zipfile and pyarrow raise many kinds
        raise UserError(f"{path} cannot be read as embeddings: {error}.") from error
    if not given.ids:
        raise UserError(f"{path} holds no embeddings.")
    return given


def check(given: Given, report: Callable[[str, str], None]) -> Checked:
    """Reads all rows once and calls `report(kind, id)` for each unusable row.

    Raises:
      UserError: a file is damaged.
    """
    digest = hashlib.sha256(repr(given.ids).encode())
    lowest, highest, first = np.inf, 0.0, 0
    for block in _blocks(given):
        digest.update(block.tobytes())
        rows_NxE = block.astype(np.float32, copy=False)
        norm_N = np.sqrt(np.einsum("ne,ne->n", rows_NxE, rows_NxE))
        for row in np.flatnonzero(~np.isfinite(norm_N)):
            report("embeddings that hold no finite number", repr(given.ids[first + row]))
        for row in np.flatnonzero(norm_N == 0):
            report("embeddings that are all zero", repr(given.ids[first + row]))
        lowest, highest = min(lowest, norm_N.min()), max(highest, norm_N.max())
        first += len(block)
    if first != len(given.ids):
        raise UserError(f"{given.path} holds {first} embeddings and {len(given.ids)} ids.")
    return Checked(digest.hexdigest()[:32], (float(lowest), float(highest)))


def _blocks(given: Given) -> Iterator[np.ndarray]:
    """The blocks of rows; refuses damaged files."""
    blocks = given.blocks()
    while True:
        try:
            block = next(blocks, None)
        except Exception as error:  # numpy, zipfile and pyarrow raise many kinds
            raise UserError(f"{given.path} cannot be read as embeddings: {error}.") from error
        if block is None:
            return
        yield block


def bank(given: Given, checked: Checked, data_dir: str | Path) -> Path:
    """Returns a float32 .npy of the rows at unit length: the user's file or a copy in `data_dir`.

    Args:
      checked: the result of `check`.
      data_dir: a copy goes to `data_dir/banks`; one that exists is used again.
    """
    if given.single and checked.unit:
        return given.path.resolve()
    path = Path(data_dir).resolve() / "banks" / f"given-{checked.digest}.npy"
    shape = (len(given.ids), given.width)
    if path.exists() and _is_bank(path, shape):
        return path
    if not checked.unit:
        low, high = checked.norms
        warnings.warn(
            f"the rows of {given.path} have norms from {low:.3g} to {high:.3g}: they are scaled to "
            "unit length, as a cosine needs them.",
            stacklevel=2,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in given.blocks():
            rows_NxE = block.astype(np.float32)
            norm_N = np.sqrt(np.einsum("ne,ne->n", rows_NxE, rows_NxE))
            file.write(rows_NxE / norm_N[:, None])
    return path


def _of_npy(
    path: Path,
    parts: list[Path],
    ids: list[str],
    single: bool = False,
    texts: Sequence[tuple[str, str, int]] = (),
) -> Given:
    headers = [_header(part) for part in parts]
    for part, header in zip(parts, headers, strict=True):
        if header.ndim != 2 or header.dtype.kind != "f":
            raise UserError(
                f"{part} must be an array [pictures, width] of floating-point numbers, not "
                f"{list(header.shape)} of {header.dtype}."
            )
        if header.shape[1] != headers[0].shape[1]:
            raise UserError(
                f"{part} has rows of {header.shape[1]} numbers and {parts[0]} of "
                f"{headers[0].shape[1]}: they are not of one model."
            )
    count = sum(len(header) for header in headers)
    if count != len(ids):
        raise UserError(f"{path} holds {count} embeddings and {len(ids)} ids.")

    def blocks() -> Iterator[np.ndarray]:
        for part, header in zip(parts, headers, strict=True):
            for start in range(0, len(header), BLOCK):
                # One map per block: pages that were read count as memory while their map lives.
                yield np.array(np.load(part, mmap_mode="r")[start : start + BLOCK])

    return Given(path, ids, headers[0].shape[1], blocks, single, tuple(texts))


def _is_bank(path: Path, shape: tuple[int, int]) -> bool:
    try:
        header = _header(path)
    except Exception as error:
        warnings.warn(f"{path} is damaged ({error}): it is made anew.", stacklevel=3)
        return False
    return header.shape == shape and header.dtype == np.float32


def _header(path: Path) -> np.memmap:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _lines(path: Path) -> list[str]:
    if not path.exists():
        raise UserError(f"{path} is missing: it must hold the pictures' ids, one a line.")
    return path.read_text(encoding="utf-8").splitlines()


def _npz(path: Path) -> Given:
    with np.load(path, allow_pickle=False) as arrays:
        if not {"ids", "embeddings"} <= set(arrays):
            raise UserError(f"{path} must hold the arrays ids and embeddings, not {arrays.files}.")
        ids = [str(one) for one in arrays["ids"]]

    def rows() -> Iterator[np.ndarray]:
        # A compressed file cannot be memory-mapped: it is read as a stream.
        with zipfile.ZipFile(path) as archive, archive.open("embeddings.npy") as file:
            shape, dtype = _stream_header(path, file)
            for start in range(0, shape[0], BLOCK):
                count = min(BLOCK, shape[0] - start)
                content = file.read(count * shape[1] * dtype.itemsize)
                yield np.frombuffer(content, dtype).reshape(count, shape[1])

    with zipfile.ZipFile(path) as archive, archive.open("embeddings.npy") as file:
        shape, _ = _stream_header(path, file)
    if shape[0] != len(ids):
        raise UserError(f"{path} holds {shape[0]} embeddings and {len(ids)} ids.")
    return Given(path, ids, shape[1], rows, single=False)


def _stream_header(path: Path, file: IO[bytes]) -> tuple[tuple[int, int], np.dtype]:
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[np.lib.format.read_magic(file)]
    shape, by_columns, dtype = read(file)
    if len(shape) != 2 or dtype.kind != "f" or by_columns:
        raise UserError(
            f"{path}: embeddings must be an array [pictures, width] of floating-point numbers, row "
            f"by row, not {list(shape)} of {dtype}."
        )
    return shape, dtype


def _parquet(path: Path) -> Given:
    file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    key = next((name for name in ("id", "image_path") if name in names), None)
    if key is None or "embedding" not in names:
        raise UserError(
            f"{path} must have the columns embedding and id (or image_path), not {names}."
        )
    ids = [str(one) for one in file.read([key]).column(0).to_pylist()]

    def blocks() -> Iterator[np.ndarray]:
        for batch in pq.ParquetFile(path).iter_batches(BLOCK, columns=["embedding"]):
            lengths = np.asarray(pc.list_value_length(batch.column(0)).fill_null(0))
            if (lengths != width).any():
                raise ValueError(f"a row has {lengths[lengths != width][0]} numbers, not {width}")
            yield batch.column(0).flatten().to_numpy(zero_copy_only=False).reshape(-1, width)

    first = next(file.iter_batches(1, columns=["embedding"]), None)
    width = len(first.column(0)[0]) if first is not None else 0
    return Given(path, ids, width, blocks, single=False)


def _clip_retrieval(path: Path) -> Given:
    suffixes = {
        part: found[1]
        for part in path.glob("img_emb/*.npy")
        if (found := re.search(r"(\d+)$", part.stem))
    }
    parts = sorted(suffixes, key=lambda part: int(suffixes[part]))
    if not parts:
        raise UserError(
            f"{path} holds no img_emb/img_emb_0.npy, as clip-retrieval writes them: give such a "
            "directory, or a file."
        )
    ids: list[str] = []
    texts: list[tuple[str, str, int]] = []
    for part in parts:
        suffix = suffixes[part]
        metadata = path / "metadata" / f"metadata_{suffix}.parquet"
        if not metadata.exists():
            raise UserError(f"{metadata} is missing: it must name the pictures of {part.name}.")
        table = pq.read_table(metadata)
        if "image_path" not in table.column_names:
            raise UserError(f"{metadata} has no column image_path, only {table.column_names}.")
        ids += [str(one) for one in table["image_path"].to_pylist()]
        captioned = path / "text_emb" / f"text_emb_{suffix}.npy"
        if not texts and captioned.exists() and "caption" in table.column_names:
            captions = table["caption"].to_pylist()
            rows = [row for row, caption in enumerate(captions) if caption and caption.strip()]
            rows = rows[:: max(1, len(rows) // TEXTS)][:TEXTS]
            texts = [(captions[row], str(captioned.resolve()), row) for row in rows]
    return _of_npy(path, parts, ids, texts=texts)
