"""The benchmark `cirr`: composed queries, a picture and the words that change it.

Read from `manual_dir` (or from its folder cirr/):

  captions/cap.rc2.{train,val,test1}.json        pairid, reference, target_hard, target_soft,
                                                 caption, img_set {members, ...}
  image_splits/split.rc2.{train,val,test1}.json  the name of each picture, and its file
  the pictures                                   (or below img_raw/)

A query is ranked among its split's pictures without its own one, the reference; `subset` holds the
other members of its set, of which the right one is (subset recall). The right picture is
`target_hard`. The truth of test1 is withheld: an evaluation writes what the official server judges.
The report is made of the validation split, which training looks at and never learns from.
"""

from pathlib import Path

from grape_jax.data import archive, benchmark
from grape_jax.data.archive import Archive, Asked, Layout, Picture
from grape_jax.data.benchmark import Corpus, Query
from grape_jax.runtime.errors import UserError

SHIFTS = ("edits",)
SPLITS = ("train", "validation", "test1")
TEST_SETS = {"validation": "validation split"}
WITHHELD = "test1"
COMPOSED = True
SOURCE = "https://github.com/Cuberick-Orion/CIRR"

_OFFICIAL = {"train": "train", "validation": "val", "test1": "test1"}


def gallery_of(split: str) -> str:
    """Each split has its own pictures."""
    benchmark.refuse_unknown("split", [split], SPLITS)
    return split


LAYOUT = Layout(
    name="cirr",
    shift="edits",
    version="1.0.0",
    source=SOURCE,
    about=__doc__,
    gallery_of=gallery_of,
    published={
        "pictures of validation": 2297,
        "pictures of test1": 2315,
        "queries of validation": 4181,
        "queries of test1": 4148,
    },
)


def prepare(manual_dir: str | Path, data_dir: str | Path) -> None:
    """Reads the official files and writes the sets.

    Raises:
      UserError: a file is missing or says what cannot be; nothing is written then.
    """
    archive.store(data_dir, LAYOUT, read(Path(manual_dir)))


def load_queries(
    data_dir: str | Path, shift: str, split: str, limit: int | None = None
) -> list[Query]:
    """The edits of one split; ids are pair ids. See `benchmark.read_queries`."""
    benchmark.refuse_unknown("shift", [shift], SHIFTS)
    return archive.load_queries(data_dir, LAYOUT, split, limit)


def load_corpus(data_dir: str | Path, gallery: str) -> Corpus:
    """The pictures of one split."""
    return archive.load_corpus(data_dir, LAYOUT, gallery)


def read(manual_dir: Path) -> Archive:
    """The official files."""
    folder = manual_dir / "cirr" if (manual_dir / "cirr").is_dir() else manual_dir
    names = [
        name
        for split in _OFFICIAL.values()
        for name in (f"captions/cap.rc2.{split}.json", f"image_splits/split.rc2.{split}.json")
    ]
    archive.require(folder, names, SOURCE)
    roots = [manual_dir, manual_dir / "img_raw", folder, folder / "img_raw"]
    pictures = {split: _pictures(folder, name, roots) for split, name in _OFFICIAL.items()}
    queries = {split: _queries(folder, name) for split, name in _OFFICIAL.items()}
    return Archive(pictures, queries)


def _pictures(folder: Path, split: str, roots: list[Path]) -> list[Picture]:
    path = folder / "image_splits" / f"split.rc2.{split}.json"
    files = archive.read_json(path)
    if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
        raise UserError(f"{path}: must give the file of each picture's name.")
    return [Picture(name, archive.picture_file(roots, file)) for name, file in files.items()]


def _queries(folder: Path, split: str) -> list[Asked]:
    path = folder / "captions" / f"cap.rc2.{split}.json"
    entries = archive.read_json(path)
    if not isinstance(entries, list):
        raise UserError(f"{path}: must be a list of entries.")
    queries = []
    for number, entry in enumerate(entries):
        place = f"{path}, entry {number}"
        reference = archive.field(place, entry, "reference", str)
        members = archive.field(
            place, archive.field(place, entry, "img_set", dict), "members", list
        )
        if not all(isinstance(member, str) for member in members):
            raise UserError(f"{place}: 'members' must be names of pictures.")
        targets = ()
        if split != WITHHELD:
            targets = (archive.field(place, entry, "target_hard", str),)
            if targets[0] == reference:
                raise UserError(f"{place}: target_hard is the reference itself.")
        queries.append(
            Asked(
                id=str(archive.field(place, entry, "pairid", int)),
                text=archive.one_line(archive.field(place, entry, "caption", str)),
                language="en",
                targets=targets,
                image=reference,
                subset=tuple(member for member in members if member != reference),
            )
        )
    return queries
