"""Estimate of the time that training still takes, evaluations included.

Each kind of work (steps of a phase, validations, saves) has measurements of its own. A pause that
will not come again, such as the test after the warm-up, is in none of them.
"""

import statistics
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict
from tqdm import tqdm

RECENT = 10  # measurements that count; durations change as completions become shorter
VALIDATION, SAVING = "validation", "saving"


def work_left(config: ConfigDict, done: int) -> dict[str, int]:
    """Counts the work that follows step `done`, up to the end of its phase.

    GRPO steps are counted only once the warm-up is over: until then nothing is known about them.
    """
    warm_up, last = config.warm_up.steps, config.warm_up.steps + config.grpo.steps
    phase, end = ("warm-up", warm_up) if done < warm_up else ("grpo", last)
    steps = range(done + 1, end + 1)
    every = config.evaluation.every
    validated = {step for step in steps if every and step % every == 0}
    saved = {step for step in steps if step % config.checkpoint.every == 0 or step == last}
    return {phase: len(steps), VALIDATION: len(validated), SAVING: len(saved | validated)}


def typical(seconds: Sequence[float]) -> float:
    """Median of the recent measurements; the first, which compiles, is left out."""
    return statistics.median((list(seconds[1:]) or seconds)[-RECENT:])


def seconds_left(left: Mapping[str, int], measured: Mapping[str, Sequence[float]]) -> float:
    """Sum over the kinds of work of how often each is left times its typical duration.

    Args:
      left: from `work_left`.
      measured: seconds of each kind so far, in order; a kind without any counts as nothing.
    """
    return sum(count * typical(measured[kind]) for kind, count in left.items() if measured[kind])


def measured_in(log: Sequence[Mapping]) -> dict[str, list[float]]:
    """The measurements in the lines of metrics.jsonl, with which a resumed run starts."""
    measured: dict[str, list[float]] = {"warm-up": [], "grpo": [], VALIDATION: [], SAVING: []}
    for line in log:
        measured[line["phase"]].append(line["seconds"])
        if "validation_seconds" in line:
            measured[VALIDATION].append(line["validation_seconds"])
    return measured


def text(
    left: Mapping[str, int],
    measured: Mapping[str, Sequence[float]],
    test_seconds: float | None = None,
) -> str:
    """The estimate for the terminal; "" before the second step of a phase.

    Args:
      test_seconds: of the test that follows the last phase; None: unknown.
    """
    phase = next(iter(left))
    if len(measured[phase]) < 2:
        return ""
    # Validations can take as long as the steps: without one the sum is a lower bound.
    bound = "at least " if left[VALIDATION] and not measured[VALIDATION] else ""
    of = " of the warm-up" if phase == "warm-up" else ""
    test = ""
    if test_seconds and phase != "warm-up":
        test = f", then {tqdm.format_interval(test_seconds)} of tests"
    return f"{bound}{tqdm.format_interval(seconds_left(left, measured))}{of} left{test}"
