"""Rewrites queries with a trained run and shows the best matches.

python -m grape_jax.rewrite --workdir=runs/emoji "smilign fcae" "rde aple" --top=5
"""

from pathlib import Path

from absl import flags

from grape_jax.reporting.contact_sheet import Row, contact_sheet
from grape_jax.run.rewriter import Rewriter
from grape_jax.runtime import command_line, files
from grape_jax.runtime.errors import UserError, exit_with_sentence


def main() -> None:
    flags.DEFINE_string("workdir", None, "The run.")
    flags.DEFINE_integer("top", 5, "How many matches to show.", lower_bound=1)
    flags.DEFINE_string("shift", None, "Which of the run's prompts to use; none: its first.")
    flags.DEFINE_string("out", None, "The contact sheet; none: matches.png in the workdir.")
    queries = command_line.parse()
    if flags.FLAGS.workdir is None:
        raise UserError("no workdir is given: add --workdir=runs/emoji.")
    if not queries:
        raise UserError('no query is given: add one in quotes, such as "smilign fcae".')
    workdir = files.path(flags.FLAGS.workdir)
    out = files.path(flags.FLAGS.out or workdir / "matches.png")
    show(Rewriter.load(workdir), queries, flags.FLAGS.shift, flags.FLAGS.top, out)


def show(rewriter: Rewriter, queries: list[str], shift: str | None, top: int, out: Path) -> None:
    """Prints each rewrite and its matches, and writes the contact sheet of both wordings."""
    rewrites = rewriter.rewrite(queries, shift)
    gallery = rewriter.job.gallery("train")
    rows = []
    for query, rewrite in zip(queries, rewrites, strict=True):
        for caption, words in (("as asked", query), ("rewritten", rewrite)):
            found = rewriter.find([words], top)[0]
            images = [gallery.image(int(row)) for row in found]
            rows.append(Row(query, words, images, None, caption))
        print(f"{query!r} -> {rewrite!r}")
        for place, row in enumerate(found, start=1):
            named = dict.fromkeys((gallery.corpus.names[row], gallery.corpus.ids[row]))
            print(f"  {place}. {'  '.join(named)}")
    contact_sheet(rows, out)
    print(f"pictures: {out}")


if __name__ == "__main__":
    exit_with_sentence(main)
