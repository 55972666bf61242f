"""The benchmark `wikipedia`: find the picture of a section of an article (Rasiwasia et al., 2010).

Read from `manual_dir`:

  trainset_txt_img_cat.list, testset_txt_img_cat.list   text TAB picture TAB category
  texts/<text>.xml                                      the section, between <text> tags
  images/<category>/<picture>.jpg

The official release has 2,173 pairs in train and 693 in test. This module moves a tenth of train,
by a hash of the text's name, to validation. Queries of train and validation are ranked among the
2,173 pictures of the official train split, those of test among its 693.
"""

import re
from pathlib import Path
from xml.etree import ElementTree

from grape_jax.data import archive
from grape_jax.data.benchmark import Archive, Benchmark, RawPicture, RawQuery, hash64
from grape_jax.runtime.errors import UserError

SOURCE = "http://www.svcl.ucsd.edu/projects/crossmodal/"
VALIDATION_SHARE = 0.1  # of the official training split

_LISTS = {"train": "trainset_txt_img_cat.list", "test": "testset_txt_img_cat.list"}


def split_of(gallery: str, text: str) -> str:
    """Returns the split of a text that an official list ("train" or "test") names."""
    share = hash64(f"wikipedia {text}") / 2**64
    return "validation" if gallery == "train" and share < VALIDATION_SHARE else gallery


def read(manual_dir: Path) -> Archive:
    """Reads the official files.

    Raises:
      UserError: a file is missing or malformed.
    """
    archive.require(manual_dir, [*_LISTS.values(), "texts", "images"], SOURCE)
    # Found by name: the lists give a category's number, the folders its name.
    files = {path.stem: path for path in sorted((manual_dir / "images").glob("*/*.jpg"))}
    pictures: dict[str, list[RawPicture]] = {}
    queries: dict[str, list[RawQuery]] = {"train": [], "validation": [], "test": []}
    for gallery, name in _LISTS.items():
        found = {}  # by id: several texts may share a picture
        for place, line in archive.read_lines(manual_dir / name):
            parts = line.split()
            if len(parts) != 3:
                raise UserError(f"{place}: must be a text, a picture and a category.")
            text, image, _ = parts
            file = files.get(image, manual_dir / "images" / f"{image}.jpg")
            found[image] = RawPicture(image, file)
            words = _section(place, manual_dir / "texts" / f"{text}.xml")
            queries[split_of(gallery, text)].append(RawQuery(text, words, "en", (image,)))
        pictures[gallery] = list(found.values())
    return Archive(pictures, queries)


def _section(place: str, path: Path) -> str:
    """Returns the content of a file's <text> elements."""
    try:
        content = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{place}: its text {path} cannot be read.") from error
    try:
        parts = ["".join(text.itertext()) for text in ElementTree.fromstring(content).iter("text")]
    except ElementTree.ParseError:
        # Some texts contain a bare "&" or "<", which is not well-formed XML.
        parts = re.findall(r"<text\b[^>]*>(.*?)</text>", content, re.DOTALL)
    if not parts:
        raise UserError(f"{place}: {path} has no <text>.")
    return archive.one_line(" ".join(parts))


BENCHMARK = Benchmark(
    name="wikipedia",
    shifts=("articles",),
    galleries={"train": "train", "validation": "train", "test": "test"},
    test_sets={"test": "test split"},
    version="1.1.0",
    about=__doc__,
    source=SOURCE,
    read=read,
    published={"pictures of train": 2173, "pictures of test": 693, "queries": 2866},
)
