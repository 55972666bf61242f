"""Opening and hashing of pictures: files, encoded bytes or decoded images."""

import io
from pathlib import Path

from PIL import Image

from grape_jax.runtime.errors import UserError

Picture = Image.Image | bytes | str | Path  # decoded image, encoded file, or path


def open_picture(picture: Picture) -> Image.Image:
    """Returns the decoded picture.

    Raises:
      UserError: the file is missing, or its content is not a complete picture.
    """
    if isinstance(picture, Image.Image):
        return picture
    try:
        opened = Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture)
        opened.load()
        return opened
    # Pillow raises SyntaxError for a broken PNG.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(picture, bytes):
            name = f"an encoded picture of {len(picture)} bytes"
        else:
            name = str(picture)
        raise UserError(f"{name} cannot be read as a picture: {error}.") from error


def picture_size(picture: Picture) -> tuple[int, int]:
    """Returns width and height of a picture, of a file from its header alone.

    Raises:
      UserError: the file is missing, or its content is not a picture.
    """
    if isinstance(picture, Image.Image):
        return picture.size
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as opened:
            return opened.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return open_picture(picture).size  # with its message


def content(picture: Picture) -> bytes:
    """Returns bytes that identify a picture: the encoded file, or mode, size and pixels.

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
