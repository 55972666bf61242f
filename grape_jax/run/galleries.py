"""Galleries: embedded corpora, ready to be ranked in."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from grape_jax.data import catalogue
from grape_jax.data.benchmark import Corpus, Query
from grape_jax.data.local import Precomputed
from grape_jax.retrieval import encoder, ranking
from grape_jax.retrieval.bank import bank_digest, corpus_bank, text_bank
from grape_jax.retrieval.encoder import Retriever
from grape_jax.runtime import processes
from grape_jax.types import Index


@dataclasses.dataclass(frozen=True)
class Gallery:
    """A corpus with its embeddings, on the host and sharded over the mesh."""

    corpus: Corpus
    bank_NxE: np.ndarray
    index: Index
    mesh: Mesh

    def __len__(self) -> int:
        return len(self.bank_NxE)

    def image(self, row: int) -> Image.Image:
        """The picture in this row, or its name on white if there are embeddings only."""
        if self.corpus.images is None:
            blank = Image.new("RGB", (128, 128), "white")
            ImageDraw.Draw(blank).text((4, 56), self.corpus.names[row][-20:], fill="black")
            return blank
        return Image.open(io.BytesIO(self.corpus.images[row])).convert("RGB")


@dataclasses.dataclass(frozen=True)
class QueryPictures(Sequence):
    """The encoded pictures of queries, read on access; None for a query without one."""

    images: Sequence[bytes]
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, query):
        return None if self.rows[query] < 0 else self.images[self.rows[query]]


class Galleries:
    """The galleries of a benchmark, each embedded when it is first opened.

    Opening one is a collective: all processes must do it together.
    """

    def __init__(self, config: ConfigDict, retriever: Retriever, mesh: Mesh):
        self.config, self.retriever, self.mesh = config, retriever, mesh
        self._corpora: dict[str, Corpus] = {}
        self._open: dict[str, Gallery] = {}

    def name(self, split: str) -> str:
        """The name of the gallery that a split's queries are ranked in."""
        return catalogue.find(self.config.benchmark).gallery_of(split)

    def corpus(self, name: str) -> Corpus:
        """The corpus of a gallery, without its embeddings."""
        if name not in self._corpora:
            self._corpora[name] = catalogue.load_corpus(self.config, name)
        return self._corpora[name]

    def query_pictures(self, queries: Sequence[Query], split: str) -> QueryPictures:
        """The queries' own pictures."""
        images = self.corpus(self.name(split)).images
        assert images is not None  # composed queries are of a corpus with pictures
        return QueryPictures(images, [query.image for query in queries])

    def open(self, split: str) -> Gallery:
        """The gallery that a split's queries are ranked in."""
        name = self.name(split)
        if name not in self._open:
            self._open[name] = self._embed(name)
        return self._open[name]

    def _embed(self, name: str) -> Gallery:
        corpus = self.corpus(name)
        given = catalogue.load_precomputed(self.config)
        cache = Path(self.config.data_dir) / "banks"
        if corpus.texts is not None:
            bank_NxE = text_bank(self.retriever, corpus.texts, cache)
        elif given is None:
            assert corpus.images is not None  # a corpus has pictures, embeddings or both
            bank_NxE = corpus_bank(self.retriever, corpus.images, cache)
        else:
            _check_precomputed(self.retriever, given)
            bank_NxE = given.bank_NxE
            if jax.process_count() > 1:
                processes.refuse_differences({f"embeddings.{name}": bank_digest(bank_NxE)})
        index = ranking.shard_corpus(self.mesh, bank_NxE, self.config.retriever.corpus_dtype)
        return Gallery(corpus, bank_NxE, index, self.mesh)


def _check_precomputed(retriever: Retriever, given: Precomputed) -> None:
    """Refuses embeddings that another model than the retriever has made."""
    if retriever.preprocess is not None:
        given_NxE = given.bank_NxE[given.rows]
        encoder.check_embeddings(retriever, given.name, list(given.pictures), given_NxE)
    encoder.check_embeddings(retriever, given.name, given.texts, given.texts_NxE)
