"""Writing a file in one move."""

import os
from collections.abc import Iterable
from pathlib import Path


def replace(path: str | Path, content: bytes | str) -> None:
    """Writes aside and moves: a reader sees the old file or the new one, never half of it."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    aside.write_bytes(content.encode() if isinstance(content, str) else content)
    aside.replace(path)


def replace_lines(path: str | Path, lines: Iterable[str]) -> None:
    """`replace` for a file that need not fit in memory; the lines end with their line breaks."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.writelines(lines)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
