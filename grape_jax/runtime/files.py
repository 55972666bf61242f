"""Atomic file writes on local disks and object stores, and memory-mapped arrays."""

import contextlib
import errno
import importlib.util
import io
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from etils import epath

from grape_jax.runtime.errors import UserError

# Errors of the disk, not of the program.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENODEV)


def path(name: str | Path) -> Path:
    """A local path, or a path with the same methods in an object store, such as gs://bucket/run.

    Raises:
      UserError: the package for this object store is not installed.
    """
    if "://" not in str(name):
        return Path(name)
    if str(name).startswith("gs://") and importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{name} is in Google Cloud Storage: run `pip install gcsfs`.")
    return epath.Path(name)


def is_local(path: Path) -> bool:
    """Whether a path is on a local disk, rather than in an object store."""
    return isinstance(path, Path)


def replace(path: str | Path, content: bytes | str) -> None:
    """Writes a file atomically: readers see the old content or the new one, never a part of it."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """`replace` for content that is written in pieces; an exception leaves the old file."""
    path = Path(path) if isinstance(path, str) else path
    if not is_local(path):
        # Object stores write a file atomically.
        content = io.BytesIO()
        yield content
        path.write_bytes(content.getvalue())
        return
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with aside.open("wb") as file:
            yield file
            # Without fsync, a power failure could leave the new name with no content.
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def replace_lines(path: str | Path, lines: Iterable[str]) -> None:
    """`replace` for lines that may not fit in memory together; each ends with a line break."""
    with replacing(path) as file:
        file.writelines(line.encode() for line in lines)


def append(path: Path, text: str) -> None:
    """Appends to a file; an object store cannot append, so there the file is written again."""
    if is_local(path):
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    else:
        path.write_text((path.read_text() if path.exists() else "") + text)


@contextlib.contextmanager
def explain_disk_errors() -> Iterator[None]:
    """Raises a `UserError` if a disk is full, read-only or gone."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        name = error.filename or "a file"
        raise UserError(
            f"{name} could not be written ({error.strerror}): make room or repair the disk; the "
            "same command then resumes from the last checkpoint."
        ) from error


def release(array: np.ndarray) -> None:
    """Frees the pages of a memory-mapped file that were read; does nothing for other arrays."""
    base: object = array.base  # numpy's type does not allow for a mapping
    if isinstance(base, mmap.mmap) and not array.flags.writeable and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)
