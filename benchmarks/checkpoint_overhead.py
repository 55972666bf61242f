"""Measures the cost of checkpoints, as a share of the step time, at one in ten steps.

    python benchmarks/checkpoint_overhead.py --config=configs/emoji_noisy.py --workdir=runs/overhead

Runs GRPO steps of a config as the training loop does, and saves after every tenth. The cost of a
checkpoint is the time that the loop waits for it, plus the slowdown of the steps during which it is
written in the background. Prints one line of JSON.
"""

import json
import statistics
import sys
import time
from pathlib import Path

from absl import flags

from grape_jax.run import context, steps
from grape_jax.run.queries import batch_iterators
from grape_jax.runtime import checkpoint, command_line
from grape_jax.runtime.errors import exit_with_sentence

EVERY, SAVES = 10, 4


def main() -> None:
    command_line.define_config()
    flags.DEFINE_string("workdir", "runs/overhead", "Where the checkpoints go.")
    command_line.parse(sys.argv)
    run = context.build(flags.FLAGS.config)
    workdir = Path(flags.FLAGS.workdir)
    state, batches = run.initial_state("grpo"), batch_iterators(run.config, run.queries)["grpo"]
    about, waits, after, others, bytes_written = run.about(), [], [], [], 0
    with checkpoint.open_manager(workdir, keep=1) as manager:
        for step in range(EVERY * SAVES + 2):
            began = time.perf_counter()
            state, _, _ = steps.grpo_update(run, state, batches, step)
            seconds = time.perf_counter() - began
            if step < 2:  # compiles
                continue
            # The write goes on in the step after a save, and it may take longer than one.
            (after if waits and step % EVERY in (2, 3) else others).append(seconds)
            if step % EVERY == 1:
                began = time.perf_counter()
                saved = {"positions": {"grpo": batches.get_state()}, "about": about}
                checkpoint.save(manager, step, state, saved, {})
                waits.append(time.perf_counter() - began)
        checkpoint.wait(manager)
        newest = Path(manager.directory) / str(manager.latest_step())
        bytes_written = sum(p.stat().st_size for p in newest.rglob("*") if p.is_file())
    usual = statistics.median(others)
    slower = 2 * max(0.0, statistics.median(after) - usual)
    print(
        json.dumps(
            {
                "step_seconds": round(usual, 3),
                "wait_seconds": round(statistics.median(waits), 3),
                "slower_seconds": round(slower, 3),
                "checkpoint_bytes": bytes_written,
                "share": round((statistics.median(waits) + slower) / (EVERY * usual), 4),
            }
        )
    )


if __name__ == "__main__":
    exit_with_sentence(main)
