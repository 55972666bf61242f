"""Makes a run's report again, with more methods if asked, or evaluates a policy without training.

    python -m grape_jax.evaluate --workdir=runs/emoji --methods=all
    python -m grape_jax.evaluate --config=configs/emoji.py --workdir=runs/untrained
    python -m grape_jax.evaluate --compare runs/seed0 runs/seed1 --output=seeds.md

What is on disk is kept; only what is missing is written. --compare sets reports of several runs
side by side; it prints a table, and writes nothing without --output.
"""

import json

from absl import flags

from grape_jax.reporting import comparison
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
    flags.DEFINE_bool("compare", False, "Compare the runs that are given as arguments.")
    flags.DEFINE_string("output", None, "With --compare: a file, FILE.json or Markdown.")
    runs = command_line.parse(config_needed=False, with_arguments=True)
    if flags.FLAGS.compare:
        if flags.FLAGS.workdir is not None or flags.FLAGS.config is not None:
            raise UserError("--compare takes runs as arguments, without --workdir and --config.")
        compare(runs, flags.FLAGS.output)
        return
    if runs:
        raise UserError(f"unexpected argument {runs[0]!r}: to set runs side by side add --compare.")
    if flags.FLAGS.workdir is None:
        raise UserError("no workdir is given: add --workdir=runs/emoji.")
    methods = flags.FLAGS.methods
    if methods is not None:
        methods = EXTRAS if methods == ["all"] else tuple(methods)
    command_line.quiet()
    with interruptible():
        evaluate(flags.FLAGS.config, files.path(flags.FLAGS.workdir), methods)


def compare(runs: list[str], output: str | None) -> None:
    found = comparison.compare(comparison.read(runs))
    text = comparison.as_markdown(found)
    print(text, end="")
    if output is not None:
        as_json = json.dumps(found, indent=1, ensure_ascii=False)
        files.replace(output, as_json if output.endswith(".json") else text)


if __name__ == "__main__":
    exit_with_sentence(main)
