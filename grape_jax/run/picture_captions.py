"""Captions of query pictures, in place of them or beside them."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from grape_jax.data.benchmark import Query
from grape_jax.retrieval import captions
from grape_jax.retrieval.bank import text_bank
from grape_jax.retrieval.encoder import Retriever
from grape_jax.run import settings
from grape_jax.run.galleries import Galleries
from grape_jax.run.queries import Queries


class PictureCaptions:
    """The captions of a bank that describe a query's picture best."""

    def __init__(
        self, config: ConfigDict, retriever: Retriever, galleries: Galleries, queries: Queries
    ):
        self.config, self.retriever = config, retriever
        self.galleries, self.queries = galleries, queries
        self._popularities: dict[str, np.ndarray] = {}

    def prompt_texts(self, queries: Sequence[Query], split: str) -> list[str]:
        """The user turns of queries, after the earlier turns of their conversations.

        A query's own picture is described by its captions, unless `prompt.captions` is 0.
        """
        rows = [query.image for query in queries if query.image >= 0]
        if not rows or not self.config.prompt.captions:
            return [settings.with_history(self.config, q.history, q.text) for q in queries]
        emb_QxE = self.galleries.open(split).bank_NxE[np.asarray(rows)]
        caption = dict(zip(rows, self.closest(emb_QxE, split), strict=True))
        return [
            settings.with_captions(self.config, caption[query.image], query.text)
            if query.image >= 0
            else query.text
            for query in queries
        ]

    def closest(self, emb_QxE: np.ndarray, split: str) -> list[str]:
        """The captions that describe each of these pictures best, as one line."""
        found = self.lists(emb_QxE, split, self.config.prompt.captions)
        return ["; ".join(best) for best in found]

    def lists(self, emb_QxE: np.ndarray, split: str, count: int) -> list[list[str]]:
        """The captions that describe each of these pictures best, best first.

        Args:
          emb_QxE: the embeddings of the pictures.
          split: the split in whose gallery the captions' popularity is measured.
        """
        texts, bank_CxE = self._bank
        rows_QxC = captions.closest(bank_CxE, self._popularity(split), emb_QxE, count)
        return [[texts[row] for row in best] for best in rows_QxC]

    def _popularity(self, split: str) -> np.ndarray:
        name = self.galleries.name(split)
        if name not in self._popularities:
            gallery_NxE = self.galleries.open(split).bank_NxE
            self._popularities[name] = captions.popularity(self._bank[1], gallery_NxE)
        return self._popularities[name]

    @functools.cached_property
    def _bank(self) -> tuple[list[str], np.ndarray]:
        """The captions to choose from, and their embeddings."""
        texts = self.queries.captions
        folder = Path(self.config.data_dir) / "banks"
        return texts, text_bank(self.retriever, texts, folder)
