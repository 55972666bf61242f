"""The benchmarks by name, and their data as a run's config asks for it."""

from pathlib import Path

from ml_collections import ConfigDict

from grape_jax.data import (
    cirr,
    cvlue,
    emoji,
    flickr30k_cn,
    local,
    storage,
    text,
    wikipedia,
    xm3600,
)
from grape_jax.data.benchmark import Benchmark, Corpus, Query
from grape_jax.data.local import Precomputed
from grape_jax.runtime.errors import check_choice

LOCAL = Benchmark(
    name="local",
    shifts=local.SHIFTS,
    galleries=dict.fromkeys(local.SPLITS, "corpus"),
    test_sets=local.TEST_SETS,
)

BENCHMARKS: dict[str, Benchmark] = {
    "emoji": emoji.BENCHMARK,
    "flickr30k_cn": flickr30k_cn.BENCHMARK,
    "cvlue": cvlue.BENCHMARK,
    "xm3600": xm3600.BENCHMARK,
    "wikipedia": wikipedia.BENCHMARK,
    "cirr": cirr.BENCHMARK,
    "local": LOCAL,
    "text": text.BENCHMARK,
}


def find(name: str) -> Benchmark:
    """Returns the benchmark of this name.

    Raises:
      UserError: unknown name.
    """
    check_choice("benchmark", name, BENCHMARKS)
    return BENCHMARKS[name]


def composed_shifts(config: ConfigDict) -> tuple[str, ...]:
    """Returns the shifts of a run whose queries are a picture and the words that change it."""
    composed = find(config.benchmark).composed
    return tuple(shift for shift in config.shifts if shift in composed)


def prepare(config: ConfigDict) -> None:
    """Writes the sets that need no official files; the others need `python -m grape_jax.prepare`.

    Raises:
      UserError: a package, WordNet or one of the user's files is missing or malformed.
    """
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
        case "text":
            text.prepare(config.text, config.data_dir)


def prepare_corpus(config: ConfigDict) -> None:
    """Writes the corpus of a run where they are missing, for a use that reads no queries."""
    match config.benchmark:
        case "emoji":
            emoji.prepare(Path(config.data_dir), shifts=())
        case "local" if not (data_folder(config) / local.CORPUS).exists():
            local.prepare(config.local, config.data_dir)
        case "text":
            text.prepare(config.text, config.data_dir)


def load_queries(config: ConfigDict, shift: str, split: str) -> list[Query]:
    """Returns the queries of one split, in a fixed order.

    Raises:
      UserError: unknown benchmark, shift, split or language; the set is missing or damaged.
    """
    if config.benchmark == "local":
        return local.load_queries(data_folder(config), shift, split)
    if config.benchmark == "text":
        return text.load_queries(data_folder(config), shift, split)
    queries = storage.load_queries(find(config.benchmark), config.data_dir, shift, split)
    if config.benchmark == "xm3600":
        return xm3600.select(queries, config.xm3600.languages, config.xm3600.captions)
    return queries


def load_corpus(config: ConfigDict, gallery: str) -> Corpus:
    """Returns the items of one gallery, in the order that the queries' targets index.

    Raises:
      UserError: unknown benchmark; the set is missing or damaged.
    """
    if config.benchmark == "local":
        return local.load_corpus(data_folder(config))
    if config.benchmark == "text":
        return text.load_corpus(data_folder(config))
    return storage.load_corpus(find(config.benchmark), config.data_dir, gallery)


def load_words(config: ConfigDict, shift: str) -> list[Query]:
    """Returns pairs of query and reference without pictures, for the warm-up (`emoji` only)."""
    return emoji.load_words(config.data_dir, shift)


def load_precomputed(config: ConfigDict) -> Precomputed | None:
    """Returns the user's precomputed embeddings of the corpus, or None if there are none."""
    return local.load_precomputed(data_folder(config)) if config.benchmark == "local" else None


def data_folder(config: ConfigDict) -> Path:
    """Returns the folder of the sets; for a user's own data, one for each choice of files."""
    if config.benchmark == "local":
        return local.folder(config.local, config.data_dir)
    if config.benchmark == "text":
        return text.folder(config.text, config.data_dir)
    return Path(config.data_dir)
