"""Makes a run's report again from what it left on disk.

python -m grape_jax.evaluate --workdir=runs/emoji
"""

from absl import flags

from grape_jax import checkpoint, command_line, evaluation, files, job
from grape_jax.errors import UserError, exit_with_sentence


def main() -> None:
    flags.DEFINE_string("workdir", None, "The run.")
    command_line.parse()
    if flags.FLAGS.workdir is None:
        raise UserError("no workdir is given: add --workdir=runs/emoji.")
    workdir = files.path(flags.FLAGS.workdir)
    run = job.build_again(checkpoint.read_config(workdir))
    evaluation.write_report(run, workdir)


if __name__ == "__main__":
    exit_with_sentence(main)
