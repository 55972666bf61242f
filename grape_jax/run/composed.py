"""Baselines of composed queries that need no policy: the picture, its captions and the words."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from ml_collections import ConfigDict

from grape_jax.data import catalogue
from grape_jax.data.benchmark import Query
from grape_jax.reporting.results import CAPTION_EDIT, PICTURE, PICTURE_EDIT
from grape_jax.retrieval import fusion
from grape_jax.retrieval.encoder import Retriever
from grape_jax.run.answers import QuerySet
from grape_jax.run.galleries import Galleries, Gallery
from grape_jax.run.picture_captions import PictureCaptions
from grape_jax.run.queries import Queries
from grape_jax.run.search import best_ranks

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the picture in the sum of embeddings
Choice = TypeVar("Choice", int, float)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of the baselines, with the queries that they were chosen on."""

    share: float  # of the picture's embedding in "picture + edit"; the rest is the words'
    captions: int  # number of captions in "caption + edit"
    chosen_on: str  # such as "128 validation queries"


CAPTIONS = 3  # of a picture at most, where the policy reads none


@dataclasses.dataclass(frozen=True)
class Search:
    """What a baseline searches with."""

    method: str  # one of results.COMPOSED
    texts: list[str]  # for readers; a picture is shown by its name in brackets
    emb_QxE: np.ndarray  # float32, of unit length
    note: str = ""  # the chosen setting


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The parts of composed queries."""

    picture_QxE: np.ndarray
    edit_QxE: np.ndarray
    captions: list[list[str]]  # of each picture, closest first
    edits: list[str]

    def added(self, share: float) -> np.ndarray:
        """Picture and words as one embedding, float32 `[Q, E]`."""
        pair_2xQxE = np.stack([self.picture_QxE, self.edit_QxE])
        return fusion.mean_embedding(pair_2xQxE, (share, 1 - share))

    def as_text(self, count: int) -> list[str]:
        """The closest `count` captions and the words, as one text."""
        return [
            ", ".join([*captions[:count], edit])
            for captions, edit in zip(self.captions, self.edits, strict=True)
        ]


def tune(
    config: ConfigDict,
    queries: Queries,
    galleries: Galleries,
    retriever: Retriever,
    picture_captions: PictureCaptions,
    shift: str,
) -> Settings:
    """Chooses the settings with the best R@1 on at most `evaluation.validation_limit` queries.

    They are of the validation split, or of the training split if the report tests on the former
    (CIRR). Ties are broken by the mean reciprocal rank, then by the order of the choices.
    """
    tested = "validation" in catalogue.find(config.benchmark).test_sets
    split = "train" if tested else "validation"
    chosen = queries.split(shift, split, config.evaluation.validation_limit)
    gallery, targets_QxP = galleries.open(split), queries.targets(chosen)
    parts = _parts_of(gallery, retriever, picture_captions, chosen, split)
    ranks = lambda emb_QxE: best_ranks(gallery, emb_QxE, chosen, targets_QxP)
    embed = retriever.embed_texts
    return Settings(
        share=_best(SHARES, lambda share: ranks(parts.added(share))),
        captions=_best(
            range(1, max(map(len, parts.captions)) + 1),
            lambda count: ranks(embed(parts.as_text(count))),
        ),
        chosen_on=f"{len(chosen)} {'training' if split == 'train' else split} queries",
    )


def searches(
    gallery: Gallery,
    retriever: Retriever,
    picture_captions: PictureCaptions,
    one: QuerySet,
    settings: Settings,
) -> list[Search]:
    """The searches of every baseline for a set of composed queries.

    Args:
      gallery: that of the set's split.
    """
    parts = _parts_of(gallery, retriever, picture_captions, one.queries, one.split)
    names = gallery.corpus.names
    shown = [f"[{names[query.image]}]" for query in one.queries]
    both = [f"{picture} + {edit}" for picture, edit in zip(shown, parts.edits, strict=True)]
    words = parts.as_text(settings.captions)
    share, chosen = settings.share, f"chosen on {settings.chosen_on}"
    return [
        Search(PICTURE, shown, parts.picture_QxE),
        Search(
            PICTURE_EDIT,
            both,
            parts.added(share),
            f"{share:g} of the picture and {1 - share:.1g} of the words, {chosen}",
        ),
        Search(
            CAPTION_EDIT,
            words,
            retriever.embed_texts(words),
            f"captions of each picture: {settings.captions}, {chosen}",
        ),
    ]


def _parts_of(
    gallery: Gallery,
    retriever: Retriever,
    picture_captions: PictureCaptions,
    queries: Sequence[Query],
    split: str,
) -> _Parts:
    picture_QxE = gallery.bank_NxE[[query.image for query in queries]]
    edits = [query.text for query in queries]
    count = picture_captions.config.prompt.captions or CAPTIONS
    captions = picture_captions.lists(picture_QxE, split, count)
    return _Parts(picture_QxE, retriever.embed_texts(edits), captions, edits)


def _best(choices: Sequence[Choice], ranks_of: Callable[[Choice], np.ndarray]) -> Choice:
    def score(choice: Choice) -> tuple[float, float]:
        rank_Q = ranks_of(choice)
        return float(np.mean(rank_Q == 1)), float(np.mean(1 / rank_Q))

    return max(choices, key=score)
