"""A directory of pictures with captions in four languages, as a user might have it.

python tests/local_files.py DIRECTORY [COUNT]
"""

import csv
import io
import sys
from pathlib import Path

from grape_jax.data import openmoji

LANGUAGES = ("en", "de", "fr", "zh")


def write(directory: Path, count: int = 300, size: int = 96) -> tuple[Path, Path]:
    """PNG and JPEG files in folders, and a CSV of their names.

    Returns:
      The directory of the pictures, and the file of the queries.
    """
    import emoji

    root, rows = directory / "pictures", []
    for number, picture in enumerate(openmoji.gallery()[:count]):
        suffix = (".png", ".jpg")[number % 2]
        path = root / f"folder {number % 3}" / f"{picture.code}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        openmoji.render(picture.svg.read_text(), size).save(path)
        for language in LANGUAGES:
            emoji.config.load_language(language)
            name = emoji.EMOJI_DATA[picture.emoji].get(language)
            if name:
                text = name.strip(":").replace("_", " ")
                rows.append({"text": text, "image": path.name, "language": language})
    queries = directory / "queries.csv"
    table = io.StringIO()
    writer = csv.DictWriter(table, ["text", "image", "language"])
    writer.writeheader()
    writer.writerows(rows)
    queries.write_text(table.getvalue(), encoding="utf-8")
    return root, queries


if __name__ == "__main__":
    print(*write(Path(sys.argv[1]), *map(int, sys.argv[2:])), sep="\n")
