"""The benchmark `flickr30k_cn`: Flickr30k with Chinese captions; those of test are by humans.

Read from `manual_dir`, in either published layout:

  Chinese-CLIP:    {train,valid,test}_texts.jsonl   {"text_id", "text", "image_ids"} per line
                   {train,valid,test}_imgs.tsv      id TAB base64 of the picture
  CLIP_benchmark:  flickr30k_{train,val,test}_zh.txt  a header, then x.jpg,caption
                   Images/*.jpg                     (or flickr30k-images/, or beside the texts)

A query is ranked among its split's pictures: 29,783 of train, 1,000 of validation and of test.
"""

from collections.abc import Iterator
from pathlib import Path

from grape_jax.data import archive, tagged
from grape_jax.data.benchmark import Archive, Benchmark, RawPicture, RawQuery
from grape_jax.runtime.errors import UserError

SOURCE = "https://github.com/OFA-Sys/Chinese-CLIP or https://github.com/LAION-AI/CLIP_benchmark"

_CHINESE_CLIP = {"train": "train", "validation": "valid", "test": "test"}
_CLIP_BENCHMARK = {"train": "train", "validation": "val", "test": "test"}
_FOLDERS = ("Images", "images", "flickr30k-images", ".")


def read(manual_dir: Path) -> Archive:
    """Reads the official files.

    Raises:
      UserError: a file is missing or malformed.
    """
    if (manual_dir / "test_texts.jsonl").exists():
        parts = {split: _chinese_clip(manual_dir, name) for split, name in _CHINESE_CLIP.items()}
    elif (manual_dir / "flickr30k_test_zh.txt").exists():
        names = [f"flickr30k_{name}_zh.txt" for name in _CLIP_BENCHMARK.values()]
        archive.require(manual_dir, names, SOURCE)
        parts = {
            split: _clip_benchmark(manual_dir, name) for split, name in _CLIP_BENCHMARK.items()
        }
    else:
        raise UserError(
            f"{manual_dir} holds neither test_texts.jsonl nor flickr30k_test_zh.txt: {SOURCE} "
            "describes the files and where to get them."
        )
    return Archive(
        pictures={split: pictures for split, (pictures, _) in parts.items()},
        queries={split: queries for split, (_, queries) in parts.items()},
    )


def _chinese_clip(folder: Path, name: str) -> tuple[list[RawPicture], list[RawQuery]]:
    texts, images = folder / f"{name}_texts.jsonl", folder / f"{name}_imgs.tsv"
    archive.require(folder, [texts.name, images.name], SOURCE)
    records = list(archive.read_json_lines(texts))
    captions = [archive.one_line(archive.field(*record, "text", str)) for record in records]
    queries = [
        RawQuery(
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
        RawPicture(key, images, start, length, name=first.get(key, ""))
        for key, start, length in _base64_ranges(images)
    ]
    return pictures, queries


def _base64_ranges(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yields id, offset and length of the base64 in each line, without keeping the large file."""
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


def _clip_benchmark(folder: Path, name: str) -> tuple[list[RawPicture], list[RawQuery]]:
    path = folder / f"flickr30k_{name}_zh.txt"
    lines = list(archive.read_lines(path))
    rows = []
    for number, (place, line) in enumerate(lines):
        # The name ends at the first ".jpg,": captions may contain commas.
        stem, found, caption = line.partition(".jpg,")
        if found:
            rows.append((f"{stem}.jpg", archive.one_line(caption)))
        elif number:
            raise UserError(f"{place}: must be a picture's name, a comma and a caption.")
    captions = tagged.without_tags([caption for _, caption in rows], str(path))
    roots = [folder / name for name in _FOLDERS]
    pictures: dict[str, RawPicture] = {}
    queries: list[RawQuery] = []
    numbers: dict[str, int] = {}
    for (image, _), caption in zip(rows, captions, strict=True):
        if image not in pictures:
            file = archive.picture_file(roots, image)
            pictures[image] = RawPicture(image, file, name=caption)
        number = numbers[image] = numbers.get(image, -1) + 1
        queries.append(RawQuery(f"{image}#{number}", caption, "zh", (image,)))
    return list(pictures.values()), queries


BENCHMARK = Benchmark(
    name="flickr30k_cn",
    shifts=("chinese",),
    galleries={"train": "train", "validation": "validation", "test": "test"},
    test_sets={"test": "test split"},
    version="1.1.0",
    about=__doc__,
    source=SOURCE,
    read=read,
    published={
        "pictures of train": 29783,
        "pictures of validation": 1000,
        "pictures of test": 1000,
        "queries of train": 148915,
        "queries of validation": 5000,
        "queries of test": 5000,
    },
)
