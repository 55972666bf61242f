"""Opens and hashes pictures: files, encoded bytes or decoded images."""

import io
from pathlib import Path

from PIL import Image

from grape_jax.runtime.errors import UserError

Picture = Image.Image | bytes | str | Path  # decoded, encoded, or the file that it is in


def open_picture(picture: Picture) -> Image.Image:
    """A decoded picture.

    Raises:
      UserError: the file is missing, or the content is not a whole picture.
    """
    if isinstance(picture, Image.Image):
        return picture
    encoded = isinstance(picture, bytes)
    try:
        opened = Image.open(io.BytesIO(picture) if encoded else picture)
        opened.load()
        return opened
    # What PIL's decoders raise: a SyntaxError of a broken PNG, a bomb of too many pixels.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        name = f"an encoded picture of {len(picture)} bytes" if encoded else picture
        raise UserError(f"{name} cannot be read as a picture: {error}.") from error


def content(picture: Picture) -> bytes:
    """What makes a picture this one and no other: its encoded bytes, or size and pixels.

    Raises:
      UserError: the file cannot be read.
    """
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, Image.Image):
        return f"{picture.mode} {picture.size} ".encode() + picture.tobytes()
    try:
        return Path(picture).read_bytes()
    except OSError as error:
        raise UserError(f"{picture} cannot be read as a picture: {error}.") from error
