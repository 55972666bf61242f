"""The benchmark `wikipedia`: find the picture of a section of an article (Rasiwasia et al., 2010).

Read from `manual_dir`:

  trainset_txt_img_cat.list, testset_txt_img_cat.list   text TAB picture TAB category
  texts/<text>.xml                                      the section, between <text> tags
  images/<category>/<picture>.jpg

The official release has 2,173 pairs in train and 693 in test. Its validation split is ours: a tenth
of train, by a hash of the text's name. A query is ranked among its list's pictures: train and
validation among those 2,173, test among its 693.
"""

import re
from pathlib import Path
from xml.etree import ElementTree

from grape_jax.data import archive, benchmark
from grape_jax.data.archive import Archive, Asked, Layout, Picture
from grape_jax.data.benchmark import Corpus, Query, hash64
from grape_jax.runtime.errors import UserError

SHIFTS = ("articles",)
SPLITS = ("train", "validation", "test")
TEST_SETS = {"test": "test split"}
SOURCE = "http://www.svcl.ucsd.edu/projects/crossmodal/"

VALIDATION_SHARE = 0.1  # of the official training split
_LISTS = {"train": "trainset_txt_img_cat.list", "test": "testset_txt_img_cat.list"}


def gallery_of(split: str) -> str:
    """The pictures of the official split that this one is, or is a part of."""
    benchmark.refuse_unknown("split", [split], SPLITS)
    return "test" if split == "test" else "train"


LAYOUT = Layout(
    name="wikipedia",
    shift="articles",
    version="1.0.0",
    source=SOURCE,
    about=__doc__,
    gallery_of=gallery_of,
    published={"pictures of train": 2173, "pictures of test": 693, "queries": 2866},
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
    """The texts of one split; see `benchmark.read_queries`."""
    benchmark.refuse_unknown("shift", [shift], SHIFTS)
    return archive.load_queries(data_dir, LAYOUT, split, limit)


def load_corpus(data_dir: str | Path, gallery: str) -> Corpus:
    """The pictures of one official split."""
    return archive.load_corpus(data_dir, LAYOUT, gallery)


def split_of(gallery: str, text: str) -> str:
    """The split of one text of an official list."""
    ours = hash64(f"wikipedia {text}") / 2**64 < VALIDATION_SHARE
    return "validation" if gallery == "train" and ours else gallery


def read(manual_dir: Path) -> Archive:
    """The official files."""
    archive.require(manual_dir, [*_LISTS.values(), "texts", "images"], SOURCE)
    # The lists number the categories and the folders name them: a picture is known by its name.
    files = {path.stem: path for path in sorted((manual_dir / "images").glob("*/*.jpg"))}
    pictures, queries = {}, {split: [] for split in SPLITS}
    for gallery, name in _LISTS.items():
        found = {}
        for place, line in archive.read_lines(manual_dir / name):
            parts = line.split()
            if len(parts) != 3:
                raise UserError(f"{place}: must be a text, a picture and a category.")
            text, image, _ = parts
            found[image] = Picture(image, files.get(image, manual_dir / "images" / f"{image}.jpg"))
            words = _section(place, manual_dir / "texts" / f"{text}.xml")
            queries[split_of(gallery, text)].append(Asked(text, words, "en", (image,)))
        pictures[gallery] = list(found.values())
    return Archive(pictures, queries)


def _section(place: str, path: Path) -> str:
    """What stands between the <text> tags of a file."""
    try:
        written = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{place}: its text {path} cannot be read.") from error
    try:
        parts = ["".join(text.itertext()) for text in ElementTree.fromstring(written).iter("text")]
    except ElementTree.ParseError:
        # A bare "&" or "<" is no XML; what stands between the tags is still plain.
        parts = re.findall(r"<text\b[^>]*>(.*?)</text>", written, re.DOTALL)
    if not parts:
        raise UserError(f"{place}: {path} has no <text>.")
    return archive.one_line(" ".join(parts))
