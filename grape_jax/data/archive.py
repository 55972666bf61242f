"""Reading, checking and storing the official files of a benchmark.

A benchmark's `read` returns an `Archive`, in which pictures are named by ids. `store` checks it as
a whole before anything is written, and replaces the ids by rows.
"""

import collections
import dataclasses
import io
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from grape_jax.data import storage
from grape_jax.data.benchmark import Archive, Benchmark, Query, RawPicture
from grape_jax.runtime.errors import UserError

SHOWN = 10  # files or ids listed in a message


def is_stored(data_dir: str | Path, benchmark: Benchmark) -> bool:
    """Whether `store` has written all sets of the benchmark."""
    parts = ("corpus", *benchmark.shifts)
    return all(storage.is_written(data_dir, benchmark.folder(part)) for part in parts)


def store(data_dir: str | Path, benchmark: Benchmark, archive: Archive) -> None:
    """Checks an archive and writes its corpora and queries; prints their sizes.

    A picture that cannot be decoded is left out with a warning if no query refers to it. Sizes that
    differ from the published ones are a warning too: a part of a release may be intended.

    Raises:
      UserError: a repeated id, an empty text, a query of a picture that is missing or cannot be
        decoded. Nothing is written then.
    """
    _check_ids(benchmark, archive)
    archive = _without_unreadable(benchmark, archive)
    _warn_of_other_sizes(benchmark, archive)
    (shift,) = benchmark.shifts
    # An interrupted run may have left one of the two sets, with other row numbers.
    for part in ("corpus", shift):
        shutil.rmtree(Path(data_dir) / benchmark.folder(part), ignore_errors=True)
    galleries = {name: _encoded(name, found) for name, found in archive.pictures.items()}
    storage.write_corpora(data_dir, benchmark.folder(), galleries, benchmark.about)
    queries = {split: _numbered(benchmark, archive, split) for split in archive.queries}
    storage.write_queries(data_dir, benchmark.folder(shift), queries, benchmark.about)
    for label, count in counts(archive).items():
        print(f"{benchmark.name}: {count} {label}")


def counts(archive: Archive) -> dict[str, int]:
    """Returns the numbers of pictures, queries and languages, by the label to print."""
    sizes = {f"pictures of {name}": len(found) for name, found in archive.pictures.items()}
    sizes |= {f"queries of {split}": len(found) for split, found in archive.queries.items()}
    queries = [query for found in archive.queries.values() for query in found]
    return sizes | {"queries": len(queries), "languages": len({q.language for q in queries})}


# Reading


def require(folder: str | Path, names: Sequence[str], source: str) -> None:
    """Checks that a folder contains the files.

    Args:
      source: URL that describes them, for the message.

    Raises:
      UserError: some are missing.
    """
    missing = [name for name in names if not (Path(folder) / name).exists()]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}: {source} describes the files and where to get "
            "them."
        )


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error


def read_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (location for messages, entry) of a JSON file that contains a list.

    Raises:
      UserError: the file is missing, is not JSON, or contains something else.
    """
    entries = read_json(path)
    if not isinstance(entries, list):
        raise UserError(f"{path}: must be a list of entries.")
    yield from ((f"{path}, entry {number}", entry) for number, entry in enumerate(entries))


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (location for messages, value) of each line that is not blank.

    Raises:
      UserError: the file cannot be read, or a line is not JSON.
    """
    for place, line in read_lines(path):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place} cannot be read as JSON: {error}.") from error
        yield place, record


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yields (location for messages, line) of each line that is not blank.

    Raises:
      UserError: the file is missing or is not UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}, line {number}", line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}.") from error


def field(place: str, record: Any, key: str, kind: type | tuple[type, ...]) -> Any:
    """Returns a field of a JSON object.

    Args:
      place: location of the object, for the message.

    Raises:
      UserError: the field is missing or of another type.
    """
    if not isinstance(record, dict) or not isinstance(record.get(key), kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise UserError(f"{place}: {key!r} must be {' or '.join(k.__name__ for k in kinds)}.")
    return record[key]


def one_line(text: str) -> str:
    """Replaces line breaks and repeated spaces by single spaces."""
    return " ".join(text.split())


def picture_file(roots: Iterable[Path], name: str) -> Path:
    """Returns the first existing file of this name; if there is none, that in the first root."""
    candidates = [root / name for root in roots]
    return next((path for path in candidates if path.exists()), candidates[0])


# Checks


def _check_ids(benchmark: Benchmark, archive: Archive) -> None:
    ids_of = {}
    for gallery, pictures in archive.pictures.items():
        ids = [picture.id for picture in pictures]
        _refuse_repeats(f"{benchmark.name}: picture", ids, gallery)
        ids_of[gallery] = set(ids)
    for split, queries in archive.queries.items():
        if not queries:
            raise UserError(f"{benchmark.name}: there is no query in {split}: complete its files.")
        _refuse_repeats(f"{benchmark.name}: query", [query.id for query in queries], split)
        gallery = benchmark.gallery_of(split)
        for query in queries:
            if not query.text:
                raise UserError(f"{benchmark.name}: query {query.id} of {split} has an empty text.")
            missing = [name for name in query.pictures if name not in ids_of[gallery]]
            if missing:
                raise UserError(
                    f"{benchmark.name}: query {query.id} of {split} asks for the picture "
                    f"{missing[0]}, which is not among the pictures of {gallery}."
                )


def _refuse_repeats(what: str, ids: Sequence[str], where: str) -> None:
    twice = [name for name, count in collections.Counter(ids).items() if count > 1]
    if twice:
        raise UserError(f"{what} {twice[0]} stands more than once in {where}.")


def _without_unreadable(benchmark: Benchmark, archive: Archive) -> Archive:
    """Removes the pictures that cannot be decoded and that no query refers to."""
    needed: dict[str, set[str]] = collections.defaultdict(set)
    for split, queries in archive.queries.items():
        needed[benchmark.gallery_of(split)].update(n for query in queries for n in query.pictures)
    kept = {}
    for gallery, pictures in archive.pictures.items():
        with ThreadPoolExecutor() as pool:
            found = pool.map(_problem, pictures)
            bar = tqdm(found, f"checking pictures of {gallery}", len(pictures), unit="picture")
            problems = {p.id: problem for p, problem in zip(pictures, bar, strict=True) if problem}
        fatal = [name for name in problems if name in needed[gallery]]
        if fatal:
            raise UserError(
                f"{benchmark.name}: {len(fatal)} pictures of {gallery} that queries need cannot "
                f"be read: {_listed(fatal, problems)}."
            )
        if problems:
            print(
                f"warning: {benchmark.name}: {len(problems)} pictures of {gallery} cannot be read "
                f"and are left out, since no query needs them: {_listed(problems, problems)}",
                file=sys.stderr,
            )
        kept[gallery] = [picture for picture in pictures if picture.id not in problems]
    return dataclasses.replace(archive, pictures=kept)


def _problem(picture: RawPicture) -> str:
    """Returns why a picture cannot be decoded; "" if it can."""
    try:
        with Image.open(io.BytesIO(picture.read())) as opened:
            opened.load()
    # Pillow raises a SyntaxError for some damaged PNGs; bad base64 is a ValueError.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"{type(error).__name__} in {picture.path}"
    return ""


def _listed(names: Iterable[str], why: Mapping[str, str]) -> str:
    names = list(names)
    shown = [f"{name} ({why[name]})" for name in names[:SHOWN]]
    return ", ".join([*shown, "..."] if len(names) > SHOWN else shown)


def _warn_of_other_sizes(benchmark: Benchmark, archive: Archive) -> None:
    sizes = counts(archive)
    for label, official in benchmark.published.items():
        if sizes[label] != official:
            print(
                f"warning: {benchmark.name}: {sizes[label]} {label}, where the official release "
                f"has {official}",
                file=sys.stderr,
            )


# Writing


def _encoded(gallery: str, pictures: Sequence[RawPicture]) -> Iterator[tuple[str, str, bytes]]:
    for picture in tqdm(pictures, f"writing pictures of {gallery}", unit="picture"):
        yield picture.id, picture.name or picture.id, picture.read()


def _numbered(benchmark: Benchmark, archive: Archive, split: str) -> Iterator[Query]:
    pictures = archive.pictures[benchmark.gallery_of(split)]
    rows = {picture.id: row for row, picture in enumerate(pictures)}
    for query in archive.queries[split]:
        yield Query(
            id=query.id,
            text=query.text,
            language=query.language,
            group=query.group,
            targets=tuple(rows[name] for name in query.targets),
            image=rows[query.image] if query.image else -1,
            subset=tuple(rows[name] for name in query.subset),
        )
