"""The queries of a run, read from disk when they are first asked for."""

import functools
from collections.abc import Sequence

import grain
import numpy as np
from ml_collections import ConfigDict

from grape_jax.data import benchmark, catalogue, pipeline
from grape_jax.data.benchmark import Query
from grape_jax.retrieval import captions


class Queries:
    """The queries of every shift and split of a benchmark."""

    def __init__(self, config: ConfigDict):
        self.config = config
        self._loaded: dict[tuple[str, str], list[Query]] = {}
        self._most_targets = 0

    def split(self, shift: str, split: str, limit: int = 0) -> list[Query]:
        """The queries of a split; a limit takes a fixed subset, 0 takes all."""
        if (shift, split) not in self._loaded:
            self._loaded[shift, split] = catalogue.load_queries(self.config, shift, split)
        queries = self._loaded[shift, split]
        return benchmark.subset(queries, limit) if limit else list(queries)

    def train(self, shift: str) -> list[Query]:
        """The training queries of a shift."""
        return self.split(shift, "train")

    def training(self) -> list[Query]:
        """The training queries of all shifts."""
        return [query for shift in self.config.shifts for query in self.train(shift)]

    @functools.cached_property
    def captions(self) -> list[str]:
        """The captions that describe a query's picture to the policy, without repetitions.

        They are the lines of `prompt.caption_bank`; without it, as `Benchmark.captions` says.

        Raises:
          UserError: the caption bank cannot be read.
        """
        if self.config.prompt.caption_bank:
            return captions.read_bank(self.config.prompt.caption_bank)
        found = catalogue.find(self.config.benchmark)
        if found.captions == "names":
            galleries = dict.fromkeys(found.galleries.values())
            corpora = [catalogue.load_corpus(self.config, name) for name in galleries]
            return list(dict.fromkeys(name for corpus in corpora for name in corpus.names))
        return list(dict.fromkeys(query.text for query in self.training()))

    def supervised_pairs(self, shift: str) -> list[Query]:
        """The pairs of the warm-up: the training queries, and words if `warm_up.words` is set."""
        words = catalogue.load_words(self.config, shift) if self.config.warm_up.words else []
        return self.train(shift) + words

    def targets(self, queries: Sequence[Query]) -> np.ndarray:
        """Corpus rows of the queries' targets, int32 `[Q, P]`, padded with -1.

        P is the largest number of targets of any query of the run, so that programs over it
        compile once.
        """
        return benchmark.targets_of(queries, self.most_targets)

    def gains(self, queries: Sequence[Query]) -> np.ndarray | None:
        """Relevance grades of the targets, int32 `[Q, P]`, 0 is padding; None: no grades.

        All batches of a run have grades or none, so that programs over them compile once.
        """
        if not self.graded:
            return None
        found = benchmark.gains_of(queries, self.most_targets)
        if found is None:
            return (self.targets(queries) >= 0).astype(np.int32)
        return found

    @functools.cached_property
    def graded(self) -> bool:
        """Whether any training query has relevance grades."""
        return any(query.gains for query in self.training())

    @property
    def most_targets(self) -> int:
        """The largest number of targets of a query."""
        if not self._most_targets:
            splits = catalogue.find(self.config.benchmark).splits
            counts = (
                len(query.targets)
                for shift in self.config.shifts
                for split in splits
                for query in self.split(shift, split)
            )
            self._most_targets = max(1, max(counts, default=1))
        return self._most_targets


def batch_iterators(config: ConfigDict, queries: Queries) -> dict[str, grain.DatasetIterator]:
    """An endless iterator over batches of (shift, query) for each phase that has steps.

    A batch is of one shift, and the same on every process.
    """
    sources = {"warm_up": queries.supervised_pairs, "grpo": queries.train}
    return {
        phase: pipeline.train_iterator(
            [[(shift, query) for query in source(shift)] for shift in config.shifts],
            config[phase].batch_size,
            config.seed + number,
        )
        for number, (phase, source) in enumerate(sources.items())
        if config[phase].steps
    }
