"""Rewrites queries with a trained run and shows the best matches.

python -m grape_jax.rewrite --workdir=runs/emoji --image=apple.png "make it green" --top=5
python -m grape_jax.rewrite --workdir=runs/emoji "smilign fcae" "rde aple"
"""

from pathlib import Path

from absl import flags

from grape_jax.data.pictures import open_picture
from grape_jax.run.matches import show
from grape_jax.run.rewriter import Rewriter
from grape_jax.runtime import command_line, files
from grape_jax.runtime.errors import UserError, exit_with_sentence


def main() -> None:
    flags.DEFINE_string("workdir", None, "The run.")
    flags.DEFINE_integer("top", 5, "How many matches to show.", lower_bound=1)
    flags.DEFINE_string(
        "shift",
        None,
        "Which of the run's prompts to use; none: the first that suits the presence of --image.",
    )
    flags.DEFINE_multi_string(
        "image",
        [],
        "For composed queries, the picture that they change: once for all queries, or once for "
        "each, in their order.",
    )
    flags.DEFINE_string("out", None, "The contact sheet; none: matches.png in the workdir.")
    queries = command_line.parse()
    if flags.FLAGS.workdir is None:
        raise UserError("no workdir is given: add --workdir=runs/emoji.")
    if not queries:
        raise UserError('no query is given: add one in quotes, such as "make it green".')
    command_line.quiet()
    workdir = files.path(flags.FLAGS.workdir)
    out = files.path(flags.FLAGS.out or workdir / "matches.png")
    images = flags.FLAGS.image
    if len(images) not in (0, 1, len(queries)):
        raise UserError(
            f"{len(images)} images are given for {len(queries)} queries: repeat --image=FILE for "
            "each query, or give one for all."
        )
    # Opened first: a mistake is told before the models are loaded.
    images = [open_picture(Path(path).expanduser()) for path in images] or None
    if images is not None and len(images) == 1:
        images *= len(queries)
    show(Rewriter.load(workdir), queries, flags.FLAGS.shift, flags.FLAGS.top, out, images)


if __name__ == "__main__":
    exit_with_sentence(main)
