"""Reads a benchmark's official files and writes the sets that a run reads.

    python -m grape_jax.prepare --benchmark=cirr --manual_dir=DIR --data_dir=DIR

The docstring of each module in grape_jax/data lists the files that `manual_dir` must contain.
Everything is checked before anything is written. Sizes that differ from those of the official
release are a warning, since a part of a release may be intended.
"""

from pathlib import Path

from absl import flags

from grape_jax.data import archive, catalogue, emoji
from grape_jax.runtime import command_line
from grape_jax.runtime.errors import UserError, exit_with_sentence


def main() -> None:
    flags.DEFINE_string("benchmark", None, f"One of {', '.join(catalogue.BENCHMARKS)}.")
    flags.DEFINE_string("manual_dir", None, "The official files; emoji needs none.")
    flags.DEFINE_string("data_dir", "runs/data", "Where the sets go: data_dir of the configs.")
    if rest := command_line.parse():
        raise UserError(f"unexpected argument {rest[0]!r}: options start with --.")
    given = flags.FLAGS
    if given.benchmark is None:
        raise UserError(f"no benchmark is given: add --benchmark={'|'.join(catalogue.BENCHMARKS)}.")
    prepare(given.benchmark, given.manual_dir, Path(given.data_dir))


def prepare(name: str, manual_dir: str | None, data_dir: Path) -> None:
    """Prepares one benchmark unless it is stored in `data_dir` already.

    Raises:
      UserError: a file is missing or malformed; nothing is written then.
    """
    benchmark = catalogue.find(name)
    if name == "emoji":
        emoji.prepare(data_dir)
        return
    if benchmark.read is None:
        raise UserError(
            f"benchmark={name!r} has no official files: `grape_jax.train` prepares it from its "
            f"config, such as --config=configs/{name}.py."
        )
    folder = data_dir / name
    if archive.is_stored(data_dir, benchmark):
        print(f"{name} is in {folder} already: delete that folder to prepare it again.")
        return
    if manual_dir is None:
        raise UserError(
            f"no manual_dir is given: add --manual_dir=DIR with the files that {benchmark.source} "
            "describes."
        )
    if not Path(manual_dir).is_dir():
        raise UserError(f"there is no folder {manual_dir}: give the one with the official files.")
    try:
        archive.store(data_dir, benchmark, benchmark.read(Path(manual_dir)))
    except OSError as error:
        raise UserError(f"{name} cannot be prepared: {error}.") from error
    print(f"{name} is in {folder}")


if __name__ == "__main__":
    exit_with_sentence(main)
