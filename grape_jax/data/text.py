"""A user's collection of texts: documents, queries, and graded relevance.

`prepare` reads the files named by `config.text`, reports all mistakes in them together, and writes
to a folder of its own where the documents lie (`grape_jax.data.documents`) and

    queries.jsonl   every judged query with its split, the rows of its relevant documents, and their
                    grades

Corpus (`text.corpus`): a .jsonl or .tsv file, or a BEIR folder with

    corpus.jsonl               `_id`, `title`, `text`
    queries.jsonl              `_id`, `text`
    qrels/{train,dev,test}.tsv query, document and grade, separated by tabs, below a header

Queries (`text.queries`; default: the folder's)
    .jsonl                     one object a line: `_id` (or `id`) and `text`
    .tsv                       id and text, separated by a tab, without a header
    .jsonl, .csv, .parquet     `text` and `documents` in place of qrels: the ids of the relevant
                               documents (a list; in a .csv separated by `;`), or an object of
                               their grades. `id` is the number of the line by default.
    Columns of choice: `language`, `split` (train, validation or dev, test), and `history`: the
    earlier turns of a conversation, a list of texts, oldest first.

Qrels (`text.qrels`; default: the folder's)
    a folder with train.tsv, and perhaps dev.tsv and test.tsv, as in BEIR; or one file, in the three
    columns of BEIR or the four of TREC: query, iteration, document, grade

A grade is a whole number. A document with a grade of 1 or more is relevant, and the grade is its
gain in nDCG; all other documents are the same, judged or not. Splits that the files do not name are
taken from the training queries by a hash of the text, or from all queries if there is no split.
Queries without a relevant document are left out.
"""

import collections
import csv
import dataclasses
import functools
import json
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from grape_jax.data import benchmark, documents
from grape_jax.data.benchmark import Benchmark, Corpus, Query
from grape_jax.data.documents import AddMistake
from grape_jax.data.own_files import SPLITS, Mistakes, prepared_folder, split_by_hash
from grape_jax.runtime import files
from grape_jax.runtime.errors import UserError

BENCHMARK = Benchmark(
    name="text",
    shifts=("text",),
    galleries=dict.fromkeys(SPLITS, "corpus"),
    test_sets={"test": "test"},
)
QRELS_FILES = {"train.tsv": "train", "dev.tsv": "validation", "test.tsv": "test"}
SPLIT_NAMES = {name: name for name in SPLITS} | {"dev": "validation", "val": "validation"}
TABLES = (".csv", ".parquet")
BEIR_HEADER = "query-id"
QUERIES, SOURCES = "queries.jsonl", "sources.json"


@dataclasses.dataclass(frozen=True)
class Sources:
    """The user's files."""

    corpus: Path
    queries: Path
    qrels: dict[str, Path]  # split -> file; "" of a file whose queries are to be split; {}: none

    @property
    def files(self) -> list[Path]:
        return [self.corpus, self.queries, *self.qrels.values()]


@dataclasses.dataclass
class Record:
    """A query as read from its file, with the grades of the judged documents."""

    id: str
    text: str
    language: str = ""
    split: str = ""
    history: tuple[str, ...] = ()
    grades: dict[str, int] = dataclasses.field(default_factory=dict)  # document id -> grade

    @property
    def relevant(self) -> dict[str, int]:
        return {document: grade for document, grade in self.grades.items() if grade > 0}


# Reading prepared data


def folder(config: ConfigDict, data_dir: str | Path) -> Path:
    """The folder of the prepared data: one for each choice of files, shares and seed.

    Args:
      config: the section `text` of a run's config.
    """
    paths = (config.corpus, config.queries, config.qrels)
    return prepared_folder(data_dir, "text", config.corpus, paths, config)


def load_queries(directory: str | Path, shift: str, split: str) -> list[Query]:
    """The queries of one split, in the order of the user's file; targets rise by row.

    Args:
      directory: from `folder`, after `prepare`.

    Raises:
      UserError: unknown shift or split.
    """
    benchmark.refuse_unknown("shift", [shift], BENCHMARK.shifts)
    benchmark.refuse_unknown("split", [split], SPLITS)
    with (Path(directory) / QUERIES).open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return [
        Query(
            id=record["id"],
            text=record["text"],
            language=record["language"],
            group=record["id"],
            targets=tuple(record["targets"]),
            gains=tuple(record["gains"]),
            history=tuple(record["history"]),
        )
        for record in records
        if record["split"] == split
    ]


def load_corpus(directory: str | Path) -> Corpus:
    """The documents, in the order that the queries' targets index.

    Raises:
      UserError: the corpus file is gone or has changed since it was prepared.
    """
    return documents.load(Path(directory))


# Reading the user's files


def check(config: ConfigDict) -> None:
    """Validates the section `text` of a config.

    Raises:
      UserError: the corpus is not named, or the shares of the splits leave nothing for training.
    """
    if not config.corpus:
        raise UserError(
            "text.corpus must be set: add --config.text.corpus=PATH, a BEIR folder or a file of "
            "documents."
        )
    shares = (config.validation_share, config.test_share)
    if min(shares) <= 0 or sum(shares) >= 1:
        raise UserError(
            "text.validation_share and text.test_share must be above 0 and add up to less than 1, "
            "so that queries are left for training."
        )


def prepare(config: ConfigDict, data_dir: str | Path) -> None:
    """Reads and checks the user's files, and writes the prepared data if there are no mistakes.

    Files that have not changed since are not read again.

    Args:
      config: the section `text` of a run's config.
      data_dir: the data goes to `folder(config, data_dir)`.

    Raises:
      UserError: a file is missing, or there are mistakes in the files (all are listed).
    """
    check(config)
    directory, sources = folder(config, data_dir), find_sources(config)
    state = json.dumps({str(path): documents.file_state(path) for path in sources.files})
    marker = directory / SOURCES
    if marker.exists() and marker.read_text(encoding="utf-8") == state:
        return
    mistakes = Mistakes()
    records = list(read_queries(sources.queries, mistakes.add))
    _check_records(records, mistakes)
    if sources.qrels:
        _add_judgements(records, sources.qrels, mistakes)
    wanted = {document for record in records for document in record.relevant}
    found = documents.scan(sources.corpus, wanted, mistakes.add)
    for document in sorted(wanted - found.rows.keys()):
        mistakes.add("relevant documents that are not in the corpus", repr(document))
    mistakes.refuse()
    if not len(found):
        raise UserError(f"{sources.corpus} holds no document.")
    judged = [record for record in records if record.relevant]
    derived = assign_splits(judged, config)
    counts = _split_counts(judged, sources)

    making = directory.with_name(f"{directory.name}.part")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    documents.write(making, sources.corpus, found)
    lines = (json.dumps(_line(record, found.rows)) + "\n" for record in judged)
    files.replace_lines(making / QUERIES, lines)
    files.replace(making / SOURCES, state)
    shutil.rmtree(directory, ignore_errors=True)
    making.rename(directory)
    notes = [f"{len(found):,} documents", f"queries {counts}"]
    notes += [f"{found.empty:,} documents without a text"] if found.empty else []
    unjudged = len(records) - len(judged)
    notes += [f"{unjudged:,} queries without a relevant document left out"] if unjudged else []
    notes += [f"{' and '.join(derived)} taken from the training queries"] if derived else []
    print(f"your texts: {'; '.join(notes)} ({directory})", flush=True)


def find_sources(config: ConfigDict) -> Sources:
    """The files that the section `text` of a config names.

    Raises:
      UserError: one is missing, or there are neither qrels nor a column of documents.
    """
    root = Path(config.corpus).expanduser().resolve()
    beir = root if root.is_dir() else None
    corpus = root / "corpus.jsonl" if beir else root
    _require(corpus, "text.corpus", "to a BEIR folder or a file of documents")
    if not config.queries and not beir:
        raise UserError(
            "text.queries must be set where text.corpus is a file: add --config.text.queries=FILE."
        )
    queries = Path(config.queries).expanduser().resolve() if config.queries else None
    queries = queries or corpus.with_name("queries.jsonl")
    _require(queries, "text.queries", "to the file of your queries")
    if config.qrels:
        qrels = Path(config.qrels).expanduser().resolve()
    elif config.queries:
        return Sources(corpus, queries, {})
    else:
        qrels = root / "qrels"
    if qrels.is_dir():
        named = {split: qrels / name for name, split in QRELS_FILES.items()}
        present = {split: path for split, path in named.items() if path.is_file()}
        if "train" not in present:
            raise UserError(
                f"{qrels} holds no train.tsv: add it, or name one file of judgements with "
                "--config.text.qrels=FILE, whose queries are then split."
            )
        return Sources(corpus, queries, present)
    _require(qrels, "text.qrels", "to a file or a folder of judgements")
    return Sources(corpus, queries, {"": qrels})


def _require(path: Path, key: str, advice: str) -> None:
    if not path.is_file():
        raise UserError(f"there is no file {path}: set {key} {advice}.")


def read_queries(path: Path, add: AddMistake) -> Iterator[Record]:
    """The queries of a file; malformed ones are added to the mistakes and left out.

    Raises:
      UserError: the file cannot be read, is empty, or lacks a column.
    """
    match path.suffix.lower():
        case ".jsonl":
            parse = functools.partial(_json_query, add=add)
            yield from _parsed(path, "queries", parse, add)
        case ".tsv":
            yield from _parsed(path, "queries", _tsv_query, add)
        case ".csv" | ".parquet":
            for number, row in enumerate(_table(path), start=1):
                try:
                    yield _record(row, number)
                except ValueError as error:
                    add(str(error), f"row {number}")
        case other:
            raise UserError(
                f"{path}: queries in {other or 'a file without a suffix'} are not supported: use "
                ".jsonl, .tsv, .csv or .parquet."
            )


def _parsed(
    path: Path, what: str, parse: Callable[[bytes, int], Any], add: AddMistake
) -> Iterator[Any]:
    """The parsed lines of a file; malformed ones are added to the mistakes and left out."""
    for number, _, line in documents.lines_of(path):
        try:
            found = parse(line, number)
        except UnicodeError:
            add(f"{what} that are not UTF-8", f"line {number}")
        except ValueError as error:
            add(str(error), f"line {number}")
        else:
            if found is not None:
                yield found


def _json_query(line: bytes, number: int, add: AddMistake) -> Record:
    return _record(documents.json_object(line, "queries"), number)


def _tsv_query(line: bytes, number: int) -> Record:
    cells = line.decode().split("\t")
    if len(cells) != 2:
        raise ValueError("queries that are not an id and a text, separated by one tab")
    return Record(cells[0].strip(), _one_line(cells[1]))


def _table(path: Path) -> Iterator[dict]:
    """The rows of a table with the columns `text` and `documents`."""
    try:
        if path.suffix.lower() == ".parquet":
            rows = iter(pq.read_table(path).to_pylist())
            columns = pq.read_schema(path).names
        else:
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, strict=True)
                columns, rows = list(reader.fieldnames or ()), iter(list(reader))
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    if missing := [name for name in ("text", "documents") if name not in columns]:
        raise UserError(
            f"{path} lacks {' and '.join(missing)}: it needs the columns text and documents, and "
            f"has {', '.join(map(str, columns)) or 'none'}."
        )
    yield from rows


def _record(row: dict, number: int) -> Record:
    """A query from the fields of an object or the cells of a row.

    Raises:
      ValueError: a field is malformed; the message is the kind of the mistake.
    """
    named = row.get("_id") is not None or row.get("id") not in (None, "")
    if not named and "documents" not in row:
        raise ValueError("queries without an '_id' (or 'id')")
    if not isinstance(row.get("text"), str):
        raise ValueError("queries whose 'text' is not a text")
    split = str(row.get("split") or "").strip().lower()
    if split and split not in SPLIT_NAMES:
        raise ValueError(f"queries whose 'split' is none of {', '.join(SPLITS)}")
    row["text"].encode()
    return Record(
        id=documents.id_of(row, "queries") if named else str(number),
        text=_one_line(row["text"]),
        language=str(row.get("language") or "").strip(),
        split=SPLIT_NAMES.get(split, ""),
        history=_history(row.get("history")),
        grades=_documents(row.get("documents")),
    )


def _history(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) and value.strip():
        value = _json_or_none(value)
    if value is None or value == "":
        return ()
    turns = [_one_line(turn) if isinstance(turn, str) else "" for turn in _listed(value)]
    if not isinstance(value, list | tuple) or not all(turns):
        raise ValueError("queries whose 'history' is not a list of texts")
    return tuple(turns)


def _documents(value: Any) -> dict[str, int]:
    """Grades of the documents that a query names itself."""
    if isinstance(value, str):
        value = [name for name in (cell.strip() for cell in value.split(";")) if name]
    if value is None:
        return {}
    if isinstance(value, dict):
        if not all(type(grade) is int for grade in value.values()):
            raise ValueError("queries with a grade that is not a whole number")
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(one, str | int) for one in value):
        raise ValueError("queries whose 'documents' is not a list of ids")
    return {str(one): 1 for one in value}


def _listed(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else []


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return [None]  # refused as a list of something else


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _check_records(records: list[Record], mistakes: Mistakes) -> None:
    for name, count in collections.Counter(record.id for record in records).items():
        if count > 1:
            mistakes.add("ids that occur more than once in the queries", repr(name))
    for record in records:
        if not record.text:
            mistakes.add("queries without a text", repr(record.id))
    without = [record.id for record in records if not record.split]
    if 0 < len(without) < len(records):
        for name in without:
            mistakes.add("queries without a split, although others have one", repr(name))


def _add_judgements(records: list[Record], qrels: dict[str, Path], mistakes: Mistakes) -> None:
    """Adds the grades and splits of qrels files to the queries."""
    by_id = {record.id: record for record in records}
    unknown: dict[str, None] = {}
    for split, path in qrels.items():
        for query, document, grade in _parsed(path, "judgements", _judgement, mistakes.add):
            record = by_id.get(query)
            if record is None:
                unknown[query] = None
                continue
            if split and record.split not in ("", split):
                mistakes.add("queries with judgements in two splits", repr(query))
            record.split = split or record.split
            if record.grades.setdefault(document, grade) != grade:
                mistakes.add("documents with two grades", f"{document!r} for {query!r}")
    for query in unknown:
        mistakes.add("judgements of queries that are not in the queries file", repr(query))


def _judgement(line: bytes, number: int) -> tuple[str, str, int] | None:
    """Query, document and grade; None for BEIR's header."""
    text = line.decode()
    cells = [cell.strip() for cell in text.split("\t")] if "\t" in text else text.split()
    if number == 1 and len(cells) == 3 and cells[0] == BEIR_HEADER:
        return None
    if len(cells) not in (3, 4) or not all(cells):
        raise ValueError("judgements that have neither three columns (BEIR) nor four (TREC)")
    try:
        return cells[0], cells[-2], int(cells[-1])
    except ValueError as error:
        raise ValueError("judgements with a grade that is not a whole number") from error


# Splits


def assign_splits(records: list[Record], config: ConfigDict) -> list[str]:
    """Sets the split of each query without one, in place; equal on every machine.

    Queries of the same text fall in the same split.

    Returns:
      The names of the splits that were taken from the training queries.
    """
    named = {record.split for record in records} - {""}
    derived = [name for name in SPLITS[1:] if name not in named]
    shares = {name: config[f"{name}_share"] if name in derived else 0.0 for name in SPLITS[1:]}
    for record in records:
        if record.split in ("", "train"):
            text = unicodedata.normalize("NFKC", record.text).casefold()
            record.split = split_by_hash(text, config.split_seed, shares)
    return derived


def _split_counts(records: list[Record], sources: Sources) -> str:
    """The number of queries in each split, e.g. "70 train, 10 validation, 20 test".

    Raises:
      UserError: a split is empty.
    """
    counts = collections.Counter(record.split for record in records)
    for name in SPLITS:
        if not counts[name]:
            judged = next(iter(sources.qrels.values()), sources.queries).parent
            raise UserError(
                f"no query with a relevant document falls in the split {name}: add judgements in "
                f"{judged}, or change text.validation_share and text.test_share."
            )
    return ", ".join(f"{counts[name]:,} {name}" for name in SPLITS)


def _line(record: Record, rows: dict[str, int]) -> dict:
    """A line of the prepared queries."""
    graded = sorted((rows[document], grade) for document, grade in record.relevant.items())
    gains = [grade for _, grade in graded]
    return {
        "id": record.id,
        "text": record.text,
        "language": record.language,
        "split": record.split,
        "history": record.history,
        "targets": [row for row, _ in graded],
        "gains": gains if set(gains) != {1} else [],
    }
