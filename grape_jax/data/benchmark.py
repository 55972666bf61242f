"""What every benchmark gives: queries, and the pictures among which each is to find its own.

A benchmark is a module of `grape_jax.data` with

  SHIFTS: its sets of queries; each has one prompt.
  SPLITS: the splits of each set.
  TEST_SETS: the splits that a report is made of, each with its name for the reader.
  WITHHELD: only where there is one, the split whose truth a server keeps.
  COMPOSED: True where queries are a picture and the words that change it; may be missing.
  gallery_of(split): the name of the corpus that this split's queries are ranked in.
  prepare(...): writes the sets, once.
  load_queries(data_dir, shift, split, limit) and load_corpus(data_dir, gallery).

This file holds what they share: the values, and sets of records written as array_record by TFDS,
without TensorFlow, and read record by record.
"""

import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from grape_jax.runtime.errors import UserError

SUBSET_SEED = 0  # of the choice under a limit


@dataclasses.dataclass(frozen=True)
class Query:
    """One query with its right pictures. Rows are those of its split's corpus."""

    id: str  # unique in its split
    text: str  # what is asked
    language: str  # "en", "zh", ...
    group: str  # the bootstrap's cluster: queries about one picture, or one family of pictures
    targets: tuple[int, ...]  # rows of the right pictures; empty where the truth is withheld
    reference: str = ""  # a text known to fit, "" where there is none
    image: int = -1  # row of the query's own picture, which leaves the corpus; -1: it has none
    subset: tuple[int, ...] = ()  # rows that the targets compete with in a subset recall


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The pictures to be found, one a row."""

    ids: list[str]
    names: list[str]  # captions for a reader; the ids where there is nothing better
    images: Sequence[bytes] | None  # encoded files, read when asked for; None: embeddings only


QUERY_FEATURES = {
    "id": tfds.features.Text(),
    "text": tfds.features.Text(),
    "language": tfds.features.Text(),
    "group": tfds.features.Text(),
    "targets": tfds.features.Sequence(np.int32),
    "reference": tfds.features.Text(),
    "image": tfds.features.Scalar(np.int32),
    "subset": tfds.features.Sequence(np.int32),
}
CORPUS_FEATURES = {
    "id": tfds.features.Text(),
    "name": tfds.features.Text(),
    "image": tfds.features.Image(),
}


class Records(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """TFDS builder of one set, from records that are handed over. `write` drives it."""

    # TFDS would look for checksums beside this file, by way of a package that it does not install.
    code_path = None

    def __init__(self, *, name: str, config: str, version: str, features, splits, about, data_dir):
        self.name = name
        self.VERSION = tfds.core.Version(version)
        self.BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config, description=about)]
        self._features = features
        self._splits = splits
        self._about = about
        super().__init__(
            config=self.BUILDER_CONFIGS[0],
            version=version,
            data_dir=data_dir,
            file_format="array_record",
        )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self._about,
            features=tfds.features.FeaturesDict(self._features),
            disable_shuffling=True,  # rows are numbered, and order is what makes builds equal
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        return {split: enumerate(records) for split, records in self._splits.items()}

    def _generate_examples(self, records: Iterator) -> Iterator:
        return records


def write_queries(
    data_dir: str | Path, folder: str, splits: Mapping[str, Iterable[Query]], about: str
) -> None:
    """Writes a set of queries to `data_dir/folder`; see `write`."""
    records = {split: map(dataclasses.asdict, queries) for split, queries in splits.items()}
    write(data_dir, folder, QUERY_FEATURES, records, about)


def write_corpora(
    data_dir: str | Path,
    folder: str,
    galleries: Mapping[str, Iterable[tuple[str, str, bytes]]],
    about: str,
) -> None:
    """Writes pictures (id, name, encoded file) to `data_dir/folder`; see `write`."""

    def records(gallery):
        for image_id, name, encoded in gallery:
            yield {"id": image_id, "name": name, "image": io.BytesIO(encoded)}

    splits = {name: records(gallery) for name, gallery in galleries.items()}
    write(data_dir, folder, CORPUS_FEATURES, splits, about)


def write(
    data_dir: str | Path,
    folder: str,
    features: Mapping[str, Any],
    splits: Mapping[str, Iterable[dict]],
    about: str,
) -> None:
    """Writes records as a TFDS dataset that `tfds.builder_from_directory` reads.

    They are written beside their place and moved there when they are whole, so a set that was
    killed is begun again and never read.

    Args:
      folder: "name/config/version"; the set goes to `data_dir/name/config/version`.
      splits: the records of each split, none of them empty.
    """
    name, config, version = folder.split("/")
    with quiet_tfds():
        Records(
            name=name,
            config=config,
            version=version,
            features=features,
            splits=splits,
            about=about,
            data_dir=str(data_dir),
        ).download_and_prepare()


def is_written(data_dir: str | Path, folder: str) -> bool:
    """Whether the set is there as a whole."""
    return (Path(data_dir) / folder / "dataset_info.json").is_file()


def read_queries(
    data_dir: str | Path, folder: str, split: str, limit: int | None = None
) -> list[Query]:
    """The queries of one split, in a fixed order.

    Args:
      limit: if there are more, keeps this many (`subset`); None: all.

    Raises:
      UserError: the set is not there or is damaged; a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: set it to 1 or more, or to None for all queries.")
    with _damage_named(data_dir, folder):
        source = _source(data_dir, folder, split)
        queries = [_query(record) for record in source.__getitems__(range(len(source)))]
    return queries if limit is None else subset(queries, limit)


def read_corpus(data_dir: str | Path, folder: str, gallery: str) -> Corpus:
    """The pictures of one gallery, in the order that a query's rows count in.

    Raises:
      UserError: the set is not there or is damaged.
    """
    with _damage_named(data_dir, folder):
        source = _source(data_dir, folder, gallery, {"image": tfds.decode.SkipDecoding()})
        ids, names = [], []
        for row in range(len(source)):  # one by one: all pictures together may not fit in memory
            record = source[row]
            ids.append(record["id"].decode())
            names.append(record["name"].decode())
    return Corpus(ids, names, _Pictures(source, data_dir, folder))


@dataclasses.dataclass(frozen=True)
class _Pictures(Sequence):
    """Encoded pictures, read from disk one by one."""

    source: Any
    data_dir: str | Path
    folder: str

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> bytes:
        if not 0 <= row < len(self):
            raise IndexError(row)
        with _damage_named(self.data_dir, self.folder):
            return bytes(self.source[int(row)]["image"])


def subset(queries: Sequence[Query], limit: int) -> list[Query]:
    """At most `limit` queries, each language in its proportion, in the given order.

    The choice is the same everywhere. Each language's queries are laid out evenly over the unit
    interval in the order of their hashes; the first `limit` of all are taken.
    """
    by_language = collections.defaultdict(list)
    for query in queries:
        by_language[query.language].append(query)
    place = {}
    for members in by_language.values():
        members.sort(key=lambda query: hash64(f"limit {SUBSET_SEED} {query.id}"))
        for number, query in enumerate(members):
            place[query.id] = ((number + 0.5) / len(members), query.language)
    kept = set(sorted(place, key=place.__getitem__)[:limit])
    return [query for query in queries if query.id in kept]


def hash64(text: str) -> int:
    """64 bits that are the same in every process (Python's own hash is not)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def digest(values: Iterable[Any]) -> dict[str, Any]:
    """How many JSON values there are, and a hash of them in their order."""
    total, count = hashlib.sha256(), 0
    for value in values:
        total.update(json.dumps(value).encode() + b"\n")
        count += 1
    return {"count": count, "digest": total.hexdigest()[:32]}


def refuse_unknown(what: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Raises a UserError that lists what is known."""
    for name in names:
        if name not in known:
            raise UserError(f"There is no {what} {name!r}: choose from {', '.join(known)}.")


def targets_of(queries: Sequence[Query], width: int) -> np.ndarray:
    """The rows of the right pictures, padded with -1: int32 `[Q, width]`.

    Raises:
      ValueError: a query has more of them.
    """
    targets_QxP = np.full((len(queries), width), -1, np.int32)
    for row, query in enumerate(queries):
        targets_QxP[row, : len(query.targets)] = query.targets
    return targets_QxP


def excluded_of(queries: Sequence[Query]) -> np.ndarray | None:
    """The rows of the queries' own pictures: int32 `[Q, 1]`, or None where no query has one."""
    rows_Q = np.asarray([query.image for query in queries], np.int32)
    return rows_Q[:, None] if (rows_Q >= 0).any() else None


def _query(record: dict) -> Query:
    texts = ("id", "text", "language", "group", "reference")
    return Query(
        **{field: record[field].decode() for field in texts},
        targets=tuple(map(int, record["targets"])),
        image=int(record["image"]),
        subset=tuple(map(int, record["subset"])),
    )


def _source(data_dir: str | Path, folder: str, split: str, decoders=None):
    if not is_written(data_dir, folder):
        name, config, _ = folder.split("/")
        raise UserError(
            f"The {name} set {config!r} is not in {data_dir}: run `python -m grape_jax.prepare "
            f"--benchmark={name} --data_dir={data_dir}` first."
        )
    with quiet_tfds():
        builder = tfds.builder_from_directory(str(Path(data_dir) / folder))
        return builder.as_data_source(split, decoders=decoders)


@contextlib.contextmanager
def _damage_named(data_dir: str | Path, folder: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    # array_record and protobuf have no exception of their own for a damaged file.
    except Exception as error:
        name = folder.partition("/")[0]
        raise UserError(
            f"The {name} set in {Path(data_dir) / folder} is damaged: delete that folder and run "
            f"`python -m grape_jax.prepare --benchmark={name}` again."
        ) from error


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Keeps TFDS's bars and lines ("Downloading ...") off the screen: nothing is downloaded.

    Its errors are exceptions and come through.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        logger.setLevel(level)
