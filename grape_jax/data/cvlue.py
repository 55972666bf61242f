"""The benchmark `cvlue`: image-text retrieval of CVLUE, pictures of Chinese daily life.

Read from `manual_dir`:

  last_train.json, new_val.json, new_test.json   [{"image": file, "caption": five, "image_id"}]
  the pictures, at the path in "image"            (or below image/, images/ or pics/)

`caption` may be a single text. A picture with several entries has the captions of all of them, and
a caption that several pictures share has all of them as targets. A query is ranked among its
split's pictures: 17,920 of train, 3,116 of validation and 8,973 of test.
"""

import collections
from pathlib import Path

from grape_jax.data import archive, tagged
from grape_jax.data.benchmark import Archive, Benchmark, RawPicture, RawQuery
from grape_jax.runtime.errors import UserError

SOURCE = "https://github.com/WangYuxuan93/CVLUE"

_FILES = {"train": "last_train.json", "validation": "new_val.json", "test": "new_test.json"}
_FOLDERS = (".", "image", "images", "pics")


def read(manual_dir: Path) -> Archive:
    """Reads the official files.

    Raises:
      UserError: a file is missing or malformed.
    """
    archive.require(manual_dir, list(_FILES.values()), SOURCE)
    parts = {split: _read_split(manual_dir, name) for split, name in _FILES.items()}
    return Archive(
        pictures={split: pictures for split, (pictures, _) in parts.items()},
        queries={split: queries for split, (_, queries) in parts.items()},
    )


def _read_split(folder: Path, name: str) -> tuple[list[RawPicture], list[RawQuery]]:
    path = folder / name
    files: dict[str, str] = {}
    pairs: list[tuple[str, str]] = []  # picture id, caption
    for place, entry in archive.read_entries(path):
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
    # Text -> ids of its pictures: a dict, as an ordered set.
    pictures_of: dict[str, dict[str, None]] = collections.defaultdict(dict)
    for (key, _), text in zip(pairs, texts, strict=True):
        pictures_of[text][key] = None
    roots = [folder / part for part in _FOLDERS]
    first: dict[str, str] = {}  # caption of each picture
    numbers: collections.Counter[str] = collections.Counter()
    queries = []
    for (key, _), text in zip(pairs, texts, strict=True):
        first.setdefault(key, text)
        # The caption's own picture is first: the first target names the bootstrap's group.
        targets = tuple(dict.fromkeys([key, *pictures_of[text]]))
        queries.append(RawQuery(f"{key}#{numbers[key]}", text, "zh", targets))
        numbers[key] += 1
    pictures = [
        RawPicture(key, archive.picture_file(roots, image), name=first.get(key, ""))
        for key, image in files.items()
    ]
    return pictures, queries


BENCHMARK = Benchmark(
    name="cvlue",
    shifts=("chinese",),
    galleries={"train": "train", "validation": "validation", "test": "test"},
    test_sets={"test": "test split"},
    version="1.1.0",
    about=__doc__,
    source=SOURCE,
    read=read,
    published={
        "pictures of train": 17920,
        "pictures of validation": 3116,
        "pictures of test": 8973,
        "queries of train": 5 * 17920,
        "queries of validation": 5 * 3116,
        "queries of test": 5 * 8973,
    },
)
