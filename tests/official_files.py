"""Tiny archives in the official layouts of the benchmarks, odd cases included."""

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from grape_jax.data import wikipedia

SIZES = {"train": 12, "validation": 6, "test": 6}


def picture(seed: int, file_format: str = "JPEG") -> bytes:
    """A picture of its own colour and pattern."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    encoded = io.BytesIO()
    small.resize((24, 20), Image.Resampling.NEAREST).save(encoded, format=file_format)
    return encoded.getvalue()


def _write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def _json_lines(path: Path, records: list[dict]) -> None:
    _write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def caption(image: int, number: int) -> str:
    return f"图片{image}的第{number}句, 有逗号"


def flickr_chinese_clip(folder: Path, tagged: bool = False) -> Path:
    """The train split's first caption fits two pictures; the test's base64 is that for URLs."""
    start = 0
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        images = range(1000 + start, 1000 + start + SIZES[split])
        start += SIZES[split]
        encode = base64.urlsafe_b64encode if split == "test" else base64.b64encode
        lines = [f"{i}\t{encode(picture(i)).decode()}\n" for i in images]
        _write(folder / f"{name}_imgs.tsv", "".join(lines))
        texts = []
        for image in images:
            for number in range(5):
                text = f"一个/m 男人{image}/n {number}/m" if tagged else caption(image, number)
                several = split == "train" and not texts
                right = [image, image + 1] if several else [image]
                texts.append({"text_id": len(texts), "text": text, "image_ids": right})
        _json_lines(folder / f"{name}_texts.jsonl", texts)
    return folder


def flickr_clip_benchmark(folder: Path) -> Path:
    start = 0
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        images = range(1000 + start, 1000 + start + SIZES[split])
        start += SIZES[split]
        lines = ["image,caption"]
        for image in images:
            _write(folder / "Images" / f"{image}.jpg", picture(image))
            lines += [f"{image}.jpg,{caption(image, number)}" for number in range(5)]
        _write(folder / f"flickr30k_{name}_zh.txt", "\n".join(lines) + "\n")
    return folder


def cvlue(folder: Path) -> Path:
    """In train an entry a caption, as one text; in the test two pictures share a caption."""
    start = 0
    files = {"train": "last_train.json", "validation": "new_val.json", "test": "new_test.json"}
    for split, name in files.items():
        entries = []
        for image in range(start, start + SIZES[split]):
            file = f"images/{split}/{image}.jpg"
            _write(folder / file, picture(image))
            captions = [caption(image, number) for number in range(5)]
            if split == "test" and image < start + 2:
                captions[4] = "同一句"
            if split == "train":
                entries += [{"image": file, "caption": c, "image_id": image} for c in captions]
            else:
                entries.append({"image": file, "caption": captions, "image_id": image})
        start += SIZES[split]
        _write(folder / name, json.dumps(entries, ensure_ascii=False))
    return folder


def xm3600(folder: Path, pictures: int = 30) -> Path:
    """Two or three captions of a language; the last picture has no German one."""
    records = []
    for number in range(pictures):
        key = f"{number:016x}"
        _write(folder / "images" / f"{key}.jpg", picture(number))
        record = {"image/key": key, "image/locale": "en"}
        for language, count in (("de", 2), ("en", 3), ("th", 2)):
            if language == "de" and number == pictures - 1:
                count = 0
            texts = [f"{language} {number} {i}" for i in range(count)]
            record[language] = {"caption": texts, "caption/tokenized": texts}
        records.append(record)
    _json_lines(folder / "captions.jsonl", records)
    return folder


def wikipedia_files(folder: Path) -> Path:
    """One text holds a bare "&", which is no XML; one has two paragraphs."""
    names = {"train": "trainset_txt_img_cat.list", "test": "testset_txt_img_cat.list"}
    for part, (split, name) in enumerate(names.items()):
        lines = []
        for number in range(24 if split == "train" else 8):
            text, image = f"{part}{number:031x}-1", f"{part + 2}{number:031x}"
            body = f"Section {number} of {split} &amp; its town.\n\nA second paragraph."
            if number == 1:
                body = f"Section {number} of {split} & its town."
            article = f'<?xml version="1.0"?>\n<article>\n<text>\n{body}\n</text>\n</article>\n'
            _write(folder / "texts" / f"{text}.xml", article)
            _write(folder / "images" / "art" / f"{image}.jpg", picture(100 * part + number))
            lines.append(f"{text}\t{image}\t1")
        _write(folder / name, "\n".join(lines) + "\n")
    splits = {wikipedia.split_of("train", f"0{number:031x}-1") for number in range(24)}
    assert splits == {"train", "validation"}
    return folder


def cirr(folder: Path) -> Path:
    """Sets of six members; test1 has no targets; one picture of val is asked for by nobody."""
    for part, split in enumerate(("train", "val", "test1")):
        count = 18 if split == "train" else 12
        names = [f"{split}-{i}-0-img0" for i in range(count)]
        files = {name: f"./{split}/{name}.png" for name in names}
        if split == "val":
            files["val-spare-0-img0"] = "./val/val-spare-0-img0.png"
        for number, file in enumerate(files.values()):
            _write(folder / file, picture(100 * part + number, "PNG"))
        pairs = []
        for number, reference in enumerate(names):
            first = number - number % 6
            members = names[first : first + 6]
            target = members[(number + 1) % 6]
            pair = {
                "pairid": 1000 * part + number,
                "reference": reference,
                "caption": f"make it number {number}",
                "img_set": {"id": first, "members": members, "reference_rank": 3},
            }
            if split != "test1":
                pair |= {"target_hard": target, "target_soft": {target: 1.0}}
                pair["img_set"]["target_rank"] = 4
            pairs.append(pair)
        _write(folder / f"cirr/captions/cap.rc2.{split}.json", json.dumps(pairs))
        _write(folder / f"cirr/image_splits/split.rc2.{split}.json", json.dumps(files))
    return folder
