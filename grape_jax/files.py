"""Writing a file in one move."""

import os
from pathlib import Path


def replace(path: str | Path, content: bytes | str) -> None:
    """Writes aside and moves: a reader sees the old file or the new one, never half of it."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    aside.write_bytes(content.encode() if isinstance(content, str) else content)
    aside.replace(path)
