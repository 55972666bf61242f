"""Training data of the retriever: pictures of the gallery's concepts in other styles, with texts.

The pictures are those of Iconify's npm packages (`@iconify-json/*`: SVG bodies by name). The texts
are the English name of each concept (PyPI `emoji`) and its English name and keywords in CLDR (npm
`cldr-annotations-full`, `cldr-annotations-derived-full`), all in correct English, so that a
benchmark's shifted queries (other languages, glosses, typing errors) do not occur in training.
"""

import dataclasses
import json
import multiprocessing
import re
from pathlib import Path

import numpy as np
from PIL import Image

from grape_jax.data import openmoji
from grape_jax.runtime.errors import UserError

# Package and licence. Share-alike sets are excluded, to keep the licence of the weights clear.
STYLES = (
    ("noto", "Apache-2.0"),
    ("noto-v1", "Apache-2.0"),
    ("fxemoji", "Apache-2.0"),
    ("fluent-emoji-flat", "MIT"),
    ("fluent-emoji", "MIT"),
    ("twemoji", "CC-BY-4.0"),
    ("emojione", "CC-BY-4.0"),
    ("streamline-emojis", "CC-BY-4.0"),
)
INSTALL = "npm install " + " ".join(
    [f"@iconify-json/{name}" for name, _ in STYLES]
    + ["cldr-annotations-full", "cldr-annotations-derived-full"]
)
# Larger than the retriever's input, as the pictures of a benchmark are.
RENDER_SIZE = 128
# Function words that occur in phrases but not in keyword lists.
FRAMES = (
    "a {}",
    "the {}",
    "{} emoji",
    "{} icon",
    "a picture of {}",
    "a picture of a {}",
    "an emoji of {}",
    "a drawing of a {}",
    "image of {}",
    "this is a {}",
)


@dataclasses.dataclass(frozen=True)
class Concept:
    """A gallery item with its English texts."""

    code: str  # OpenMoji's code points: "1F600"
    emoji: str
    name: str  # of the package emoji: "grinning face"
    cldr_name: str  # of CLDR, often the same
    keywords: tuple[str, ...]  # of CLDR, without the name itself


def concepts(npm: Path) -> list[Concept]:
    """The items of the gallery, in its order, with their English texts.

    Args:
      npm: the node_modules folder.

    Raises:
      UserError: a package is missing or cannot be read.
    """
    texts = _cldr(npm, "cldr-annotations-full", "annotations")
    texts |= _cldr(npm, "cldr-annotations-derived-full", "annotationsDerived")
    items = []
    for picture in openmoji.gallery():
        entry = texts.get(_bare(picture.emoji), {})
        cldr_name = entry.get("tts", [picture.name])[0]
        names = {picture.name.lower(), cldr_name.lower()}
        keywords = tuple(k for k in entry.get("default", []) if k.lower() not in names)
        items.append(Concept(picture.code, picture.emoji, picture.name, cldr_name, keywords))
    return items


def style_svgs(npm: Path, style: str, wanted: list[Concept]) -> dict[str, str]:
    """SVG documents of one Iconify package by concept code, without the concepts it lacks.

    Raises:
      UserError: the package is missing or cannot be read.
    """
    folder = npm / "@iconify-json" / style
    icons = _read_json(folder / "icons.json")
    names_by_chars = _read_json(folder / "chars.json")
    # Packages differ in hyphens: "grinningface" and "grinning-face".
    names = {name.replace("-", ""): name for name in [*icons["icons"], *icons.get("aliases", {})]}
    svgs = {}
    for concept in wanted:
        by_chars = names_by_chars.get("-".join(f"{ord(c):x}" for c in _bare(concept.emoji)))
        slugs = (_slug(concept.name), _slug(concept.cldr_name))
        by_name = next((names[slug] for slug in slugs if slug in names), None)
        icon = _resolve(icons, by_chars or by_name)
        if icon is not None:
            svgs[concept.code] = _document(icons, icon)
    return svgs


def render_all(svgs: list[str], size: int) -> np.ndarray:
    """Renders SVG documents: uint8 `[N, size, size, 3]`; one that cannot be rendered is white."""
    with multiprocessing.get_context("spawn").Pool() as pool:
        jobs = [(svg, size) for svg in svgs]
        return np.stack(pool.starmap(_draw, jobs, chunksize=32))


def is_blank(pixels_HxWx3: np.ndarray) -> bool:
    """Whether a picture is all white."""
    return bool((pixels_HxWx3 == 255).all())


def resize(picture: Image.Image, size: int) -> Image.Image:
    """Resizes as CLIP's image processor does: bicubic, with antialiasing."""
    return picture.resize((size, size), Image.Resampling.BICUBIC)


def words(text: str) -> list[str]:
    """Lower-case words of a text, in order."""
    return re.findall(r"\w+", text.lower())


def vocabulary(all_concepts: list[Concept]) -> list[str]:
    """All English texts without repetition, to train a tokenizer."""
    texts = {t for c in all_concepts for t in (c.name, c.cldr_name, *c.keywords)}
    return sorted(texts | set(FRAMES))


def held_out_phrase(concept: Concept) -> str:
    """Three keywords for evaluation, which `sample_text` never uses alone.

    "" for a concept with fewer than six keywords.
    """
    if len(concept.keywords) < 6:
        return ""
    # Seeded by the concept, and so independent of the order of concepts.
    rng = np.random.default_rng([ord(c) for c in concept.code])
    chosen = rng.choice(len(concept.keywords), 3, replace=False)
    return ", ".join(concept.keywords[i] for i in chosen)


def sample_text(concept: Concept, rng: np.random.Generator) -> tuple[str, bool]:
    """A random English text about a concept.

    Names, names with missing or shuffled words, lists of keywords, or a name with a list: texts
      that a
    rewriter may write, right or partly right.

    Returns:
      The text, and whether it contains a whole name.
    """
    name = concept.name if rng.random() < 0.8 else concept.cldr_name
    kind = rng.random()
    if not concept.keywords or kind < 0.30:
        text, has_name = name, True
    elif kind < 0.45:
        text, has_name = _some_words(name, rng), False
    elif kind < 0.75:
        text, has_name = _keyword_list(concept, rng), False
    else:
        parts = [name, _keyword_list(concept, rng)]
        rng.shuffle(parts)
        text, has_name = _separator(rng).join(parts), True
    if rng.random() < 0.15:
        text = FRAMES[rng.integers(len(FRAMES))].format(text)
    return text, has_name


def _some_words(name: str, rng: np.random.Generator) -> str:
    parts = words(name)
    if len(parts) > 1:
        kept = rng.random(len(parts)) < 0.7
        kept[rng.integers(len(parts))] = True
        parts = [part for part, keep in zip(parts, kept, strict=True) if keep]
    if rng.random() < 0.5:
        rng.shuffle(parts)
    return " ".join(parts)


def _keyword_list(concept: Concept, rng: np.random.Generator) -> str:
    held_out = set(held_out_phrase(concept).split(", "))
    while True:
        count = min(int(rng.integers(1, 5)), len(concept.keywords))
        chosen = rng.choice(len(concept.keywords), count, replace=False)
        keywords = [concept.keywords[i] for i in chosen]
        if set(keywords) != held_out:
            return _separator(rng).join(keywords)


def _separator(rng: np.random.Generator) -> str:
    return ", " if rng.random() < 0.5 else " "


def _draw(svg: str, size: int) -> np.ndarray:
    try:
        return np.asarray(resize(openmoji.render(svg, RENDER_SIZE), size))
    except ValueError:
        return np.full((size, size, 3), 255, np.uint8)


def _document(icons: dict, icon: dict) -> str:
    left, top = icon.get("left", icons.get("left", 0)), icon.get("top", icons.get("top", 0))
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">'
        f"{icon['body']}</svg>"
    )


def _resolve(icons: dict, name: str | None) -> dict | None:
    """Follows aliases; None for one that rotates or mirrors its parent, a different picture."""
    while name is not None and name not in icons["icons"]:
        alias = icons.get("aliases", {}).get(name, {})
        name = alias.get("parent") if set(alias) <= {"parent", "hidden"} else None
    return None if name is None else icons["icons"][name]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", name.lower())


def _bare(characters: str) -> str:
    return characters.replace(openmoji.VARIATION_SELECTOR, "")


def _cldr(npm: Path, package: str, key: str) -> dict[str, dict]:
    data = _read_json(npm / package / key / "en" / "annotations.json")
    return {_bare(chars): entry for chars, entry in data[key]["annotations"].items()}


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing: run `{INSTALL}` and set --npm to its node_modules."
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON: install its package again.") from error
