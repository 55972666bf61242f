"""Makes a run's report again, with more methods if asked, or evaluates a policy without training.

    python -m grape_jax.evaluate --workdir=runs/emoji --methods=all
    python -m grape_jax.evaluate --config=configs/emoji.py --workdir=runs/untrained

What is on disk is kept; only what is missing is written.
"""

from absl import flags

from grape_jax.reporting.results import EXTRAS
from grape_jax.run.reevaluation import evaluate
from grape_jax.runtime import command_line, files
from grape_jax.runtime.errors import UserError, exit_with_sentence
from grape_jax.runtime.shutdown import interruptible


def main() -> None:
    command_line.define_config()
    flags.DEFINE_string("workdir", None, "The run, or where to keep an evaluation without one.")
    flags.DEFINE_list(
        "methods", None, f"Instead of evaluation.methods: all, or some of {', '.join(EXTRAS)}."
    )
    command_line.parse(config_needed=False)
    if flags.FLAGS.workdir is None:
        raise UserError("no workdir is given: add --workdir=runs/emoji.")
    methods = flags.FLAGS.methods
    if methods is not None:
        methods = EXTRAS if methods == ["all"] else tuple(methods)
    command_line.quiet()
    with interruptible():
        evaluate(flags.FLAGS.config, files.path(flags.FLAGS.workdir), methods)


if __name__ == "__main__":
    exit_with_sentence(main)
