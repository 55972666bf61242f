"""Times GRPO steps of grape_jax with prompts and completions of given lengths.

    python -m benchmarks.forced TASK OUT

A child process of `benchmarks.compare`; `benchmarks.growth` uses its functions.
"""

import dataclasses
import itertools
import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from benchmarks import memory
from grape_jax.rl.learner import start_grpo
from grape_jax.run import context, steps
from grape_jax.run.context import Context
from grape_jax.runtime.errors import exit_with_sentence

LOGGED = ("reward", "kl", "loss", "grad_norm", "length")


def build(config: ConfigDict) -> Context:
    """A run whose policy generates up to its token budget."""
    return without_stops(context.build(config))


def without_stops(run: Context) -> Context:
    return dataclasses.replace(run, policy=dataclasses.replace(run.policy, stop_ids=()))


def of_shape(run: Context, prompt_tokens: int, completion_tokens: int, group_size: int) -> Context:
    """The run with other lengths; its prompts must have exactly `prompt_tokens` tokens."""
    config = ConfigDict(run.config.to_dict())
    config.prompt.max_tokens = prompt_tokens
    config.rollout.max_tokens = completion_tokens
    config.grpo.group_size = group_size
    prompts = {
        shift: dataclasses.replace(prompt, max_tokens=prompt_tokens)
        for shift, prompt in run.policy.prompts.items()
    }
    policy = dataclasses.replace(run.policy, prompts=prompts, buckets=())
    return dataclasses.replace(run, config=config, policy=policy)


def timed_steps(run: Context, batches: list) -> Iterator[dict]:
    """Runs one GRPO step for each batch of (shift, query).

    Yields:
      The number of the step, from 1; its seconds, peak memory, and some of its metrics.
    """
    state = start_grpo(run.learner("grpo"), run.initial_state("grpo"))
    for step, batch in enumerate(batches):
        memory.forget_peak()
        began = time.perf_counter()
        state, metrics, _ = steps.grpo_update(run, state, itertools.repeat(batch), step)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - began
        if metrics["length"] != run.config.rollout.max_tokens:
            raise RuntimeError(f"completions of {metrics['length']} tokens: some ended early")
        line = {"step": step + 1, "seconds": seconds, "peak_bytes": memory.peak_bytes()}
        yield line | {name: metrics[name] for name in LOGGED if name in metrics}


def main() -> None:
    task, out = (Path(argument) for argument in sys.argv[1:])
    # The policy generates past the end of a rewrite.
    warnings.filterwarnings("ignore", message="a text is longer than")
    out.mkdir(parents=True, exist_ok=True)
    run = build(ConfigDict(json.loads((task / "config.json").read_text())))
    like = run.queries.split(run.config.shifts[0], "train", 1)[0]
    batches = [
        [
            (row["shift"], dataclasses.replace(like, text=row["query"], targets=(row["target"],)))
            for row in json.loads(line)
        ]
        for line in (task / "batches.jsonl").read_text().splitlines()
    ]
    try:
        with (out / "steps.jsonl").open("w") as file:
            for line in timed_steps(run, batches):
                print(
                    f"grape_jax: step {line['step']} of {len(batches)}, {line['seconds']:.1f} s",
                    flush=True,
                )
                file.write(json.dumps(line) + "\n")
                file.flush()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    exit_with_sentence(main)
