"""The benchmarks by name: what `config.benchmark` stands for."""

from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from grape_jax.data import emoji
from grape_jax.data.benchmark import Corpus, Query
from grape_jax.errors import UserError

NAMES = ("emoji",)


def module(name: str) -> ModuleType:
    """The benchmark's module; `grape_jax.data.benchmark` says what it holds.

    Raises:
      UserError: there is no such benchmark.
    """
    match name:
        case "emoji":
            return emoji
    raise UserError(f"benchmark={name!r} is unknown: choose one of {', '.join(NAMES)}.")


def load_queries(config: ConfigDict, shift: str, split: str, limit: int = 0) -> list[Query]:
    """The queries of one split as a run's config asks for them; a limit takes a fixed subset."""
    return module(config.benchmark).load_queries(Path(config.data_dir), shift, split, limit or None)


def load_corpus(config: ConfigDict, gallery: str) -> Corpus:
    """The pictures of one gallery of a run's benchmark."""
    return module(config.benchmark).load_corpus(Path(config.data_dir), gallery)
