"""The benchmark `xm3600`: Crossmodal-3600, captions of 3,600 pictures in 36 languages.

Read from `manual_dir`:

  captions.jsonl   {"image/key", "image/locale", "<language>": {"caption": [...]}} per line
  {key}.jpg        (or images/{key}.jpg)

The official release is for evaluation and has no training split. This module splits the pictures by
a hash of their key: 60 % train, 10 % validation, 30 % test. Every query is ranked among all 3,600
pictures, as in the official protocol, so the test split is a sample of the published test set.
Published numbers are means over languages. CLIP_benchmark uses only the first caption of each
picture and language (`xm3600.captions="first"`).
"""

from collections.abc import Sequence
from pathlib import Path

from grape_jax.data import archive
from grape_jax.data.benchmark import (
    Archive,
    Benchmark,
    Query,
    RawPicture,
    RawQuery,
    hash64,
    refuse_unknown,
)
from grape_jax.runtime.errors import UserError

SOURCE = "https://google.github.io/crossmodal-3600/"
CAPTIONS = ("all", "first")  # values of `config.xm3600.captions`
TRAIN_SHARE, VALIDATION_SHARE = 0.6, 0.1  # of the pictures

_FOLDERS = (".", "images")


def split_of(key: str) -> str:
    """Returns the split of a picture: train, validation or test, by a hash of its key."""
    share = hash64(f"xm3600 {key}") / 2**64
    if share < TRAIN_SHARE:
        return "train"
    return "validation" if share < TRAIN_SHARE + VALIDATION_SHARE else "test"


def read(manual_dir: Path) -> Archive:
    """Reads the official files.

    Raises:
      UserError: a file is missing or malformed.
    """
    archive.require(manual_dir, ["captions.jsonl"], SOURCE)
    pictures: list[RawPicture] = []
    queries: dict[str, list[RawQuery]] = {"train": [], "validation": [], "test": []}
    roots = [manual_dir / folder for folder in _FOLDERS]
    for place, record in archive.read_json_lines(manual_dir / "captions.jsonl"):
        key = archive.field(place, record, "image/key", str)
        captions = _captions(place, record)
        name = captions.get("en", [""])[0]
        pictures.append(RawPicture(key, archive.picture_file(roots, f"{key}.jpg"), name=name))
        queries[split_of(key)] += [
            RawQuery(f"{key}/{language}/{number}", text, language, (key,))
            for language, texts in captions.items()
            for number, text in enumerate(texts)
        ]
    return Archive({"corpus": pictures}, queries)


def _captions(place: str, record: dict) -> dict[str, list[str]]:
    """Returns language -> captions, without the languages that have none."""
    captions = {}
    for language, entry in record.items():
        if not isinstance(entry, dict):  # such as "image/key"
            continue
        texts = archive.field(f"{place}, {language}", entry, "caption", list)
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{place}, {language}: 'caption' must be a list of texts.")
        if texts:
            captions[language] = [archive.one_line(text) for text in texts]
    if not captions:
        raise UserError(f"{place}: there is no caption in any language.")
    return captions


def select(queries: Sequence[Query], languages: Sequence[str], captions: str) -> list[Query]:
    """Returns the queries that `config.xm3600` asks for.

    Args:
      queries: of one split.
      languages: those to keep, such as "de"; empty: all.
      captions: "first" keeps the first caption of each picture and language; "all".

    Raises:
      UserError: no query is in one of the languages.
    """
    refuse_unknown("language of xm3600", languages, sorted({q.language for q in queries}))
    return [
        query
        for query in queries
        if (not languages or query.language in languages)
        and (captions != "first" or query.id.endswith("/0"))
    ]


BENCHMARK = Benchmark(
    name="xm3600",
    shifts=("multilingual",),
    galleries={"train": "corpus", "validation": "corpus", "test": "corpus"},
    test_sets={"test": "held-out pictures (our split)"},
    version="1.1.0",
    about=__doc__,
    source=SOURCE,
    read=read,
    published={"pictures of corpus": 3600, "queries": 261375, "languages": 36},
)
