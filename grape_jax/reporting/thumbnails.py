"""Pictures as small data URIs, within a number of bytes."""

import base64
import io
from collections.abc import Callable, Mapping

from PIL import Image

# Edge in pixels and WebP quality, largest first; the first that fits is used.
SIZES = ((96, 60), (80, 50), (64, 45), (48, 40), (32, 30))
SAMPLE = 48  # pictures encoded to estimate a size


def encode(pictures: Mapping[str, Callable[[], Image.Image]], limit: int) -> dict[str, str]:
    """Data URIs of pictures, all at the largest of `SIZES` that fits.

    Args:
      pictures: a name for each picture, and how to open it.
      limit: the most bytes of all URIs together.

    Returns:
      The URI of each name; empty if the pictures do not fit at any size.
    """
    names = list(pictures)
    sample = names[:: max(1, len(names) // SAMPLE)]
    for edge, quality in SIZES:
        uri = lambda name, edge=edge, quality=quality: _uri(pictures[name](), edge, quality)
        share = len(sample) / max(1, len(names))
        if sum(len(uri(name)) for name in sample) > share * limit:
            continue
        found = {name: uri(name) for name in names}
        if sum(map(len, found.values())) <= limit:
            return found
    return {}


def _uri(image: Image.Image, edge: int, quality: int) -> str:
    """A picture scaled into a square of `edge` pixels, on white."""
    if image.mode != "RGB":
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size, "white")
        image.paste(rgba, mask=rgba.getchannel("A"))
    small = image.copy()
    small.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="webp", quality=quality, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
