"""Locates checkpoints in local directories or on the Hugging Face hub."""

import re
from pathlib import Path

import huggingface_hub

from grape_jax.runtime.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def directory(path_or_hub_id: str | Path, patterns: list[str]) -> Path:
    """A local directory, without network access, or the snapshot of a hub repository.

    Args:
      patterns: names of the files to download, as globs.

    Raises:
      UserError: there is no such directory, and no such repository can be downloaded.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path} is a file: pass the directory of the checkpoint.")
    if not isinstance(path_or_hub_id, str) or not HUB_ID.fullmatch(path_or_hub_id):
        raise UserError(f"there is no directory {path}: pass one, or a hub id (owner/name).")
    try:
        return Path(huggingface_hub.snapshot_download(path_or_hub_id, allow_patterns=patterns))
    except Exception as error:  # network, hub and cache raise many kinds
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"there is no directory {path}, and the hub gave no repository of that name "
            f"({type(error).__name__}: {reason}): check the name and the network."
        ) from error
