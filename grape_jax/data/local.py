"""A user's own pictures and queries.

`prepare` reads what `config.local` names, reports every mistake in it together, and leaves what a
run needs in a folder of its own: `corpus.json` with the ids of the corpus, row by row, and where
its pictures and embeddings lie; `queries.jsonl` with every query, its pictures and its split. The
second is a queries file itself: it can be copied, edited, and given as `local.queries`.

Queries (.jsonl, .csv, .tsv, .parquet): `text`; `image`, or `images` (a list; in a table of text
separated by `;`), ids or file names; optionally `id`, `language`, `reference` (a text that is known
to describe the picture) and `split`. Of a picture whose name stands once in the corpus, the name is
enough, without its folders or its ending. Splits that no query names are taken from the training
queries, by picture; without the column `split` that is all of them.

Pictures: a directory, searched through; a picture's id is its path in it. Instead of it, or beside
it, precomputed embeddings (`grape_jax.data.embedded`), which have ids of their own.
"""

import collections
import csv
import dataclasses
import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict
from tqdm import tqdm

from grape_jax.data import benchmark, embedded
from grape_jax.data.benchmark import Corpus, Query
from grape_jax.data.pictures import content, open_picture
from grape_jax.runtime import files
from grape_jax.runtime.errors import UserError

SHIFTS = ("local",)
SPLITS = ("train", "validation", "test")
TEST_SETS = {"test": "test"}
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
SHOWN = 10  # of the mistakes of one kind
SAMPLE = 16  # pictures that the embeddings' model is recognised by
SPLIT_NAMES = {name: name for name in SPLITS} | {"val": "validation", "valid": "validation"}


@dataclasses.dataclass(frozen=True)
class Precomputed:
    """Embeddings of the corpus that were made elsewhere, and what shows by which model."""

    name: str  # as the user gave it
    bank_NxE: np.ndarray  # float32, memory-mapped
    rows: list[int]  # of the bank, whose pictures are at hand too
    pictures: Sequence[bytes]  # of these rows
    texts: list[str]
    texts_NxE: np.ndarray  # embeddings of the texts, made by the same model as the bank


class Mistakes:
    """What is wrong with the data, by kind, until all of it is reported."""

    def __init__(self):
        self.of_kind: dict[str, list[str]] = collections.defaultdict(list)

    def add(self, kind: str, one: str) -> None:
        self.of_kind[kind].append(one)

    def refuse(self) -> None:
        """Raises one UserError for all of them, where there are any."""
        lines = [
            f"  {kind} ({len(ones)}): {', '.join(ones[:SHOWN])}{', ...' if ones[SHOWN:] else ''}"
            for kind, ones in self.of_kind.items()
        ]
        if lines:
            raise UserError("\n".join(["your data has to be mended first:", *lines]))


# What a run asks for


def gallery_of(split: str) -> str:
    """One corpus for all splits."""
    benchmark.refuse_unknown("split", [split], SPLITS)
    return "corpus"


def folder(config: ConfigDict, data_dir: str | Path) -> Path:
    """Where `prepare` puts what the other functions read.

    Args:
      config: `local` of a run's config.
    """
    absolute = lambda name: name and str(Path(name).expanduser().resolve())
    named = [absolute(name) for name in (config.images, config.embeddings, config.queries)]
    named += [config.split_seed, config.validation_share, config.test_share]
    key = hashlib.sha256(json.dumps(named).encode()).hexdigest()[:8]
    return Path(data_dir) / "local" / f"{Path(config.queries).stem}-{key}"


def load_queries(
    directory: str | Path, shift: str, split: str, limit: int | None = None
) -> list[Query]:
    """The queries of one split, in the order of the user's file.

    Args:
      directory: from `folder`, after `prepare`.
      limit: if there are more, keeps this many (`benchmark.subset`); None: all.
    """
    benchmark.refuse_unknown("shift", [shift], SHIFTS)
    benchmark.refuse_unknown("split", [split], SPLITS)
    row_of = {name: row for row, name in enumerate(_corpus(directory)["ids"])}
    records = [json.loads(line) for line in (Path(directory) / QUERIES).open(encoding="utf-8")]
    groups = _groups([record["images"] for record in records])
    queries = [
        Query(
            id=record["id"],
            text=record["text"],
            language=record["language"],
            group=group,
            targets=tuple(row_of[name] for name in record["images"]),
            reference=record["reference"],
        )
        for record, group in zip(records, groups, strict=True)
        if record["split"] == split
    ]
    return queries if limit is None else benchmark.subset(queries, limit)


def load_corpus(directory: str | Path, gallery: str = "corpus") -> Corpus:
    """The pictures, in the order that a query's rows count in; named by their ids."""
    del gallery
    corpus = _corpus(directory)
    images = _Files(corpus["files"]) if all(corpus["files"]) else None
    return Corpus(ids=corpus["ids"], names=corpus["ids"], images=images)


def load_precomputed(directory: str | Path) -> Precomputed | None:
    """The embeddings that the user gave, None where there are none."""
    corpus = _corpus(directory)
    if not corpus["bank"]:
        return None
    bank_NxE = np.load(corpus["bank"], mmap_mode="r")
    rows = [row for row, file in enumerate(corpus["files"]) if file]
    rows = rows[:: max(1, len(rows) // SAMPLE)][:SAMPLE]
    texts_NxE = [np.load(file, mmap_mode="r")[row] for _, file, row in corpus["texts"]]
    return Precomputed(
        name=corpus["embeddings"],
        bank_NxE=bank_NxE,
        rows=rows,
        pictures=_Files([corpus["files"][row] for row in rows]),
        texts=[text for text, _, _ in corpus["texts"]],
        texts_NxE=np.asarray(texts_NxE, np.float32).reshape(-1, bank_NxE.shape[1]),
    )


QUERIES, CORPUS = "queries.jsonl", "corpus.json"


def _corpus(directory: str | Path) -> dict:
    return json.loads((Path(directory) / CORPUS).read_text(encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class _Files(Sequence):
    """The bytes of files, read when they are asked for."""

    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> bytes:
        return content(self.paths[row])


# Reading what the user gives


def check(config: ConfigDict) -> None:
    """Refuses settings of `config.local` that name too little or contradict each other."""
    if not config.queries or not (config.images or config.embeddings):
        raise UserError(
            "your own data is not named: add --config.local.queries=FILE and "
            "--config.local.images=DIR (or --config.local.embeddings=FILE)."
        )
    if Path(config.images).suffix in embedded.SUFFIXES:
        raise UserError(
            f"local.images={config.images!r} is no directory of pictures: give embeddings as "
            "--config.local.embeddings."
        )
    shares = (config.validation_share, config.test_share)
    if min(shares) <= 0 or sum(shares) >= 1:
        raise UserError(
            "local.validation_share and local.test_share must be above 0 and leave a share of the "
            "pictures to train on."
        )


def prepare(config: ConfigDict, data_dir: str | Path) -> None:
    """Reads and checks the user's files. Nothing is written before all is found good.

    Args:
      config: `local` of a run's config.
      data_dir: the result goes to `folder(config, data_dir)`.

    Raises:
      UserError: a file is missing, or all mistakes inside the files, together.
    """
    check(config)
    directory, mistakes = folder(config, data_dir), Mistakes()
    pictures = list_pictures(config.images) if config.images else {}
    given = embedded.find(config.embeddings) if config.embeddings else None
    ids = given.ids if given else list(pictures)
    for name, count in collections.Counter(ids).items():
        if count > 1:
            mistakes.add("ids that stand more than once in the embeddings", repr(name))
    names = Names(ids, config.images)
    records = [_checked(one, names, mistakes) for one in read_queries(config.queries, mistakes)]
    _check_together(records, mistakes)
    readable = _check_pictures(pictures, directory / READABLE, mistakes)
    checked = embedded.check(given, mistakes.add) if given else None
    mistakes.refuse()

    taken = take_splits(records, config)
    counts = _counts(records)
    corpus = {
        "ids": ids,
        "files": _files_of(ids, pictures) if given else list(map(str, pictures.values())),
        "embeddings": config.embeddings,
        "bank": str(embedded.bank(given, checked, data_dir)) if given else "",
        "texts": given.texts if given else (),
    }
    directory.mkdir(parents=True, exist_ok=True)
    files.replace(directory / CORPUS, json.dumps(corpus, ensure_ascii=False))
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    files.replace(directory / QUERIES, "".join(lines))
    files.replace(directory / READABLE, readable)
    how = f"; {' and '.join(taken)} taken from train by picture" if taken else ""
    print(
        f"your data: {len(ids)} pictures; queries {counts}{how} ({directory / QUERIES})", flush=True
    )


READABLE = "readable.sha256"  # of a listing of pictures that were all decoded once


def list_pictures(directory: str | Path) -> dict[str, Path]:
    """Path in the directory to file, in the order of the paths; hidden ones are passed over.

    Raises:
      UserError: there is no such directory, or no picture in it.
    """
    root = Path(directory).expanduser().resolve()
    if not root.is_dir():
        raise UserError(f"there is no directory {directory}: name the one of your pictures.")
    found = {}
    for path in root.rglob("*"):
        name = path.relative_to(root)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.suffix.lower() in PICTURES and not hidden and path.is_file():
            found[name.as_posix()] = path
    if not found:
        raise UserError(f"{directory} holds no picture ({', '.join(PICTURES)}).")
    return dict(sorted(found.items()))


class Names:
    """From what a query calls a picture to its id: the id, or a name that only one picture has."""

    def __init__(self, ids: Iterable[str], root: str = ""):
        self.root = str(Path(root).expanduser().resolve()) + os.sep if root else ""
        self.ids_of: dict[str, set[str]] = collections.defaultdict(set)
        self.exact = {_plain(one): one for one in ids}
        for one in self.exact.values():
            path = PurePosixPath(_plain(one))
            for name in {path.name, path.stem, str(path.with_suffix(""))}:
                self.ids_of[name].add(one)

    def __call__(self, name: str) -> set[str]:
        """All ids that the name may stand for."""
        name = _plain(name.removeprefix(self.root)).removeprefix("./")
        if name in self.exact:
            return {self.exact[name]}
        return self.ids_of.get(name, set()) or self.ids_of.get(PurePosixPath(name).name, set())


def _plain(name: str) -> str:
    """One form for a name that systems write differently: composed letters, forward slashes."""
    return unicodedata.normalize("NFC", name).replace("\\", "/")


def read_queries(path: str | Path, mistakes: Mistakes) -> Iterator[dict]:
    """The records of a queries file as they are, each with `where` it stands.

    Raises:
      UserError: the file cannot be read, or has not the columns that are needed.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"there is no file {path}: name your queries with local.queries.")
    try:
        match path.suffix.lower():
            case ".jsonl":
                records = list(_json_lines(path, mistakes))
            case ".csv" | ".tsv":
                records = list(_table_of_text(path))
            case ".parquet":
                rows = pq.read_table(path).to_pylist()
                records = [row | {"where": f"row {i}"} for i, row in enumerate(rows, start=1)]
            case other:
                raise UserError(
                    f"{path}: queries in {other or 'a file without ending'} are not read: give "
                    ".jsonl, .csv, .tsv or .parquet."
                )
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    columns = {name for record in records for name in record} - {"where"}
    if records and not ("text" in columns and columns & {"image", "images"}):
        raise UserError(
            f"{path} needs the columns text and image (or images); it has "
            f"{', '.join(sorted(map(str, columns)))}."
        )
    if not records and not mistakes.of_kind:
        raise UserError(f"{path} holds no query.")
    yield from records


def _json_lines(path: Path, mistakes: Mistakes) -> Iterator[dict]:
    for number, line in enumerate(path.open(encoding="utf-8-sig"), start=1):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError:
            record = line
        if isinstance(record, dict):
            yield record | {"where": f"line {number}"}
        elif record is not None:
            mistakes.add("lines of the queries that are no JSON object", f"line {number}")


def _table_of_text(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        for row in rows:
            if None in row:
                raise UserError(
                    f"{path}, line {rows.line_num}, has more cells than the header: put texts that "
                    "hold the separator in quotes."
                )
            if "images" in row:
                row["images"] = [name for name in (row["images"] or "").split(";") if name.strip()]
            yield row | {"where": f"line {rows.line_num}"}


def _checked(record: dict, names: Names, mistakes: Mistakes) -> dict:
    """A query as it is kept; what is wrong with it is reported."""
    cell = lambda name: "" if record.get(name) is None else str(record[name]).strip()
    where, text = record["where"], " ".join(cell("text").split())
    if not text:
        mistakes.add("queries without a text", where)
    listed = record.get("images") or []
    listed = [listed] if isinstance(listed, str) else listed
    if not isinstance(listed, list):
        mistakes.add("queries whose images are no list of names", where)
        listed = []
    called = [name for name in (cell("image"), *(str(one).strip() for one in listed)) if name]
    if not called:
        mistakes.add("queries without a picture", where)
    images = []
    for name in called:
        found = sorted(names(name))
        if not found:
            mistakes.add("pictures of queries that are not in the corpus", f"{name!r} ({where})")
        elif len(found) > 1:
            several = f"{name!r} ({where}): {' or '.join(found[:3])}"
            mistakes.add("pictures of queries whose name fits several", several)
        else:
            images += [one for one in found if one not in images]
    split = cell("split").lower()
    if split and split not in SPLIT_NAMES:
        mistakes.add(f"splits that are none of {', '.join(SPLITS)}", f"{cell('split')!r} ({where})")
    return {
        "id": cell("id") or where.split()[1],
        "text": text,
        "images": images,
        "language": cell("language"),
        "reference": cell("reference"),
        "split": SPLIT_NAMES.get(split, split),
    }


def _check_together(records: list[dict], mistakes: Mistakes) -> None:
    for name, count in collections.Counter(record["id"] for record in records).items():
        if count > 1:
            mistakes.add("ids that stand more than once in the queries", repr(name))
    without = [record["id"] for record in records if not record["split"]]
    if 0 < len(without) < len(records):
        for name in without:
            mistakes.add("queries without a split, where others have one", name)


def _check_pictures(pictures: dict[str, Path], known: Path, mistakes: Mistakes) -> str:
    """Decodes all pictures once; a listing that has not changed since is believed.

    Returns:
      The hash of the listing, to be kept at `known`.
    """
    listing = hashlib.sha256()
    for name, path in pictures.items():
        status = path.stat()
        listing.update(json.dumps([name, status.st_size, status.st_mtime_ns]).encode())
    listing = listing.hexdigest()
    if known.exists() and known.read_text() == listing:
        return listing

    def problem(path: Path) -> str:
        try:
            open_picture(path).close()
            return ""
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        problems = threads.map(problem, pictures.values())
        bar = tqdm(problems, total=len(pictures), desc="looking at the pictures", leave=False)
        for name, said in zip(pictures, bar, strict=True):
            if said:
                mistakes.add("pictures that cannot be read", name)
    return listing


def _files_of(ids: list[str], pictures: dict[str, Path]) -> list[str]:
    """The file of each id, "" where the directory does not hold exactly one that fits."""
    names = Names(pictures)
    found = (names(one) for one in ids)
    return [str(pictures[next(iter(one))]) if len(one) == 1 else "" for one in found]


def _counts(records: list[dict]) -> str:
    counts = collections.Counter(record["split"] for record in records)
    for name in SPLITS:
        if not counts[name]:
            raise UserError(
                f"no query falls in the split {name}: give more queries, a column split that names "
                f"all of {', '.join(SPLITS)}, or other shares (local.validation_share, "
                "local.test_share)."
            )
    return ", ".join(f"{counts[name]} {name}" for name in SPLITS)


# Splits


def take_splits(records: list[dict], config: ConfigDict) -> list[str]:
    """Takes the splits that no query names from the training queries, by picture, in place.

    Without any split all queries are training queries at first.

    Returns:
      The names of these splits.
    """
    named = {record["split"] for record in records} - {""}
    taken = [name for name in SPLITS if name not in named | {"train"}]
    share = lambda split: config[f"{split}_share"] if split in taken else 0.0
    train = [record for record in records if record["split"] in ("", "train")]
    images = [record["images"] for record in train]
    splits = split_by_picture(images, share("validation"), share("test"), config.split_seed)
    for record, split in zip(train, splits, strict=True):
        record["split"] = split
    return taken


def split_by_picture(
    images: Sequence[Sequence[str]], validation_share: float, test_share: float, seed: int
) -> list[str]:
    """The split of each query, so that no picture is in two; the same on every machine.

    A share of the pictures, chosen by a hash: a query that is added moves no other, unless it joins
    two pictures.
    """

    def one(group: str) -> str:
        place = benchmark.hash64(f"split {seed} {group}") / 2**64
        if place < test_share:
            return "test"
        return "validation" if place < test_share + validation_share else "train"

    return [one(group) for group in _groups(images)]


def _groups(images: Sequence[Sequence[str]]) -> list[str]:
    """For each query one of the pictures that it and others are joined by, through the queries."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for names in images:
        for name in names[1:]:
            a, b = sorted((root(names[0]), root(name)))
            parent[b] = a
    return [root(names[0]) for names in images]
