"""The benchmark `cvlue`: image-text retrieval of CVLUE, pictures of Chinese daily life.

Read from `manual_dir`:

  last_train.json, new_val.json, new_test.json   [{"image": file, "caption": five, "image_id"}]
  the pictures, where "image" says                (or below image/, images/ or pics/)

`caption` may be one text; a picture that stands in several entries has the captions of all. Where
pictures share a caption, all of them are right. A query is ranked among its split's pictures:
17,920 of train, 3,116 of validation and 8,973 of test.
"""

import collections
from pathlib import Path

from grape_jax.data import archive, benchmark, tagged
from grape_jax.data.archive import Archive, Asked, Layout, Picture
from grape_jax.data.benchmark import Corpus, Query
from grape_jax.runtime.errors import UserError

SHIFTS = ("chinese",)
SPLITS = ("train", "validation", "test")
TEST_SETS = {"test": "test split"}
SOURCE = "https://github.com/WangYuxuan93/CVLUE"

_FILES = {"train": "last_train.json", "validation": "new_val.json", "test": "new_test.json"}
_FOLDERS = (".", "image", "images", "pics")


def gallery_of(split: str) -> str:
    """Each split has its own pictures."""
    benchmark.refuse_unknown("split", [split], SPLITS)
    return split


LAYOUT = Layout(
    name="cvlue",
    shift="chinese",
    version="1.0.0",
    source=SOURCE,
    about=__doc__,
    gallery_of=gallery_of,
    published={
        "pictures of train": 17920,
        "pictures of validation": 3116,
        "pictures of test": 8973,
        "queries of train": 5 * 17920,
        "queries of validation": 5 * 3116,
        "queries of test": 5 * 8973,
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
    """The captions of one split; see `benchmark.read_queries`."""
    benchmark.refuse_unknown("shift", [shift], SHIFTS)
    return archive.load_queries(data_dir, LAYOUT, split, limit)


def load_corpus(data_dir: str | Path, gallery: str) -> Corpus:
    """The pictures of one split, named by their first caption."""
    return archive.load_corpus(data_dir, LAYOUT, gallery)


def read(manual_dir: Path) -> Archive:
    """The official files."""
    archive.require(manual_dir, list(_FILES.values()), SOURCE)
    found = {split: _read_split(manual_dir, name) for split, name in _FILES.items()}
    pictures, queries = ({split: parts[i] for split, parts in found.items()} for i in (0, 1))
    return Archive(pictures, queries)


def _read_split(folder: Path, name: str) -> tuple[list[Picture], list[Asked]]:
    path = folder / name
    entries = archive.read_json(path)
    if not isinstance(entries, list):
        raise UserError(f"{path}: must be a list of entries.")
    files, pairs = {}, []
    for number, entry in enumerate(entries):
        place = f"{path}, entry {number}"
        image = archive.field(place, entry, "image", str)
        key = str(archive.field(place, entry, "image_id", (int, str)))
        if files.setdefault(key, image) != image:
            raise UserError(f"{place}: image_id {key} stands for {image} and for {files[key]}.")
        captions = archive.field(place, entry, "caption", (str, list))
        for caption in [captions] if isinstance(captions, str) else captions:
            if not isinstance(caption, str):
                raise UserError(f"{place}: 'caption' must be a text or a list of texts.")
            pairs.append((key, archive.one_line(caption)))
    if len(set(files.values())) < len(files):
        image, _ = collections.Counter(files.values()).most_common(1)[0]
        raise UserError(f"{path}: {image} stands under more than one image_id.")
    texts = tagged.without_tags([caption for _, caption in pairs], str(path))
    right = collections.defaultdict(dict)  # the pictures of each text, in order
    for (key, _), text in zip(pairs, texts, strict=True):
        right[text][key] = None
    roots = [folder / part for part in _FOLDERS]
    first, numbers, queries = {}, collections.Counter(), []
    for (key, _), text in zip(pairs, texts, strict=True):
        first.setdefault(key, text)
        # Its own picture stands first, so that captions of one picture make one group.
        targets = tuple(dict.fromkeys([key, *right[text]]))
        queries.append(Asked(f"{key}#{numbers[key]}", text, "zh", targets))
        numbers[key] += 1
    pictures = [
        Picture(key, archive.picture_file(roots, image), name=first.get(key, ""))
        for key, image in files.items()
    ]
    return pictures, queries
