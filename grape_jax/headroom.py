"""Says whether training a rewriter can help, in minutes and before any training.

    python -m grape_jax.headroom --config=configs/emoji.py --workdir=runs/headroom

Samples rewrites of training queries as the first GRPO steps would, and compares the best of each
group with what needs no policy. Prints a verdict and a table for each shift; writes them to
headroom.md, headroom.json and headroom.png in the workdir.
"""

import json
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from grape_jax.reporting import verdict
from grape_jax.run import checks, context
from grape_jax.run.headroom import measure
from grape_jax.runtime import compilation_cache, files, processes
from grape_jax.runtime.command_line import run_command
from grape_jax.runtime.errors import exit_with_sentence


def main() -> None:
    flags.DEFINE_integer("queries", 128, "At most so many of each shift.", lower_bound=1)
    run_command(report, "runs/headroom")


def report(config: ConfigDict, workdir: Path) -> None:
    """Measures every shift of a config, prints the verdicts, and writes three files."""
    checks.check(config)
    context.with_absolute_paths(config)
    compilation_cache.enable(config)
    processes.announce("preparing data, policy and retriever ...")
    run = context.build(config)
    measured = [measure(run, shift, flags.FLAGS.queries) for shift in config.shifts]
    if not processes.is_main():
        return
    workdir.mkdir(parents=True, exist_ok=True)
    found = list(map(verdict.numbers, measured))
    text = "\n".join(map(verdict.as_markdown, found))
    files.replace(workdir / "headroom.md", text)
    files.replace(workdir / "headroom.json", json.dumps(found, indent=1))
    verdict.write_figure(workdir / "headroom.png", found)
    print(text, end="")
    print(f"written to {workdir / 'headroom.md'}, .json and .png")


if __name__ == "__main__":
    exit_with_sentence(main)
