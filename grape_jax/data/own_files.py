"""What a user's own pictures and own texts have in common: mistakes, folders and splits."""

import collections
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from grape_jax.data.benchmark import hash64
from grape_jax.runtime.errors import UserError

SPLITS = ("train", "validation", "test")
SHOWN = 10  # mistakes of each kind that are listed


class Mistakes:
    """Mistakes in the user's data, collected by kind to be reported together."""

    def __init__(self) -> None:
        self.by_kind: dict[str, list[str]] = collections.defaultdict(list)

    def add(self, kind: str, item: str) -> None:
        self.by_kind[kind].append(item)

    def refuse(self) -> None:
        """Raises a UserError that lists all mistakes, if there are any."""
        lines = [
            f"  {kind} ({len(items)}): {', '.join(items[:SHOWN])}{', ...' if items[SHOWN:] else ''}"
            for kind, items in self.by_kind.items()
        ]
        if lines:
            raise UserError("\n".join(["your data has mistakes to correct:", *lines]))


def prepared_folder(
    data_dir: str | Path, benchmark: str, main: str, paths: Sequence[str], config: ConfigDict
) -> Path:
    """The folder of prepared data: one for each choice of files, shares and seed.

    Args:
      main: the file that the folder is named after.
      paths: all files; "" is a file that is not given.
      config: a section with `split_seed`, `validation_share` and `test_share`.
    """
    choices = [name and str(Path(name).expanduser().resolve()) for name in paths]
    choices += [config.split_seed, config.validation_share, config.test_share]
    key = hashlib.sha256(json.dumps(choices).encode()).hexdigest()[:8]
    return Path(data_dir) / benchmark / f"{Path(main).stem}-{key}"


def split_by_hash(name: str, seed: int, shares: Mapping[str, float]) -> str:
    """The split of a name, equal on every machine.

    Args:
      shares: of "validation" and "test", 0 to 1; the rest is "train".
    """
    position = hash64(f"split {seed} {name}") / 2**64
    if position < shares["test"]:
        return "test"
    return "validation" if position < shares["test"] + shares["validation"] else "train"
