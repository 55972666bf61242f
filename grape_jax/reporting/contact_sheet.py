"""Contact sheets: queries with the pictures found by their rewrites."""

import functools
import io
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, features

from grape_jax.runtime import files

THUMB, GAP, MARGIN = 92, 8, 28  # pixels
STRIP = 5 * THUMB + 4 * GAP  # pictures found by one search
COLUMN_GAP = 36
GREEN, INK, FAINT, RULE = "#1a8f3c", "#1f1f1f", "#757575", "#dddddd"


class Row(NamedTuple):
    """One search on a contact sheet."""

    title: str  # the query; consecutive rows with the same title share it
    rewrite: str  # the text that was searched with
    images: Sequence[Image.Image]  # pictures found, best first
    highlighted: int | None  # index of the right picture in `images`, framed in green
    caption: str  # a short line above the rewrite: the method and the rank
    picture: Image.Image | None = None  # the query picture of a composed query


def contact_sheet(
    rows: Sequence[Row | tuple],
    path: str | Path,
    *,
    columns: int = 1,
    wanted: Sequence[tuple[Image.Image, str]] | None = None,
    note: str = "",
) -> None:
    """Writes a contact sheet of searches as a PNG file, atomically.

    Args:
      rows: `Row`s or tuples of their fields; at most five images of each are drawn.
      path: the PNG file.
      columns: the number of rows of each query, drawn side by side; with 1, consecutive rows with
        the same title are drawn below each other.
      wanted: for each query, the right picture and its name, drawn to the left of its rows.
      note: a text at the foot.
    """
    groups = _groups([Row(*row) for row in rows], columns)
    indent = THUMB + COLUMN_GAP if wanted else 0
    width = 2 * MARGIN + indent + columns * STRIP + (columns - 1) * COLUMN_GAP
    tiles = [
        _group_tile(group, width - 2 * MARGIN, indent, columns, wanted[i] if wanted else None)
        for i, group in enumerate(groups)
    ]
    if note:
        tiles.append(_note_tile(note, width - 2 * MARGIN))
    height = 2 * MARGIN + sum(tile.height for tile in tiles) + 2 * GAP * (len(tiles) - 1)
    sheet = Image.new("RGB", (width, height), "white")
    top = MARGIN
    for tile in tiles:
        sheet.paste(tile, (MARGIN, top))
        top += tile.height + 2 * GAP
    buffer = io.BytesIO()
    sheet.save(buffer, format="png")
    files.replace(path, buffer.getvalue())


def _groups(rows: list[Row], columns: int) -> list[list[Row]]:
    """Groups rows by query. A full line ends a group: the next query may have the same text."""
    groups: list[list[Row]] = []
    for row in rows:
        last = groups[-1][0] if groups else None
        is_same = last is not None and last.title == row.title and last.picture == row.picture
        if is_same and (columns == 1 or len(groups[-1]) < columns):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _group_tile(
    group: list[Row],
    width: int,
    indent: int,
    columns: int,
    wanted: tuple[Image.Image, str] | None,
) -> Image.Image:
    """One query: its text, the right picture on the left, and its searches in columns."""
    header = _query_tile(group[0], width)
    cells = [_search_tile(row) for row in group]
    lines = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in line) for line in lines]
    height = header.height + GAP + sum(heights) + GAP * (len(lines) - 1) + 2 * GAP
    tile = Image.new("RGB", (width, height), "white")
    tile.paste(header, (0, 0))
    top = header.height + GAP
    for line, line_height in zip(lines, heights, strict=True):
        for i, cell in enumerate(line):
            # Aligned at the bottom: texts above the pictures have different heights.
            corner = (indent + i * (STRIP + COLUMN_GAP), top + line_height - cell.height)
            tile.paste(cell, corner)
        if wanted is not None:
            _draw_picture(tile, wanted[0], (0, top + line_height - THUMB), framed=False)
            name = _Text(wanted[1], 12, THUMB, lines=2)
            name.draw(tile, (0, top + line_height - THUMB - name.height - GAP), FAINT)
            wanted = None
        top += line_height + GAP
    ImageDraw.Draw(tile).line([(0, height - 1), (width, height - 1)], fill=RULE)
    return tile


def _query_tile(row: Row, width: int) -> Image.Image:
    """The text of a query; for a composed query, its picture with the text beside it."""
    if row.picture is None:
        title = _Text(row.title, 17, width, lines=3, bold=True)
        tile = Image.new("RGB", (width, title.height), "white")
        title.draw(tile, (0, 0), INK)
        return tile
    left = THUMB + 2 * GAP
    title = _Text(f"+ {row.title}", 17, width - left, lines=3, bold=True)
    label = _Text("query picture", 12, THUMB, lines=1)
    tile = Image.new("RGB", (width, label.height + THUMB), "white")
    label.draw(tile, (0, 0), FAINT)
    _draw_picture(tile, row.picture, (0, label.height), framed=False)
    title.draw(tile, (left, label.height + (THUMB - title.height) // 2), INK)
    return tile


def _search_tile(row: Row) -> Image.Image:
    caption = _Text(row.caption, 12, STRIP, lines=1)
    rewrite = _Text(row.rewrite or "(empty)", 14, STRIP, lines=2)
    top = caption.height + rewrite.height + GAP
    tile = Image.new("RGB", (STRIP, top + THUMB), "white")
    caption.draw(tile, (0, 0), FAINT)
    rewrite.draw(tile, (0, caption.height), INK)
    for i, image in enumerate(row.images[:5]):
        _draw_picture(tile, image, (i * (THUMB + GAP), top), framed=i == row.highlighted)
    return tile


def _draw_picture(
    tile: Image.Image, image: Image.Image, corner: tuple[int, int], framed: bool
) -> None:
    x, y = corner
    inner = THUMB - 12
    thumb = image.convert("RGB").resize((inner, inner), Image.Resampling.LANCZOS)
    tile.paste(thumb, (x + 6, y + 6))
    box = (x, y, x + THUMB - 1, y + THUMB - 1)
    draw = ImageDraw.Draw(tile)
    colour, line = (GREEN, 4) if framed else (RULE, 1)
    draw.rounded_rectangle(box, radius=6, outline=colour, width=line)


def _note_tile(note: str, width: int) -> Image.Image:
    text = _Text(note, 12, width, lines=6)
    tile = Image.new("RGB", (width, text.height), "white")
    text.draw(tile, (0, 0), FAINT)
    return tile


# Text in any script.


class _Text:
    """A text in at most `lines` lines of `width` pixels; a longer text ends with an ellipsis."""

    def __init__(self, text: str, size: int, width: int, lines: int, bold: bool = False):
        path, text = _drawable(" ".join(text.split()), bold)
        self.font = ImageFont.truetype(str(path), size)
        self.lines = _wrap(text, self.font, width, lines)
        self.step = round(1.35 * size)
        self.height = self.step * len(self.lines)

    def draw(self, tile: Image.Image, corner: tuple[int, int], colour: str) -> None:
        pen = ImageDraw.Draw(tile)
        # Left to right, so that quotation marks around right-to-left text stay in place.
        direction = "ltr" if features.check("raqm") else None
        for i, line in enumerate(self.lines):
            # Anchored at the baseline, because ascents differ between fonts.
            base = corner[1] + i * self.step + round(0.75 * self.step)
            pen.text(
                (corner[0], base),
                line,
                font=self.font,
                fill=colour,
                anchor="ls",
                direction=direction,
            )


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    broken: list[str] = []
    while font.getlength(text) > width:
        if len(broken) == lines - 1:
            text = text[: _fitting(text, font, width - font.getlength("…"))].rstrip() + "…"
            break
        fits = _fitting(text, font, width)
        space = text.rfind(" ", 0, fits + 1)
        cut = space if space > 0 else fits  # without spaces, as in Chinese, anywhere
        broken.append(text[:cut])
        text = text[cut:].lstrip()
    return [*broken, text]


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> int:
    """The number of characters that fit in `width` pixels, at least one."""
    count = 1
    while count < len(text) and font.getlength(text[: count + 1]) <= width:
        count += 1
    return count


def _drawable(text: str, bold: bool) -> tuple[Path, str]:
    """A font and the text that it can draw; a script without a font becomes its name."""
    needed = {c for c in text if unicodedata.category(c) not in ("Cf", "Cc", "Mn", "Zs")}
    default = _default_font(bold)
    if not features.check("raqm"):
        # Without raqm, Pillow would draw right-to-left scripts backwards and unjoined.
        backwards = {c for c in needed if unicodedata.bidirectional(c) in ("R", "AL")}
        return default, _named(text, (needed - _characters(default)) | backwards)
    if needed <= _characters(default):
        return default, text
    for font in _system_fonts():
        if needed <= _characters(font):
            return font, text
    return default, _named(text, needed - _characters(default))


def _named(text: str, missing: set[str]) -> str:
    """The text with runs of missing characters replaced: "[no hangul font]"."""
    out, inside = [], False
    for c in text:
        if c not in missing:
            out.append(c)
        elif not inside:
            out.append(f"[no {unicodedata.name(c, 'symbol').split()[0].lower()} font]")
        inside = c in missing
    return "".join(out)


def _default_font(bold: bool) -> Path:
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name


@functools.cache
def _system_fonts() -> tuple[Path, ...]:
    """Installed fonts; those that cover many scripts come first."""
    from matplotlib import font_manager

    known = ["notosanscjk", "sourcehansans", "hiragino", "pingfang", "yugoth", "msyh", "malgun"]
    known += ["wqy", "arialuni", "droidsansfallback", "notosans", "ipa", "nanum", "takao"]
    found = sorted(Path(path) for path in font_manager.findSystemFonts())
    names = [path.stem.lower().replace("-", "").replace("_", "") for path in found]
    first = [next((i for i, k in enumerate(known) if k in name), len(known)) for name in names]
    return tuple(path for _, path in sorted(zip(first, found, strict=True)))


@functools.cache
def _characters(font: Path) -> frozenset[str]:
    """The characters that a font can draw; none if it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(chr(point) for point in FT2Font(str(font)).get_charmap())
    except (RuntimeError, OSError, ValueError):
        return frozenset()
