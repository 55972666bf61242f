"""From official files to a benchmark's sets: reading, checking, writing.

A benchmark's module reads its files into an `Archive`, in which everything is still named by ids;
`store` checks it as a whole, before anything is written, and numbers the rows.
"""

import base64
import collections
import dataclasses
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from grape_jax.data import benchmark
from grape_jax.data.benchmark import Corpus, Query
from grape_jax.runtime.errors import UserError

SHOWN = 10  # of a list of files or ids in a message


@dataclasses.dataclass(frozen=True)
class Picture:
    """Where a picture lies: a file of its own, or a stretch of base64 in a larger one."""

    id: str
    path: Path
    start: int = 0  # bytes
    length: int = -1  # bytes of base64; -1: the whole file, as it is
    name: str = ""  # a caption for a reader; "": the id

    def read(self) -> bytes:
        """The encoded file.

        Raises:
          OSError: it is not there.
          ValueError: it is no base64.
        """
        if self.length < 0:
            return self.path.read_bytes()
        with self.path.open("rb") as file:
            file.seek(self.start)
            # Both alphabets are in use, the plain one and the one for URLs.
            plain = file.read(self.length).translate(bytes.maketrans(b"-_", b"+/"))
            return base64.b64decode(plain, validate=True)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A query, with ids where `benchmark.Query` has rows."""

    id: str
    text: str
    language: str
    targets: tuple[str, ...]  # empty where the truth is withheld
    image: str = ""  # its own picture, "" is none
    subset: tuple[str, ...] = ()

    @property
    def pictures(self) -> tuple[str, ...]:
        """Every picture that it cannot do without."""
        return (*self.targets, *((self.image,) if self.image else ()), *self.subset)

    @property
    def group(self) -> str:
        return self.targets[0] if self.targets else self.image


@dataclasses.dataclass(frozen=True)
class Archive:
    """All that the official files say."""

    pictures: Mapping[str, Sequence[Picture]]  # by gallery, in the order of the files
    queries: Mapping[str, Sequence[Asked]]  # by split, in the order of the files


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a benchmark is called and where it lies."""

    name: str
    shift: str
    version: str
    source: str  # where the official files are described
    about: str
    gallery_of: Callable[[str], str]
    published: Mapping[str, int]  # numbers of the official release, as `counts` names them

    @property
    def corpus(self) -> str:
        return f"{self.name}/corpus/{self.version}"

    @property
    def queries(self) -> str:
        return f"{self.name}/{self.shift}/{self.version}"


def is_stored(data_dir: str | Path, layout: Layout) -> bool:
    """Whether `store` has finished here."""
    return all(benchmark.is_written(data_dir, f) for f in (layout.corpus, layout.queries))


def store(data_dir: str | Path, layout: Layout, archive: Archive) -> None:
    """Checks an archive, then writes its corpora and its queries; says on stdout what it does.

    A picture that cannot be read leaves its gallery if no query needs it. Numbers that differ from
    the official release's are a warning on stderr: a part of it may be just what is wanted.

    Raises:
      UserError: an id stands twice, a query is empty or asks for a picture that is not there, a
        picture that a query needs cannot be read. Nothing is written then.
    """
    _check_ids(layout, archive)
    archive = _readable(layout, archive)
    _compare(layout, archive)
    # Half of a benchmark that an earlier run left: its rows may be numbered otherwise.
    for folder in (layout.corpus, layout.queries):
        shutil.rmtree(Path(data_dir) / folder, ignore_errors=True)
    galleries = {name: _records(name, found) for name, found in archive.pictures.items()}
    benchmark.write_corpora(data_dir, layout.corpus, galleries, layout.about)
    queries = {split: _numbered(layout, archive, split) for split in archive.queries}
    benchmark.write_queries(data_dir, layout.queries, queries, layout.about)
    for label, count in counts(archive).items():
        print(f"{layout.name}: {count} {label}")


def load_queries(
    data_dir: str | Path, layout: Layout, split: str, limit: int | None = None
) -> list[Query]:
    """The stored queries of one split; see `benchmark.read_queries`."""
    layout.gallery_of(split)  # refuses an unknown one
    return benchmark.read_queries(data_dir, layout.queries, split, limit)


def load_corpus(data_dir: str | Path, layout: Layout, gallery: str) -> Corpus:
    """The stored pictures of one gallery; see `benchmark.read_corpus`."""
    return benchmark.read_corpus(data_dir, layout.corpus, gallery)


def counts(archive: Archive) -> dict[str, int]:
    """How many pictures and queries there are."""
    found = {f"pictures of {name}": len(all_) for name, all_ in archive.pictures.items()}
    found |= {f"queries of {split}": len(all_) for split, all_ in archive.queries.items()}
    every = [query for all_ in archive.queries.values() for query in all_]
    return found | {"queries": len(every), "languages": len({q.language for q in every})}


# Reading, with one sentence for each mistake


def require(folder: str | Path, names: Sequence[str], source: str) -> None:
    """Refuses a folder that lacks some of these files.

    Raises:
      UserError: names what is missing, and where it is described.
    """
    missing = [name for name in names if not (Path(folder) / name).exists()]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}: {source} describes the files and where to get "
            "them."
        )


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
      UserError: it is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error


def read_json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Each line's object, with the place to name in a message; blank lines are passed over.

    Raises:
      UserError: a line is no JSON object.
    """
    for place, line in read_lines(path):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place} cannot be read as JSON: {error}.") from error
        yield place, record


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Each line that is not blank, with the place to name in a message.

    Raises:
      UserError: the file is not UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}, line {number}", line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}.") from error


def field(place: str, record: Any, key: str, kind: type | tuple[type, ...]) -> Any:
    """One field of a JSON object.

    Raises:
      UserError: it is missing or of another kind.
    """
    if not isinstance(record, dict) or not isinstance(record.get(key), kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise UserError(f"{place}: {key!r} must be {' or '.join(k.__name__ for k in kinds)}.")
    return record[key]


def one_line(text: str) -> str:
    """Without line breaks and repeated spaces."""
    return " ".join(text.split())


def picture_file(roots: Iterable[Path], name: str) -> Path:
    """The file of this name in the first of these folders that has it."""
    candidates = [root / name for root in roots]
    return next((path for path in candidates if path.exists()), candidates[0])


# Checks


def _check_ids(layout: Layout, archive: Archive) -> None:
    known = {}
    for gallery, pictures in archive.pictures.items():
        ids = [picture.id for picture in pictures]
        _refuse_repeats(f"{layout.name}: picture", ids, gallery)
        known[gallery] = set(ids)
    for split, queries in archive.queries.items():
        if not queries:
            raise UserError(f"{layout.name}: there is no query in {split}: complete its files.")
        _refuse_repeats(f"{layout.name}: query", [query.id for query in queries], split)
        gallery = layout.gallery_of(split)
        for query in queries:
            if not query.text:
                raise UserError(f"{layout.name}: query {query.id} of {split} has an empty text.")
            missing = [name for name in query.pictures if name not in known[gallery]]
            if missing:
                raise UserError(
                    f"{layout.name}: query {query.id} of {split} asks for the picture "
                    f"{missing[0]}, which is not among the pictures of {gallery}."
                )


def _refuse_repeats(what: str, ids: Sequence[str], where: str) -> None:
    twice = [name for name, count in collections.Counter(ids).items() if count > 1]
    if twice:
        raise UserError(f"{what} {twice[0]} stands more than once in {where}.")


def _readable(layout: Layout, archive: Archive) -> Archive:
    """Without the pictures that cannot be read and that no query needs."""
    needed = collections.defaultdict(set)
    for split, queries in archive.queries.items():
        needed[layout.gallery_of(split)].update(n for query in queries for n in query.pictures)
    kept = {}
    for gallery, pictures in archive.pictures.items():
        with ThreadPoolExecutor() as pool:
            told = pool.map(_what_is_wrong, pictures)
            bar = tqdm(told, f"checking pictures of {gallery}", len(pictures), unit="picture")
            wrong = {p.id: said for p, said in zip(pictures, bar, strict=True) if said}
        asked_for = [name for name in wrong if name in needed[gallery]]
        if asked_for:
            raise UserError(
                f"{layout.name}: {len(asked_for)} pictures of {gallery} that queries need cannot "
                f"be read: {_listed(asked_for, wrong)}."
            )
        if wrong:
            print(
                f"warning: {layout.name}: {len(wrong)} pictures of {gallery} cannot be read and "
                f"are left out, since no query needs them: {_listed(wrong, wrong)}",
                file=sys.stderr,
            )
        kept[gallery] = [picture for picture in pictures if picture.id not in wrong]
    return dataclasses.replace(archive, pictures=kept)


def _what_is_wrong(picture: Picture) -> str:
    """Why a picture cannot be read; "" where it can."""
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


def _compare(layout: Layout, archive: Archive) -> None:
    found = counts(archive)
    for label, official in layout.published.items():
        if found[label] != official:
            print(
                f"warning: {layout.name}: {found[label]} {label}, where the official release has "
                f"{official}",
                file=sys.stderr,
            )


# Writing


def _records(gallery: str, pictures: Sequence[Picture]) -> Iterator[tuple[str, str, bytes]]:
    for picture in tqdm(pictures, f"writing pictures of {gallery}", unit="picture"):
        yield picture.id, picture.name or picture.id, picture.read()


def _numbered(layout: Layout, archive: Archive, split: str) -> Iterator[Query]:
    pictures = archive.pictures[layout.gallery_of(split)]
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
