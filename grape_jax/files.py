"""Writing a file in one move, and letting go of one that is mapped."""

import contextlib
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np


def replace(path: str | Path, content: bytes | str) -> None:
    """Writes aside and moves: a reader sees the old file or the new one, never half of it."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """`replace` for what is written piece by piece; an exception leaves the old file."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with aside.open("wb") as file:
            yield file
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def replace_lines(path: str | Path, lines: Iterable[str]) -> None:
    """`replace` for a file that need not fit in memory; the lines end with their line breaks."""
    with replacing(path) as file:
        file.writelines(line.encode() for line in lines)


def let_go(array: np.ndarray) -> None:
    """Gives back the memory of what was read of a memory-mapped file; of other arrays, nothing."""
    mapped = isinstance(array.base, mmap.mmap) and not array.flags.writeable
    if mapped and hasattr(mmap, "MADV_DONTNEED"):
        array.base.madvise(mmap.MADV_DONTNEED)
