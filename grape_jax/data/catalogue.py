"""The benchmarks by name: what `config.benchmark` stands for."""

from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from grape_jax.data import cirr, cvlue, emoji, flickr30k_cn, local, wikipedia, xm3600
from grape_jax.data.benchmark import Corpus, Query
from grape_jax.data.local import Precomputed
from grape_jax.runtime.errors import UserError

NAMES = ("emoji", "flickr30k_cn", "cvlue", "xm3600", "wikipedia", "cirr", "local")


def module(name: str) -> ModuleType:
    """The benchmark's module; `grape_jax.data.benchmark` says what it holds.

    Raises:
      UserError: there is no such benchmark.
    """
    match name:
        case "emoji":
            return emoji
        case "flickr30k_cn":
            return flickr30k_cn
        case "cvlue":
            return cvlue
        case "xm3600":
            return xm3600
        case "wikipedia":
            return wikipedia
        case "cirr":
            return cirr
        case "local":
            return local
    raise UserError(f"benchmark={name!r} is unknown: choose one of {', '.join(NAMES)}.")


def prepare(config: ConfigDict) -> None:
    """Writes what a run can make by itself; archives need `python -m grape_jax.prepare`."""
    match config.benchmark:
        case "emoji":
            emoji.prepare(
                Path(config.data_dir),
                shifts=config.shifts,
                wordnet_dir=config.wordnet_dir or None,
                with_words=config.warm_up.words,
            )
        case "local":
            local.prepare(config.local, config.data_dir)


def prepare_corpus(config: ConfigDict) -> None:
    """Writes the pictures of a run where they are missing, for a use that reads no queries."""
    match config.benchmark:
        case "emoji":
            emoji.prepare(Path(config.data_dir), shifts=())
        case "local" if not (place(config) / local.CORPUS).exists():
            local.prepare(config.local, config.data_dir)


def load_queries(config: ConfigDict, shift: str, split: str) -> list[Query]:
    """The queries of one split as a run's config asks for them."""
    chosen = config.xm3600 if config.benchmark == "xm3600" else {}
    return module(config.benchmark).load_queries(place(config), shift, split, **chosen)


def load_corpus(config: ConfigDict, gallery: str) -> Corpus:
    """The pictures of one gallery of a run's benchmark."""
    return module(config.benchmark).load_corpus(place(config), gallery)


def load_words(config: ConfigDict, shift: str) -> list[Query]:
    """Pairs of query and reference text beside the benchmark, without pictures."""
    return emoji.load_words(Path(config.data_dir), shift)


def load_precomputed(config: ConfigDict) -> Precomputed | None:
    """The embeddings that a user gave with the pictures or instead of them, or None."""
    return local.load_precomputed(place(config)) if config.benchmark == "local" else None


def place(config: ConfigDict) -> Path:
    """Where the benchmark's sets lie; a user's own data has a folder for each choice of files."""
    if config.benchmark == "local":
        return local.folder(config.local, config.data_dir)
    return Path(config.data_dir)
