"""Writing files so that no reader, and no later run, finds half of one; letting go of mapped ones.

Local disks and object stores.
"""

import contextlib
import errno
import importlib.util
import io
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import BinaryIO

import numpy as np
from etils import epath

from grape_jax.runtime.errors import UserError

# What is wrong with the disk, not with the program.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENODEV)


def path(name: str | PurePath) -> Path:
    """A local path, or one of an object store such as gs://bucket/run, with the same methods.

    Raises:
      UserError: the package that reaches the store is missing.
    """
    if "://" not in str(name):
        return Path(name)
    if str(name).startswith("gs://") and importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{name} is in Google Cloud Storage: run `pip install gcsfs`.")
    return epath.Path(name)


def is_local(path: PurePath) -> bool:
    return isinstance(path, Path)


def replace(path: str | PurePath, content: bytes | str) -> None:
    """Writes aside and moves: a reader sees the old file or the new one, never half of it."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: str | PurePath) -> Iterator[BinaryIO]:
    """`replace` for what is written piece by piece; an exception leaves the old file."""
    path = Path(path) if isinstance(path, str) else path
    if not is_local(path):
        # An object store shows a file once it is whole.
        content = io.BytesIO()
        yield content
        path.write_bytes(content.getvalue())
        return
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with aside.open("wb") as file:
            yield file
            # Otherwise a power failure may leave the new name without its content.
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def replace_lines(path: str | PurePath, lines: Iterable[str]) -> None:
    """`replace` for a file that need not fit in memory; the lines end with their line breaks."""
    with replacing(path) as file:
        file.writelines(line.encode() for line in lines)


def append(path: Path, text: str) -> None:
    """Adds to the end of a file; in an object store, which cannot, the file is written anew."""
    if is_local(path):
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    else:
        path.write_text((path.read_text() if path.exists() else "") + text)


@contextlib.contextmanager
def failures_told():
    """Turns a disk that is full, read-only or gone into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        name = error.filename or "a file"
        raise UserError(
            f"{name} could not be written ({error.strerror}): make room or mend the disk; the same "
            "command then goes on from the last checkpoint."
        ) from error


def release(array: np.ndarray) -> None:
    """Gives back the memory of what was read of a memory-mapped file; of other arrays, nothing."""
    mapped = isinstance(array.base, mmap.mmap) and not array.flags.writeable
    if mapped and hasattr(mmap, "MADV_DONTNEED"):
        array.base.madvise(mmap.MADV_DONTNEED)
