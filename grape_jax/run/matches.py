"""The matches of queries and of their rewrites, printed and drawn."""

from collections.abc import Sequence
from pathlib import Path

from grape_jax.data.pictures import Picture, open_picture
from grape_jax.reporting.contact_sheet import Row, contact_sheet
from grape_jax.run.rewriter import Rewriter


def show(
    rewriter: Rewriter,
    queries: list[str],
    shift: str | None,
    top: int,
    out: Path,
    images: Sequence[Picture] | None = None,
) -> None:
    """Prints each rewrite with its matches, and writes a contact sheet of both wordings.

    Args:
      top: number of matches of each text.
      images: the picture of each query, for composed queries.
    """
    rewrites = rewriter.rewrite(queries, shift, images)
    pictures = None if images is None else [open_picture(image) for image in images]
    gallery = rewriter.gallery()
    # One call: the pictures are embedded together.
    twice = None if pictures is None else [*pictures, *pictures]
    matches = rewriter.find([*queries, *rewrites], top, images=twice)
    drawn = gallery.corpus.texts is None
    rows = []
    for i, (query, rewrite) in enumerate(zip(queries, rewrites, strict=True)):
        picture = None if pictures is None else pictures[i]
        for caption, words, found in (
            ("as asked", query, matches[i]),
            ("rewritten", rewrite, matches[len(queries) + i]),
        ):
            if not drawn:
                break
            shown = [gallery.image(int(row)) for row in found]
            rows.append(Row(query, words, shown, None, caption, picture))
        print(f"{query!r} -> {rewrite!r}")
        for place, row in enumerate(matches[len(queries) + i], start=1):
            named = dict.fromkeys((gallery.corpus.names[row], gallery.corpus.ids[row]))
            print(f"  {place}. {'  '.join(named)}")
    if drawn:
        contact_sheet(rows, out)
        print(f"pictures: {out}")
