"""Trains a query rewriter: warm-up, GRPO, evaluation before and after, report.

    python -m grape_jax.train --config=configs/emoji.py --workdir=runs/emoji

The same command resumes an interrupted run. On several machines, run it once on each with
--coordinator, --process_id and --process_count; on a TPU pod or under SLURM without them.
"""

from grape_jax.run.loop import train
from grape_jax.runtime.command_line import run_command
from grape_jax.runtime.errors import exit_with_sentence


def main() -> None:
    run_command(train, "runs/emoji")


if __name__ == "__main__":
    exit_with_sentence(main)
