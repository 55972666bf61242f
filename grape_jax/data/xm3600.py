"""The benchmark `xm3600`: Crossmodal-3600, captions of 3,600 pictures in 36 languages.

Read from `manual_dir`:

  captions.jsonl   {"image/key", "image/locale", "<language>": {"caption": [...]}} a line
  {key}.jpg        (or images/{key}.jpg)

The official release has no training split: it was made for evaluation. The split here is ours: by
a hash of the picture's key 60 % of the pictures are asked for in training, 10 % in validation and
the rest in the test. Every query is ranked among all 3,600 pictures, as the official protocol ranks
it, so numbers of the test are comparable with published ones as a sample of them; their mean over
languages is what is published. CLIP_benchmark takes the first caption of each picture and language
only (`xm3600.captions="first"`).
"""

from collections.abc import Sequence
from pathlib import Path

from grape_jax.data import archive, benchmark
from grape_jax.data.archive import Archive, Asked, Layout, Picture
from grape_jax.data.benchmark import Corpus, Query, hash64
from grape_jax.runtime.errors import UserError

SHIFTS = ("multilingual",)
SPLITS = ("train", "validation", "test")
TEST_SETS = {"test": "held-out pictures (our split)"}
CAPTIONS = ("all", "first")
SOURCE = "https://google.github.io/crossmodal-3600/"

TRAIN_SHARE, VALIDATION_SHARE = 0.6, 0.1  # of the pictures
_FOLDERS = (".", "images")


def gallery_of(split: str) -> str:
    """One corpus for all splits."""
    benchmark.refuse_unknown("split", [split], SPLITS)
    return "corpus"


LAYOUT = Layout(
    name="xm3600",
    shift="multilingual",
    version="1.0.0",
    source=SOURCE,
    about=__doc__,
    gallery_of=gallery_of,
    published={"pictures of corpus": 3600, "queries": 261375, "languages": 36},
)


def prepare(manual_dir: str | Path, data_dir: str | Path) -> None:
    """Reads the official files and writes the sets.

    Raises:
      UserError: a file is missing or says what cannot be; nothing is written then.
    """
    archive.store(data_dir, LAYOUT, read(Path(manual_dir)))


def load_queries(
    data_dir: str | Path,
    shift: str,
    split: str,
    limit: int | None = None,
    languages: Sequence[str] = (),
    captions: str = "all",
) -> list[Query]:
    """The captions of one split.

    Args:
      limit: see `benchmark.read_queries`; of those in the languages asked for.
      languages: of those of the file, such as "de"; none: all.
      captions: one of CAPTIONS, "first" keeps one of each picture and language.

    Raises:
      UserError: the set is not there or is damaged; it has no captions in a language.
    """
    benchmark.refuse_unknown("shift", [shift], SHIFTS)
    queries = archive.load_queries(data_dir, LAYOUT, split)
    if languages:
        known = sorted({query.language for query in queries})
        benchmark.refuse_unknown("language of xm3600", languages, known)
        queries = [query for query in queries if query.language in languages]
    if captions == "first":
        queries = [query for query in queries if query.id.endswith("/0")]
    return queries if limit is None else benchmark.subset(queries, limit)


def load_corpus(data_dir: str | Path, gallery: str) -> Corpus:
    """All pictures, named by their first English caption where there is one."""
    return archive.load_corpus(data_dir, LAYOUT, gallery)


def split_of(key: str) -> str:
    """train, validation or test, by a hash of the picture's key."""
    share = hash64(f"xm3600 {key}") / 2**64
    if share < TRAIN_SHARE:
        return "train"
    return "validation" if share < TRAIN_SHARE + VALIDATION_SHARE else "test"


def read(manual_dir: Path) -> Archive:
    """The official files."""
    archive.require(manual_dir, ["captions.jsonl"], SOURCE)
    pictures, queries = [], {split: [] for split in SPLITS}
    roots = [manual_dir / folder for folder in _FOLDERS]
    for place, record in archive.read_json_lines(manual_dir / "captions.jsonl"):
        key = archive.field(place, record, "image/key", str)
        told = _captions(place, record)
        name = told.get("en", [""])[0]
        pictures.append(Picture(key, archive.picture_file(roots, f"{key}.jpg"), name=name))
        queries[split_of(key)] += [
            Asked(f"{key}/{language}/{number}", text, language, (key,))
            for language, texts in told.items()
            for number, text in enumerate(texts)
        ]
    return Archive({"corpus": pictures}, queries)


def _captions(place: str, record: dict) -> dict[str, list[str]]:
    """The captions of each language that has some."""
    told = {}
    for language, entry in record.items():
        if not isinstance(entry, dict):  # "image/key" and its kin
            continue
        texts = archive.field(f"{place}, {language}", entry, "caption", list)
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{place}, {language}: 'caption' must be a list of texts.")
        if texts:
            told[language] = [archive.one_line(text) for text in texts]
    if not told:
        raise UserError(f"{place}: there is no caption in any language.")
    return told
