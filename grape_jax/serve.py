"""Serves a trained run over HTTP, with a page to try it.

    python -m grape_jax.serve --workdir=runs/emoji --port=8000
    python -m grape_jax.serve --workdir=runs/emoji --gallery=pictures/

The page is at http://127.0.0.1:8000, the interface is described at /docs.
"""

from typing import Any

from absl import flags

from grape_jax.run.rewriter import Rewriter
from grape_jax.runtime import command_line, files
from grape_jax.runtime.errors import UserError, exit_with_sentence


def main() -> None:
    flags.DEFINE_string("workdir", None, "The run.")
    flags.DEFINE_string("host", "127.0.0.1", "The address to listen on; 0.0.0.0: all networks.")
    flags.DEFINE_integer("port", 8000, "The port; 0: a free one.", lower_bound=0, upper_bound=65535)
    flags.DEFINE_string(
        "gallery", None, "A directory of pictures or embeddings to search; none: the run's own."
    )
    flags.DEFINE_string("split", "train", "The split whose gallery is searched.")
    flags.DEFINE_integer("batch", 32, "Queries rewritten together at most.", lower_bound=1)
    flags.DEFINE_integer("queue", 128, "Queries that may wait; others get 503.", lower_bound=1)
    flags.DEFINE_integer("cache", 10_000, "Rewrites kept.", lower_bound=1)
    flags.DEFINE_float("rewrite_timeout", 10.0, "Seconds; then the query itself is searched.")
    flags.DEFINE_float("request_timeout", 30.0, "Seconds for a whole request.")
    command_line.parse()
    try:
        from grape_jax.serving import app, galleries, server
        from grape_jax.serving.engine import Engine
        from grape_jax.serving.limits import Limits
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing: pip install 'grape_jax[serve]'.") from error
    given = flags.FLAGS
    if given.workdir is None:
        raise UserError("no workdir is given: add --workdir=runs/emoji.")
    names = ("batch", "queue", "cache", "rewrite_timeout", "request_timeout")
    bounds: dict[str, Any] = {name: given[name].value for name in names}
    limits = Limits(**bounds)
    command_line.quiet()
    with server.ended_by_signals():
        port = server.reserve(given.host, given.port)
        rewriter = Rewriter.load(files.path(given.workdir))
        gallery = galleries.open_gallery(rewriter, given.gallery, given.split)
        engine = Engine.of(rewriter, gallery, limits.batch)
        engine.warm()
        own = given.gallery is None
        examples = galleries.examples(rewriter, gallery, given.split) if own else []
        server.run(app.make(engine, limits, examples), port, limits)


if __name__ == "__main__":
    exit_with_sentence(main)
