"""The values that every benchmark consists of, and small functions on lists of queries.

`Benchmark` holds the names of a benchmark's parts and, for a published one, the function that reads
its official files. Each module of a benchmark has one as `BENCHMARK`; `grape_jax.data.catalogue`
lists them by name.

    emoji                                                built from installed packages
    flickr30k_cn, cvlue, xm3600, wikipedia, cirr         read from official files
    local                                                a user's own pictures and queries
    text                                                 a user's collection of documents
"""

import base64
import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grape_jax.runtime.errors import UserError

SUBSET_SEED = 0  # another seed chooses other queries under a limit


@dataclasses.dataclass(frozen=True)
class Query:
    """One query with its targets. Rows index the corpus of the query's split."""

    id: str  # unique in its split
    text: str
    language: str  # "en", "zh", ...
    group: str  # cluster of the bootstrap: queries about one picture, or one family of pictures
    targets: tuple[int, ...]  # rows of the right items; empty where the truth is withheld
    reference: str = ""  # a text known to describe the target; "": none
    image: int = -1  # row of a composed query's own picture, excluded from its ranking; -1: none
    subset: tuple[int, ...] = ()  # rows of the candidates of a subset recall
    kind: str = ""  # of a composed query's change, such as "colour"; the report breaks down by it
    gains: tuple[int, ...] = ()  # relevance grade of each target, 1 or more; (): all are 1
    history: tuple[str, ...] = ()  # earlier turns of a conversation, oldest first


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The items of one gallery, one per row: pictures, or documents."""

    ids: Sequence[str]
    names: Sequence[str]  # captions to display; the ids where there are none
    images: Sequence[bytes] | None  # encoded files, read lazily; None: documents or embeddings only
    texts: Sequence[str] | None = None  # documents, read lazily; None: pictures


@dataclasses.dataclass(frozen=True)
class RawPicture:
    """A picture of an official release: a file, or a range of base64 in a larger file."""

    id: str
    path: Path
    start: int = 0  # offset in bytes
    length: int = -1  # bytes of base64; -1: the file is the picture
    name: str = ""  # caption to display; "": the id

    def read(self) -> bytes:
        """Returns the encoded picture.

        Raises:
          OSError: the file cannot be read.
          ValueError: the range is not base64.
        """
        if self.length < 0:
            return self.path.read_bytes()
        with self.path.open("rb") as file:
            file.seek(self.start)
            # Releases use the standard or the URL-safe alphabet.
            standard = file.read(self.length).translate(bytes.maketrans(b"-_", b"+/"))
            return base64.b64decode(standard, validate=True)


@dataclasses.dataclass(frozen=True)
class RawQuery:
    """A query of an official release: as `Query`, with picture ids in place of rows."""

    id: str
    text: str
    language: str
    targets: tuple[str, ...]  # empty where the truth is withheld
    image: str = ""  # a composed query's own picture; "": none
    subset: tuple[str, ...] = ()

    @property
    def pictures(self) -> tuple[str, ...]:
        """All pictures that the query refers to."""
        return (*self.targets, *((self.image,) if self.image else ()), *self.subset)

    @property
    def group(self) -> str:
        return self.targets[0] if self.targets else self.image


@dataclasses.dataclass(frozen=True)
class Archive:
    """The contents of a benchmark's official files."""

    pictures: Mapping[str, Sequence[RawPicture]]  # by gallery, in the order of the files
    queries: Mapping[str, Sequence[RawQuery]]  # by split, in the order of the files


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """The names of a benchmark's parts, and how its official files are read."""

    name: str  # the value of `config.benchmark`
    shifts: tuple[str, ...]  # the sets of queries; each has its own prompt
    galleries: Mapping[str, str]  # split -> gallery that its queries are ranked in
    test_sets: Mapping[str, str]  # split -> its title in the report
    composed: tuple[
        str, ...
    ] = ()  # shifts whose queries are a picture and the words that change it
    # Captions that describe such a picture to the policy: "queries", the texts of the training
    # queries, or "names", the names of the gallery's pictures.
    captions: str = "queries"
    withheld: str | None = None  # the split whose truth only an official server has
    version: str = ""  # of the stored sets
    about: str = ""  # description saved with the stored sets
    source: str = ""  # URL that describes the official files
    read: Callable[[Path], Archive] | None = None  # official files -> their contents
    published: Mapping[str, int] = dataclasses.field(default_factory=dict)  # `archive.counts`

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.galleries)

    def gallery_of(self, split: str) -> str:
        """Returns the gallery that the queries of a split are ranked in.

        Raises:
          UserError: unknown split.
        """
        refuse_unknown("split", [split], self.splits)
        return self.galleries[split]

    def folder(self, part: str = "corpus") -> str:
        """Returns where a stored set lies in `data_dir`: `part` is a shift, or "corpus"."""
        return f"{self.name}/{part}/{self.version}"


def subset(queries: Sequence[Query], limit: int) -> list[Query]:
    """Returns at most `limit` queries in the given order, with languages in proportion.

    The choice depends on the queries' ids alone. Each language's queries are sorted by hash and
    spread evenly over the unit interval; the first `limit` of all languages are kept.
    """
    by_language: dict[str, list[Query]] = collections.defaultdict(list)
    for query in queries:
        by_language[query.language].append(query)
    position = {}
    for members in by_language.values():
        members.sort(key=lambda query: hash64(f"limit {SUBSET_SEED} {query.id}"))
        for number, query in enumerate(members):
            position[query.id] = ((number + 0.5) / len(members), query.language)
    kept = set(sorted(position, key=position.__getitem__)[:limit])
    return [query for query in queries if query.id in kept]


def hash64(text: str) -> int:
    """Returns a 64-bit hash that is equal in all processes, unlike Python's `hash`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def digest(values: Iterable[Any]) -> dict[str, Any]:
    """Returns the number of JSON values, and a hash of them in their order."""
    total, count = hashlib.sha256(), 0
    for value in values:
        total.update(json.dumps(value).encode() + b"\n")
        count += 1
    return {"count": count, "digest": total.hexdigest()[:32]}


def refuse_unknown(what: str, names: Iterable[str], choices: Sequence[str]) -> None:
    """Raises a UserError that lists the choices if one of the names is not among them."""
    for name in names:
        if name not in choices:
            raise UserError(f"There is no {what} {name!r}: choose from {', '.join(choices)}.")


def targets_of(queries: Sequence[Query], width: int) -> np.ndarray:
    """Returns the rows of the targets, padded with -1: int32 `[Q, width]`.

    Raises:
      ValueError: a query has more than `width` targets.
    """
    targets_QxP = np.full((len(queries), width), -1, np.int32)
    for row, query in enumerate(queries):
        targets_QxP[row, : len(query.targets)] = query.targets
    return targets_QxP


def gains_of(queries: Sequence[Query], width: int) -> np.ndarray | None:
    """Returns the relevance grades of the targets: int32 `[Q, width]`, 0 is padding.

    None if no query has grades.
    """
    if not any(query.gains for query in queries):
        return None
    gains_QxP = np.zeros((len(queries), width), np.int32)
    for row, query in enumerate(queries):
        gains_QxP[row, : len(query.targets)] = query.gains or 1
    return gains_QxP


def excluded_of(queries: Sequence[Query]) -> np.ndarray | None:
    """Returns the rows of the queries' own pictures: int32 `[Q, 1]`; None if no query has one."""
    rows_Q = np.asarray([query.image for query in queries], np.int32)
    return rows_Q[:, None] if (rows_Q >= 0).any() else None
