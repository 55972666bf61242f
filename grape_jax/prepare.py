"""Reads a benchmark's official files and writes the sets that runs are made of.

    python -m grape_jax.prepare --benchmark=cirr --manual_dir=DIR --data_dir=DIR

The module of each benchmark in grape_jax/data says which files are expected in `manual_dir`.
Everything is checked before anything is written. Numbers that differ from the official release's
are a warning that names both, since a part of a release may be just what is wanted.
"""

from pathlib import Path

from absl import flags

from grape_jax.data import archive, catalogue, emoji
from grape_jax.runtime import command_line
from grape_jax.runtime.errors import UserError, exit_with_sentence


def main() -> None:
    flags.DEFINE_string("benchmark", None, f"One of {', '.join(catalogue.NAMES)}.")
    flags.DEFINE_string("manual_dir", None, "The official files; emoji needs none.")
    flags.DEFINE_string("data_dir", "runs/data", "Where the sets go: data_dir of the configs.")
    if rest := command_line.parse():
        raise UserError(f"unexpected argument {rest[0]!r}: options start with --.")
    given = flags.FLAGS
    if given.benchmark is None:
        raise UserError(f"no benchmark is given: add --benchmark={'|'.join(catalogue.NAMES)}.")
    prepare(given.benchmark, given.manual_dir, Path(given.data_dir))


def prepare(name: str, manual_dir: str | None, data_dir: Path) -> None:
    """Prepares one benchmark, where it is not there yet.

    Raises:
      UserError: the user can mend it; nothing is written then.
    """
    found = catalogue.module(name)
    if name == "emoji":
        emoji.prepare(data_dir)
        return
    place = data_dir / name
    if archive.is_stored(data_dir, found.LAYOUT):
        print(f"{name} is in {place} already: delete that folder to prepare it again.")
        return
    if manual_dir is None:
        raise UserError(
            f"no manual_dir is given: add --manual_dir=DIR with the files that {found.SOURCE} "
            "describes."
        )
    if not Path(manual_dir).is_dir():
        raise UserError(f"there is no folder {manual_dir}: give the one with the official files.")
    try:
        found.prepare(manual_dir, data_dir)
    except OSError as error:
        raise UserError(f"{name} cannot be prepared: {error}.") from error
    print(f"{name} is in {place}")


if __name__ == "__main__":
    exit_with_sentence(main)
