"""A user's own pictures and queries.

`prepare` reads the files named by `config.local`, reports all mistakes in them together, and writes
two files to a folder of its own:

    corpus.json     the ids of the corpus, row by row, and the paths of its pictures and embeddings
    queries.jsonl   every query with its pictures and its split; itself a valid queries file, which
                    can be copied, edited, and given as `local.queries`

Queries (.jsonl, .csv, .tsv, .parquet)
    text        required
    image       required, or `images`: one or several picture ids or file names; a list, or in a
                text table one cell with `;` between the names
    id          default: the number of the line
    language    e.g. "en"
    reference   a text that describes the picture, for the supervised warm-up
    split       train, validation or test; splits that no query names are taken from the training
                queries, by picture. Without this column, all queries start as training queries.

A file name that occurs once in the corpus suffices, without its folders or suffix.

Pictures: a directory, searched recursively; the id of a picture is its path in the directory.
Precomputed embeddings (`grape_jax.data.embedded`), given instead of or beside the pictures, bring
their own ids.
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
from grape_jax.data.own_files import SPLITS, Mistakes, prepared_folder, split_by_hash
from grape_jax.data.pictures import content, open_picture
from grape_jax.runtime import files
from grape_jax.runtime.errors import UserError

SHIFTS = ("local",)
TEST_SETS = {"test": "test"}
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
SAMPLE = 16  # pictures to check with which model made the embeddings
SPLIT_NAMES = {name: name for name in SPLITS} | {"val": "validation", "valid": "validation"}


@dataclasses.dataclass(frozen=True)
class Precomputed:
    """The user's embeddings of the corpus, with samples to check which model made them."""

    name: str  # path, as given by the user
    bank_NxE: np.ndarray  # float32, memory-mapped
    rows: list[int]  # sampled rows whose pictures are available
    pictures: Sequence[bytes]  # the pictures of `rows`
    texts: list[str]  # sampled captions
    texts_NxE: np.ndarray  # float32, their embeddings by the model of the bank


# Reading prepared data


def folder(config: ConfigDict, data_dir: str | Path) -> Path:
    """The folder of the prepared data: one for each choice of files, shares and seed.

    Args:
      config: the section `local` of a run's config.
    """
    paths = (config.images, config.embeddings, config.queries)
    return prepared_folder(data_dir, "local", config.queries, paths, config)


def load_queries(directory: str | Path, shift: str, split: str) -> list[Query]:
    """The queries of one split, in the order of the user's file.

    Args:
      directory: from `folder`, after `prepare`.

    Raises:
      UserError: unknown shift or split.
    """
    benchmark.refuse_unknown("shift", [shift], SHIFTS)
    benchmark.refuse_unknown("split", [split], SPLITS)
    row_of = {name: row for row, name in enumerate(_corpus(directory)["ids"])}
    records = [json.loads(line) for line in (Path(directory) / QUERIES).open(encoding="utf-8")]
    groups = _groups([record["images"] for record in records])
    return [
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


def load_corpus(directory: str | Path) -> Corpus:
    """The pictures, in the order that the queries' targets index; their names are their ids."""
    corpus = _corpus(directory)
    images = _Files(corpus["files"]) if all(corpus["files"]) else None
    return Corpus(ids=corpus["ids"], names=corpus["ids"], images=images)


def load_precomputed(directory: str | Path) -> Precomputed | None:
    """The user's embeddings, or None if there are none."""
    corpus = _corpus(directory)
    if not corpus["bank"]:
        return None
    bank_NxE = np.load(corpus["bank"], mmap_mode="r")
    rows = [row for row, file in enumerate(corpus["files"]) if file]
    rows = rows[:: max(1, len(rows) // SAMPLE)][:SAMPLE]
    return Precomputed(
        name=corpus["embeddings"],
        bank_NxE=bank_NxE,
        rows=rows,
        pictures=_Files([corpus["files"][row] for row in rows]),
        texts=[text for text, _, _ in corpus["texts"]],
        texts_NxE=_rows_of(corpus["texts"], bank_NxE.shape[1]),
    )


def pictures_in(directory: str | Path) -> Corpus:
    """The pictures of a directory as a corpus without queries.

    Raises:
      UserError: there is no such directory, or no picture in it.
    """
    found = list_pictures(directory)
    return Corpus(ids=list(found), names=list(found), images=_Files(list(map(str, found.values()))))


def embeddings_in(path: str | Path, data_dir: str | Path) -> tuple[Corpus, Precomputed]:
    """Embeddings as a corpus without queries.

    Args:
      data_dir: rows that cannot be used in place are copied to `data_dir/banks`.

    Raises:
      UserError: there are none, they cannot be read, or rows or ids cannot be used.
    """
    given, mistakes = embedded.find(path), Mistakes()
    _check_unique(given.ids, mistakes)
    checked = embedded.check(given, mistakes.add)
    mistakes.refuse()
    bank_NxE = np.load(embedded.bank(given, checked, data_dir), mmap_mode="r")
    return Corpus(ids=given.ids, names=given.ids, images=None), Precomputed(
        name=str(path),
        bank_NxE=bank_NxE,
        rows=[],
        pictures=[],
        texts=[text for text, _, _ in given.texts],
        texts_NxE=_rows_of(given.texts, bank_NxE.shape[1]),
    )


def _rows_of(texts: Sequence[tuple[str, str, int]], width: int) -> np.ndarray:
    """The embeddings of captions, each a row of a file: float32 `[N, width]`."""
    rows = [np.load(file, mmap_mode="r")[row] for _, file, row in texts]
    return np.asarray(rows, np.float32).reshape(-1, width)


QUERIES, CORPUS = "queries.jsonl", "corpus.json"


def _corpus(directory: str | Path) -> dict:
    return json.loads((Path(directory) / CORPUS).read_text(encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class _Files(Sequence):
    """The bytes of files, read lazily."""

    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> bytes:  # type: ignore[override]
        return content(self.paths[row])


# Reading the user's files


def check(config: ConfigDict) -> None:
    """Validates the section `local` of a config.

    Raises:
      UserError: a path is missing, or the shares of the splits leave nothing for training.
    """
    if not config.queries or not (config.images or config.embeddings):
        raise UserError(
            "local.queries and local.images (or local.embeddings) must be set: add "
            "--config.local.queries=FILE and --config.local.images=DIR "
            "(or --config.local.embeddings=FILE)."
        )
    if Path(config.images).suffix in embedded.SUFFIXES:
        raise UserError(
            f"local.images={config.images!r} is not a directory of pictures: pass embeddings with "
            "--config.local.embeddings."
        )
    shares = (config.validation_share, config.test_share)
    if min(shares) <= 0 or sum(shares) >= 1:
        raise UserError(
            "local.validation_share and local.test_share must be above 0 and add up to less than "
            "1, so that pictures are left for training."
        )


def prepare(config: ConfigDict, data_dir: str | Path) -> None:
    """Reads and checks the user's files, and writes the prepared data if there are no mistakes.

    Args:
      config: the section `local` of a run's config.
      data_dir: the data goes to `folder(config, data_dir)`.

    Raises:
      UserError: a file is missing, or there are mistakes in the files (all are listed).
    """
    check(config)
    directory, mistakes = folder(config, data_dir), Mistakes()
    pictures = list_pictures(config.images) if config.images else {}
    given = embedded.find(config.embeddings) if config.embeddings else None
    ids = given.ids if given else list(pictures)
    _check_unique(ids, mistakes)
    names = Names(ids, config.images)
    rows = read_queries(config.queries, mistakes)
    records = [_query_record(row, names, mistakes) for row in rows]
    _check_ids_and_splits(records, mistakes)
    listing = _check_pictures(pictures, directory / READABLE, mistakes)
    checked = embedded.check(given, mistakes.add) if given else None
    mistakes.refuse()

    derived = assign_splits(records, config)
    counts = _split_counts(records)
    corpus = {
        "ids": ids,
        "files": _files_of(ids, pictures) if given else list(map(str, pictures.values())),
        "embeddings": config.embeddings,
        "bank": str(embedded.bank(given, checked, data_dir)) if given and checked else "",
        "texts": given.texts if given else (),
    }
    directory.mkdir(parents=True, exist_ok=True)
    files.replace(directory / CORPUS, json.dumps(corpus, ensure_ascii=False))
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    files.replace(directory / QUERIES, "".join(lines))
    files.replace(directory / READABLE, listing)
    how = f"; {' and '.join(derived)} taken from train by picture" if derived else ""
    print(
        f"your data: {len(ids)} pictures; queries {counts}{how} ({directory / QUERIES})", flush=True
    )


READABLE = "readable.sha256"  # hash of a directory listing whose pictures have all been decoded


def list_pictures(directory: str | Path) -> dict[str, Path]:
    """Maps the id of each picture (its path in the directory) to its file, sorted by id.

    Hidden files and folders are left out.

    Raises:
      UserError: there is no such directory, or no picture in it.
    """
    root = Path(directory).expanduser().resolve()
    if not root.is_dir():
        raise UserError(
            f"there is no directory {directory}: set local.images to the directory of your "
            "pictures."
        )
    found = {}
    for path in root.rglob("*"):
        name = path.relative_to(root)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.suffix.lower() in PICTURES and not hidden and path.is_file():
            found[name.as_posix()] = path
    if not found:
        raise UserError(
            f"{directory} holds no picture: local.images must be a directory with files in "
            f"{', '.join(PICTURES)}."
        )
    return dict(sorted(found.items()))


class Names:
    """Resolves the name by which a query refers to a picture: its id, or a unique file name."""

    def __init__(self, ids: Iterable[str], root: str = ""):
        self.root = str(Path(root).expanduser().resolve()) + os.sep if root else ""
        self.ids_of: dict[str, set[str]] = collections.defaultdict(set)
        self.exact = {_normalise(one): one for one in ids}
        for one in self.exact.values():
            path = PurePosixPath(_normalise(one))
            for name in {path.name, path.stem, str(path.parent / path.stem)}:
                self.ids_of[name].add(one)

    def __call__(self, name: str) -> set[str]:
        """All ids that the name may refer to."""
        name = _normalise(name.removeprefix(self.root)).removeprefix("./")
        if name in self.exact:
            return {self.exact[name]}
        return self.ids_of.get(name, set()) or self.ids_of.get(PurePosixPath(name).name, set())


def _normalise(name: str) -> str:
    """A name with composed letters and forward slashes, as it may differ between systems."""
    return unicodedata.normalize("NFC", name).replace("\\", "/")


def read_queries(path: str | Path, mistakes: Mistakes) -> Iterator[dict]:
    """The rows of a queries file, unchecked, each with its place in the file as `where`.

    Raises:
      UserError: the file cannot be read, is empty, or lacks a required column.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"there is no file {path}: set local.queries to the file of your queries.")
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
                    f"{path}: queries in {other or 'a file without a suffix'} are not supported: "
                    "use .jsonl, .csv, .tsv or .parquet."
                )
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    columns = {name for record in records for name in record} - {"where"}
    if records and not ("text" in columns and columns & {"image", "images"}):
        raise UserError(
            f"{path} needs the columns text and image (or images); it has "
            f"{', '.join(sorted(map(str, columns)))}."
        )
    if not records and not mistakes.by_kind:
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
            mistakes.add("query lines that are not a JSON object", f"line {number}")


def _table_of_text(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        for row in rows:
            if None in row:
                raise UserError(
                    f"{path}, line {rows.line_num}, has more cells than the header: quote the "
                    "texts that contain the separator."
                )
            if "images" in row:
                row["images"] = [name for name in (row["images"] or "").split(";") if name.strip()]
            yield row | {"where": f"line {rows.line_num}"}


def _query_record(row: dict, names: Names, mistakes: Mistakes) -> dict:
    """A line of `queries.jsonl`; mistakes are collected."""
    cell = lambda name: "" if row.get(name) is None else str(row[name]).strip()
    where, text = row["where"], " ".join(cell("text").split())
    if not text:
        mistakes.add("queries without a text", where)
    listed = row.get("images") or []
    listed = [listed] if isinstance(listed, str) else listed
    if not isinstance(listed, list):
        mistakes.add("queries whose images are not a list of names", where)
        listed = []
    references = [name for name in (cell("image"), *(str(one).strip() for one in listed)) if name]
    if not references:
        mistakes.add("queries without a picture", where)
    images: list[str] = []
    for name in references:
        found = sorted(names(name))
        if not found:
            mistakes.add("pictures of queries that are not in the corpus", f"{name!r} ({where})")
        elif len(found) > 1:
            several = f"{name!r} ({where}): {' or '.join(found[:3])}"
            mistakes.add("pictures of queries with an ambiguous name", several)
        else:
            images += [one for one in found if one not in images]
    split = cell("split").lower()
    if split and split not in SPLIT_NAMES:
        kind = f"splits other than {', '.join(SPLITS)}"
        mistakes.add(kind, f"{cell('split')!r} ({where})")
    return {
        "id": cell("id") or where.split()[1],
        "text": text,
        "images": images,
        "language": cell("language"),
        "reference": cell("reference"),
        "split": SPLIT_NAMES.get(split, split),
    }


def _check_unique(ids: Iterable[str], mistakes: Mistakes) -> None:
    for name, count in collections.Counter(ids).items():
        if count > 1:
            mistakes.add("ids that occur more than once in the embeddings", repr(name))


def _check_ids_and_splits(records: list[dict], mistakes: Mistakes) -> None:
    for name, count in collections.Counter(record["id"] for record in records).items():
        if count > 1:
            mistakes.add("ids that occur more than once in the queries", repr(name))
    without = [record["id"] for record in records if not record["split"]]
    if 0 < len(without) < len(records):
        for name in without:
            mistakes.add("queries without a split, although others have one", name)


def _check_pictures(pictures: dict[str, Path], checked: Path, mistakes: Mistakes) -> str:
    """Decodes all pictures, unless the listing (names, sizes, times) has not changed since.

    Args:
      checked: a file with the hash of the last listing that was checked.

    Returns:
      The hash of the listing.
    """
    digest = hashlib.sha256()
    for name, path in pictures.items():
        status = path.stat()
        digest.update(json.dumps([name, status.st_size, status.st_mtime_ns]).encode())
    listing = digest.hexdigest()
    if checked.exists() and checked.read_text() == listing:
        return listing

    def readable(path: Path) -> bool:
        try:
            open_picture(path).close()
            return True
        except UserError:
            return False

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        results = threads.map(readable, pictures.values())
        bar = tqdm(results, total=len(pictures), desc="checking the pictures", leave=False)
        for name, good in zip(pictures, bar, strict=True):
            if not good:
                mistakes.add("pictures that cannot be read", name)
    return listing


def _files_of(ids: list[str], pictures: dict[str, Path]) -> list[str]:
    """The file of each id of the embeddings; "" unless exactly one picture matches."""
    names = Names(pictures)
    found = (names(one) for one in ids)
    return [str(pictures[next(iter(one))]) if len(one) == 1 else "" for one in found]


def _split_counts(records: list[dict]) -> str:
    """The number of queries in each split, "70 train, 10 validation, ..."; refuses empty splits."""
    counts = collections.Counter(record["split"] for record in records)
    for name in SPLITS:
        if not counts[name]:
            raise UserError(
                f"no query falls in the split {name}: add queries, name all of "
                f"{', '.join(SPLITS)} in a column split, or change local.validation_share and "
                "local.test_share."
            )
    return ", ".join(f"{counts[name]} {name}" for name in SPLITS)


# Splits


def assign_splits(records: list[dict], config: ConfigDict) -> list[str]:
    """Sets the split of each record, in place.

    Splits that no query names are taken from the training queries, by picture. If there is no split
    at all, all queries start as training queries.

    Returns:
      The names of the splits that were taken from the training queries.
    """
    named = {record["split"] for record in records} - {""}
    derived = [name for name in SPLITS if name not in named | {"train"}]
    share = lambda split: config[f"{split}_share"] if split in derived else 0.0
    train = [record for record in records if record["split"] in ("", "train")]
    images = [record["images"] for record in train]
    splits = split_by_picture(images, share("validation"), share("test"), config.split_seed)
    for record, split in zip(train, splits, strict=True):
        record["split"] = split
    return derived


def split_by_picture(
    images: Sequence[Sequence[str]], validation_share: float, test_share: float, seed: int
) -> list[str]:
    """The split of each query, such that no picture is in two splits; equal on every machine.

    A group of pictures that share queries is assigned by a hash of its name, so that an added query
    does not move other queries, unless it joins two groups.

    Args:
      images: the pictures of each query.
      validation_share, test_share: of the pictures, 0 to 1.
    """
    shares = {"validation": validation_share, "test": test_share}
    return [split_by_hash(group, seed, shares) for group in _groups(images)]


def _groups(images: Sequence[Sequence[str]]) -> list[str]:
    """For each query, the name of its group: pictures that are connected through shared queries."""
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
