"""The benchmark `flickr30k_cn`: Flickr30k with Chinese captions, of which the test's are human.

Two published layouts are read from `manual_dir`, whichever is there.

  Chinese-CLIP:    {train,valid,test}_texts.jsonl   {"text_id", "text", "image_ids"} a line
                   {train,valid,test}_imgs.tsv      id TAB base64 of the picture
  CLIP_benchmark:  flickr30k_{train,val,test}_zh.txt  a header, then x.jpg,caption
                   Images/*.jpg                     (or flickr30k-images/, or beside the texts)

A query is ranked among its split's pictures: 29,783 of train, 1,000 of validation and of test.
"""

from collections.abc import Iterator
from pathlib import Path

from grape_jax.data import archive, benchmark, tagged
from grape_jax.data.archive import Archive, Asked, Layout, Picture
from grape_jax.data.benchmark import Corpus, Query
from grape_jax.runtime.errors import UserError

SHIFTS = ("chinese",)
SPLITS = ("train", "validation", "test")
TEST_SETS = {"test": "test split"}
SOURCE = "https://github.com/OFA-Sys/Chinese-CLIP or https://github.com/LAION-AI/CLIP_benchmark"

_CHINESE_CLIP = {"train": "train", "validation": "valid", "test": "test"}
_CLIP_BENCHMARK = {"train": "train", "validation": "val", "test": "test"}
_FOLDERS = ("Images", "images", "flickr30k-images", ".")


def gallery_of(split: str) -> str:
    """Each split has its own pictures."""
    benchmark.refuse_unknown("split", [split], SPLITS)
    return split


LAYOUT = Layout(
    name="flickr30k_cn",
    shift="chinese",
    version="1.0.0",
    source=SOURCE,
    about=__doc__,
    gallery_of=gallery_of,
    published={
        "pictures of train": 29783,
        "pictures of validation": 1000,
        "pictures of test": 1000,
        "queries of train": 148915,
        "queries of validation": 5000,
        "queries of test": 5000,
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
    """The official files of either layout."""
    if (manual_dir / "test_texts.jsonl").exists():
        found = {split: _chinese_clip(manual_dir, name) for split, name in _CHINESE_CLIP.items()}
    elif (manual_dir / "flickr30k_test_zh.txt").exists():
        names = [f"flickr30k_{name}_zh.txt" for name in _CLIP_BENCHMARK.values()]
        archive.require(manual_dir, names, SOURCE)
        found = {
            split: _clip_benchmark(manual_dir, name) for split, name in _CLIP_BENCHMARK.items()
        }
    else:
        raise UserError(
            f"{manual_dir} holds neither test_texts.jsonl nor flickr30k_test_zh.txt: {SOURCE} "
            "describes the files and where to get them."
        )
    pictures, queries = ({split: parts[i] for split, parts in found.items()} for i in (0, 1))
    return Archive(pictures, queries)


def _chinese_clip(folder: Path, name: str) -> tuple[list[Picture], list[Asked]]:
    texts, images = folder / f"{name}_texts.jsonl", folder / f"{name}_imgs.tsv"
    archive.require(folder, [texts.name, images.name], SOURCE)
    records = list(archive.read_json_lines(texts))
    captions = [archive.one_line(archive.field(*record, "text", str)) for record in records]
    queries = [
        Asked(
            id=str(archive.field(*record, "text_id", (int, str))),
            text=caption,
            language="zh",
            targets=tuple(dict.fromkeys(map(str, archive.field(*record, "image_ids", list)))),
        )
        for record, caption in zip(records, tagged.without_tags(captions, str(texts)), strict=True)
    ]
    unanswered = next((query for query in queries if not query.targets), None)
    if unanswered is not None:
        raise UserError(f"{texts}: text_id {unanswered.id} has no image_ids.")
    first = {target: query.text for query in reversed(queries) for target in query.targets}
    pictures = [
        Picture(key, images, start, length, name=first.get(key, ""))
        for key, start, length in _stretches(images)
    ]
    return pictures, queries


def _stretches(path: Path) -> Iterator[tuple[str, int, int]]:
    """The id of each line of a TSV, and where its base64 lies: read in place, for it is large."""
    with path.open("rb") as file:
        position = 0
        for number, line in enumerate(file, start=1):
            key, tab, encoded = line.partition(b"\t")
            if line.strip():
                if not tab or not key.strip() or not encoded.strip():
                    raise UserError(f"{path}, line {number}: must be an id, a tab and a picture.")
                start = position + len(key) + len(tab)
                yield key.decode(errors="replace").strip(), start, len(encoded.rstrip())
            position += len(line)


def _clip_benchmark(folder: Path, name: str) -> tuple[list[Picture], list[Asked]]:
    path = folder / f"flickr30k_{name}_zh.txt"
    lines = list(archive.read_lines(path))
    rows = []
    for number, (place, line) in enumerate(lines):
        # A caption may hold commas, so the first ".jpg," ends the name.
        stem, found, caption = line.partition(".jpg,")
        if found:
            rows.append((f"{stem}.jpg", archive.one_line(caption)))
        elif number:
            raise UserError(f"{place}: must be a picture's name, a comma and a caption.")
    captions = tagged.without_tags([caption for _, caption in rows], str(path))
    roots = [folder / name for name in _FOLDERS]
    pictures, queries, numbers = {}, [], {}
    for (image, _), caption in zip(rows, captions, strict=True):
        if image not in pictures:
            file = archive.picture_file(roots, image)
            pictures[image] = Picture(image, file, name=caption)
        number = numbers[image] = numbers.get(image, -1) + 1
        queries.append(Asked(f"{image}#{number}", caption, "zh", (image,)))
    return list(pictures.values()), queries
