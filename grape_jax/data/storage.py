"""Sets of queries and pictures on disk: TFDS datasets in array_record files, without TensorFlow.

`grape_jax.prepare` and `emoji.prepare` write them once; a run reads them record by record.
"""

import contextlib
import dataclasses
import io
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from grape_jax.data.benchmark import Benchmark, Corpus, Query, refuse_unknown
from grape_jax.runtime.errors import UserError

QUERY_FEATURES = {
    "id": tfds.features.Text(),
    "text": tfds.features.Text(),
    "language": tfds.features.Text(),
    "group": tfds.features.Text(),
    "targets": tfds.features.Sequence(np.int32),
    "reference": tfds.features.Text(),
    "image": tfds.features.Scalar(np.int32),
    "subset": tfds.features.Sequence(np.int32),
    "kind": tfds.features.Text(),
}
CORPUS_FEATURES = {
    "id": tfds.features.Text(),
    "name": tfds.features.Text(),
    "image": tfds.features.Image(),
}


class _Builder(tfds.dataset_builders.AdhocBuilder, skip_registration=True):  # type: ignore[call-arg]
    """TFDS builder of one set from records in memory, without TensorFlow."""

    # Otherwise TFDS searches for checksums beside this file, with a package it does not install.
    code_path = None

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        return {split: enumerate(records) for split, records in self._split_datasets.items()}


def write_queries(
    data_dir: str | Path, folder: str, splits: Mapping[str, Iterable[Query]], about: str
) -> None:
    """Writes a set of queries.

    Args:
      data_dir: root of all sets.
      folder: "name/set/version" below `data_dir` (`Benchmark.folder`). The set is written beside
        it and moved there when complete, so that an interrupted build is never read.
      splits: the queries of each split, none of them empty.
      about: description saved with the set.
    """
    record = lambda query: {field: getattr(query, field) for field in QUERY_FEATURES}
    records = {split: map(record, queries) for split, queries in splits.items()}
    _write(data_dir, folder, QUERY_FEATURES, records, about)


def write_corpora(
    data_dir: str | Path,
    folder: str,
    galleries: Mapping[str, Iterable[tuple[str, str, bytes]]],
    about: str,
) -> None:
    """Writes the pictures (id, name, encoded file) of each gallery; see `write_queries`."""

    def records(gallery: Iterable[tuple[str, str, bytes]]) -> Iterator[dict]:
        for image_id, name, encoded in gallery:
            yield {"id": image_id, "name": name, "image": io.BytesIO(encoded)}

    splits = {name: records(gallery) for name, gallery in galleries.items()}
    _write(data_dir, folder, CORPUS_FEATURES, splits, about)


def _write(
    data_dir: str | Path,
    folder: str,
    features: Mapping[str, Any],
    splits: Mapping[str, Iterable[dict]],
    about: str,
) -> None:
    name, config, version = folder.split("/")
    with _quiet_tfds():
        _Builder(
            name=name,
            config=tfds.core.BuilderConfig(name=config, description=about),
            version=version,
            features=tfds.features.FeaturesDict(features),
            split_datasets=splits,
            description=about,
            data_dir=str(data_dir),
            file_format="array_record",
            disable_shuffling=True,  # targets are row numbers
        ).download_and_prepare()


def is_written(data_dir: str | Path, folder: str) -> bool:
    """Whether the set is complete."""
    return (Path(data_dir) / folder / "dataset_info.json").is_file()


def load_queries(benchmark: Benchmark, data_dir: str | Path, shift: str, split: str) -> list[Query]:
    """Returns the stored queries of one split, in the order they were written in.

    Raises:
      UserError: unknown shift or split; the set is missing or damaged.
    """
    refuse_unknown("shift", [shift], benchmark.shifts)
    refuse_unknown("split", [split], benchmark.splits)
    return read_queries(data_dir, benchmark.folder(shift), split)


def load_corpus(benchmark: Benchmark, data_dir: str | Path, gallery: str) -> Corpus:
    """Returns the stored pictures of one gallery, in the order that targets index.

    Raises:
      UserError: the set is missing or damaged.
    """
    return read_corpus(data_dir, benchmark.folder(), gallery)


def read_queries(data_dir: str | Path, folder: str, split: str) -> list[Query]:
    """Reads one split of a set that `write_queries` wrote."""
    with _name_damaged_set(data_dir, folder):
        source = _open(data_dir, folder, split)
        return [_query(record) for record in source.__getitems__(range(len(source)))]


def read_corpus(data_dir: str | Path, folder: str, gallery: str) -> Corpus:
    """Reads one gallery of a set that `write_corpora` wrote; its pictures are read lazily."""
    with _name_damaged_set(data_dir, folder):
        source = _open(data_dir, folder, gallery, {"image": tfds.decode.SkipDecoding()})
        ids, names = [], []
        for row in range(len(source)):  # one by one: all pictures may not fit in memory
            record = source[row]
            ids.append(record["id"].decode())
            names.append(record["name"].decode())
    return Corpus(ids, names, _Pictures(source, data_dir, folder))


@dataclasses.dataclass(frozen=True)
class _Pictures(Sequence):
    """Encoded pictures, read from disk on access."""

    source: Any
    data_dir: str | Path
    folder: str

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> bytes:  # type: ignore[override]
        if not 0 <= row < len(self):
            raise IndexError(row)
        with _name_damaged_set(self.data_dir, self.folder):
            return bytes(self.source[int(row)]["image"])


def _query(record: dict) -> Query:
    texts = ("id", "text", "language", "group", "reference", "kind")
    return Query(
        **{field: record[field].decode() for field in texts},
        targets=tuple(map(int, record["targets"])),
        image=int(record["image"]),
        subset=tuple(map(int, record["subset"])),
    )


def _open(data_dir: str | Path, folder: str, split: str, decoders: dict | None = None) -> Any:
    if not is_written(data_dir, folder):
        name, config, _ = folder.split("/")
        raise UserError(
            f"The {name} set {config!r} is not in {data_dir}: run `python -m grape_jax.prepare "
            f"--benchmark={name} --data_dir={data_dir}` first."
        )
    with _quiet_tfds():
        builder = tfds.builder_from_directory(str(Path(data_dir) / folder))
        return builder.as_data_source(split, decoders=decoders)


@contextlib.contextmanager
def _name_damaged_set(data_dir: str | Path, folder: str) -> Iterator[None]:
    """Turns any error of reading a set into a UserError that names the set."""
    try:
        yield
    except UserError:
        raise
    # array_record and protobuf have no exception type of their own for a damaged file.
    except Exception as error:
        name = folder.partition("/")[0]
        raise UserError(
            f"The {name} set in {Path(data_dir) / folder} is damaged: delete that folder and run "
            f"`python -m grape_jax.prepare --benchmark={name}` again."
        ) from error


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Hides TFDS's progress bars and log lines; its errors are exceptions and pass."""
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
