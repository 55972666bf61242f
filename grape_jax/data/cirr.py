"""The benchmark `cirr`: composed queries, a picture and the words that change it.

Read from `manual_dir` (or from its folder cirr/):

  captions/cap.rc2.{train,val,test1}.json        pairid, reference, target_hard, target_soft,
                                                 caption, img_set {members, ...}
  image_splits/split.rc2.{train,val,test1}.json  the name of each picture, and its file
  the pictures                                   (or below img_raw/)

A query is ranked among its split's pictures except its own, the reference. The target is
`target_hard`; `subset` is the rest of the query's `img_set`, for the subset recall. The targets of
test1 are withheld: an evaluation writes the files that the official server judges
(`grape_jax.data.submission`). The report uses the validation split, which is not trained on.
"""

from pathlib import Path

from grape_jax.data import archive
from grape_jax.data.benchmark import Archive, Benchmark, RawPicture, RawQuery
from grape_jax.runtime.errors import UserError

SOURCE = "https://github.com/Cuberick-Orion/CIRR"
WITHHELD = "test1"

_OFFICIAL = {"train": "train", "validation": "val", "test1": "test1"}


def read(manual_dir: Path) -> Archive:
    """Reads the official files.

    Raises:
      UserError: a file is missing or malformed.
    """
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


def _pictures(folder: Path, split: str, roots: list[Path]) -> list[RawPicture]:
    path = folder / "image_splits" / f"split.rc2.{split}.json"
    files = archive.read_json(path)
    if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
        raise UserError(f"{path}: must give the file of each picture's name.")
    return [RawPicture(name, archive.picture_file(roots, file)) for name, file in files.items()]


def _queries(folder: Path, split: str) -> list[RawQuery]:
    queries = []
    for place, entry in archive.read_entries(folder / "captions" / f"cap.rc2.{split}.json"):
        reference = archive.field(place, entry, "reference", str)
        members = archive.field(
            place, archive.field(place, entry, "img_set", dict), "members", list
        )
        if not all(isinstance(member, str) for member in members):
            raise UserError(f"{place}: 'members' must be names of pictures.")
        targets: tuple[str, ...] = ()
        if split != WITHHELD:
            targets = (archive.field(place, entry, "target_hard", str),)
            if targets[0] == reference:
                raise UserError(f"{place}: target_hard is the reference itself.")
        queries.append(
            RawQuery(
                id=str(archive.field(place, entry, "pairid", int)),
                text=archive.one_line(archive.field(place, entry, "caption", str)),
                language="en",
                targets=targets,
                image=reference,
                subset=tuple(member for member in members if member != reference),
            )
        )
    return queries


BENCHMARK = Benchmark(
    name="cirr",
    shifts=("edits",),
    galleries={"train": "train", "validation": "validation", "test1": "test1"},
    test_sets={"validation": "validation split"},
    composed=("edits",),
    withheld=WITHHELD,
    version="1.1.0",
    about=__doc__,
    source=SOURCE,
    read=read,
    published={
        "pictures of validation": 2297,
        "pictures of test1": 2315,
        "queries of validation": 4181,
        "queries of test1": 4148,
    },
)
