"""A corpus of texts in one file, read document by document.

The file is read once from end to end (`scan`), for the place and the id of every document. Texts
are then read from the file on access (`Documents`), so that none of them stays in memory.

    .jsonl   one object a line: `_id` (or `id`), `text`, and perhaps `title`
    .tsv     id and text, separated by a tab, without a header

The text of a document is `title` and `text`, joined by a space.
"""

import array
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from grape_jax.data.benchmark import Corpus
from grape_jax.runtime import files
from grape_jax.runtime.errors import UserError

SUFFIXES = (".jsonl", ".tsv")
LONGEST_LINE = 1 << 24  # bytes; a longer line is taken for a file without line breaks
NAME_LENGTH = 80  # characters of a document that are displayed
ABOUT, LINES, IDS = "corpus.json", "lines.npy", "ids.bin"
BOM = b"\xef\xbb\xbf"

AddMistake = Callable[[str, str], None]  # kind of the mistake, and what or where it is


@dataclasses.dataclass(frozen=True)
class Scan:
    """Where the documents of a corpus file lie, without their texts."""

    lines_Nx3: np.ndarray  # int64: start and end of each line in bytes, and end of its id in `ids`
    ids: bytes  # all ids, joined, UTF-8
    rows: dict[str, int]  # id -> row, of the wanted ids
    empty: int  # documents without a text

    def __len__(self) -> int:
        return len(self.lines_Nx3)


def lines_of(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yields (number, start in bytes, line) of each line that is not blank, without its end.

    Raises:
      UserError: the file cannot be read, or a line is longer than `LONGEST_LINE`.
    """
    try:
        with path.open("rb") as file:
            start = number = 0
            while line := file.readline(LONGEST_LINE):
                number += 1
                if len(line) == LONGEST_LINE:
                    raise UserError(
                        f"{path}, line {number}, is longer than {LONGEST_LINE >> 20} MiB: write "
                        "one record a line."
                    )
                skipped = len(BOM) if start == 0 and line.startswith(BOM) else 0
                if content := line[skipped:].rstrip(b"\r\n"):
                    yield number, start + skipped, content
                start += len(line)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def scan(path: Path, wanted: set[str], add: AddMistake) -> Scan:
    """Reads a corpus file once.

    Args:
      wanted: ids whose rows are needed.
      add: takes mistakes, to be reported together.

    Raises:
      UserError: the file cannot be read, has another suffix, or a line is too long.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"{path} is not a corpus: use {' or '.join(SUFFIXES)}, one document a line."
        )
    lines, hashes, ids = array.array("q"), array.array("q"), bytearray()
    rows: dict[str, int] = {}
    empty = 0
    size = path.stat().st_size if path.is_file() else 0
    with tqdm(total=size, desc="reading the corpus", unit="B", unit_scale=True, leave=False) as bar:
        for number, start, line in lines_of(path):
            where = f"line {number}"
            bar.update(start + len(line) - bar.n)
            try:
                document, text = read_document(line, path.suffix)
                encoded = document.encode()
                text.encode()
            except UnicodeError:
                add("documents that are not UTF-8", where)
                continue
            except ValueError as error:
                add(str(error), where)
                continue
            if document in wanted:
                rows.setdefault(document, len(hashes))
            empty += not text
            hashes.append(hash(document))
            ids += encoded
            lines.extend((start, start + len(line), len(ids)))
    found = Scan(np.array(lines, np.int64).reshape(-1, 3), bytes(ids), rows, empty)
    for document in _repeated(Ids(found.lines_Nx3, found.ids), np.array(hashes, np.int64)):
        add("ids that occur more than once in the corpus", repr(document))
    return found


def read_document(line: bytes, suffix: str) -> tuple[str, str]:
    """Id and text of a document.

    Raises:
      ValueError: the line is malformed; the message is the kind of the mistake.
    """
    if suffix == ".tsv":
        cells = line.decode().split("\t")
        if len(cells) != 2 or not cells[0]:
            raise ValueError("documents that are not an id and a text, separated by one tab")
        return cells[0], cells[1].strip()
    record = json_object(line, "documents")
    title, text = record.get("title") or "", record.get("text")
    if not isinstance(text, str) or not isinstance(title, str):
        raise ValueError("documents whose 'text' (and 'title', if any) is not a text")
    return id_of(record, "documents"), f"{title} {text}".strip()


def json_object(line: bytes, what: str) -> dict:
    """A line's JSON object.

    Raises:
      UnicodeError: the line is not UTF-8.
      ValueError: the line is not a JSON object.
    """
    text = line.decode()
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"{what} that are not a JSON object")
    return record


def id_of(record: dict, what: str) -> str:
    """The id of a record, `_id` or `id`: a text that is not empty, or a whole number.

    Raises:
      ValueError: it has none.
    """
    found = record.get("_id", record.get("id"))
    if isinstance(found, bool) or not isinstance(found, str | int) or not str(found).strip():
        raise ValueError(f"{what} without an '_id' (or 'id')")
    return str(found).strip()


def write(directory: Path, path: Path, found: Scan) -> None:
    """Writes the result of a scan to a folder."""
    np.save(directory / LINES, found.lines_Nx3)
    (directory / IDS).write_bytes(found.ids)
    about = {"path": str(path), "state": file_state(path)}
    files.replace(directory / ABOUT, json.dumps(about))


def load(directory: Path) -> Corpus:
    """The corpus of a folder that `write` wrote; ids, names and texts are read lazily.

    Raises:
      UserError: the corpus file is gone or has changed.
    """
    about = json.loads((directory / ABOUT).read_text(encoding="utf-8"))
    path = Path(about["path"])
    if not path.is_file() or file_state(path) != about["state"]:
        raise UserError(f"{path} is gone or has changed: start the command again to read it anew.")
    lines_Nx3 = np.load(directory / LINES, mmap_mode="r")
    texts = Documents(path, lines_Nx3)
    ids = Ids(lines_Nx3, np.memmap(directory / IDS, np.uint8, "r"))
    return Corpus(ids=ids, names=Names(texts), images=None, texts=texts)


def file_state(path: Path) -> list[int]:
    """Size and time of change, by which a changed file is noticed."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


@dataclasses.dataclass(frozen=True, eq=False)
class Documents(Sequence[str]):
    """The texts of a corpus file, read on access. Thread-safe."""

    path: Path
    lines_Nx3: np.ndarray

    @functools.cached_property
    def _file(self):
        return self.path.open("rb", buffering=0)

    def __len__(self) -> int:
        return len(self.lines_Nx3)

    def __getitem__(self, row: int) -> str:  # type: ignore[override]
        start, end = map(int, self.lines_Nx3[_checked(row, len(self)), :2])
        line = os.pread(self._file.fileno(), end - start, start)
        return read_document(line, self.path.suffix)[1]


@dataclasses.dataclass(frozen=True, eq=False)
class Ids(Sequence[str]):
    """The ids of a corpus, in its order."""

    lines_Nx3: np.ndarray
    joined: bytes | np.ndarray

    def __len__(self) -> int:
        return len(self.lines_Nx3)

    def __getitem__(self, row: int) -> str:  # type: ignore[override]
        row = _checked(row, len(self))
        start = int(self.lines_Nx3[row - 1, 2]) if row else 0
        return bytes(self.joined[start : int(self.lines_Nx3[row, 2])]).decode()


@dataclasses.dataclass(frozen=True, eq=False)
class Names(Sequence[str]):
    """The beginnings of documents, for display."""

    texts: Sequence[str]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> str:  # type: ignore[override]
        text = " ".join(self.texts[row].split())
        return text if len(text) <= NAME_LENGTH else f"{text[: NAME_LENGTH - 1]}…"


def _checked(row: int, count: int) -> int:
    if not 0 <= row < count:
        raise IndexError(row)
    return int(row)


def _repeated(ids: Ids, hashes_N: np.ndarray) -> Iterator[str]:
    """The ids that occur more than once; equal hashes are compared in full."""
    order_N = np.argsort(hashes_N, kind="stable")
    ordered_N = hashes_N[order_N]
    same = np.flatnonzero(ordered_N[1:] == ordered_N[:-1])
    candidates = sorted({int(row) for i in same for row in order_N[i : i + 2]})
    seen: set[str] = set()
    repeated: dict[str, None] = {}
    for row in candidates:
        name = ids[row]
        if name in seen:
            repeated[name] = None
        seen.add(name)
    return iter(repeated)
