"""Measures how the time of a GRPO step grows with prompt length and group size.

    python -m benchmarks.growth --config=configs/emoji_noisy.py --out=runs/growth \\
        --prompts=64,256,512,1024 --groups=2,4,8,16 --completion_tokens=16 --batch=2 --steps=4

Every pair of a prompt length and a group size is timed in one process, with prompts and completions
of exactly these lengths. The first step of each pair, which compiles, is left out. A line fitted to
the times of one group size gives the cost of a prompt token. If a prompt were computed once for
each completion, this cost would be proportional to the group size. It is computed once for the
group, so the cost grows only by the completions' attention to the prompt.

Writes growth.md, growth.json and growth.png to `--out`. The same command keeps finished
measurements; Ctrl-C writes tables of them.
"""

import io
import json
import shlex
import sys
import warnings
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from benchmarks import comparison, forced, task
from grape_jax.run import checks
from grape_jax.run.context import Context
from grape_jax.run.queries import batch_iterators
from grape_jax.runtime import command_line, files
from grape_jax.runtime.errors import UserError, exit_with_sentence

FLAGS = flags.FLAGS


def main() -> None:
    command_line.define_config()
    flags.DEFINE_string("out", None, "Where tables and the figure go.")
    flags.DEFINE_list("prompts", ["64", "256", "512", "1024"], "Lengths of the prompts, in tokens.")
    flags.DEFINE_list("groups", ["2", "4", "8", "16"], "Completions of each prompt.")
    flags.DEFINE_integer("completion_tokens", 16, "Length of every completion.")
    flags.DEFINE_integer("batch", 2, "Prompts a step.")
    flags.DEFINE_integer("steps", 4, "Steps of each pair, the first of which is not timed.")
    command_line.parse()
    if FLAGS.out is None:
        raise UserError("no directory is given: add --out=runs/growth.")
    prompts, groups = (_numbers(name) for name in ("prompts", "groups"))
    if FLAGS.steps < 2:
        raise UserError("--steps must be 2 or more: the first step of a pair is not timed.")
    config = FLAGS.config
    config.grpo.batch_size = FLAGS.batch
    config.prompt.max_tokens = max(prompts)
    config.rollout.max_tokens = FLAGS.completion_tokens
    checks.check(config)
    try:
        measure_all(config, Path(FLAGS.out), prompts, groups, FLAGS.completion_tokens, FLAGS.steps)
    except KeyboardInterrupt:
        print("stopped; the same command keeps what was measured.", file=sys.stderr)
        sys.exit(130)


def measure_all(
    config: ConfigDict,
    out: Path,
    prompts: list[int],
    groups: list[int],
    completion: int,
    steps: int,
) -> dict:
    """Measures the pairs that growth.json lacks; writes tables and figure after each."""
    out.mkdir(parents=True, exist_ok=True)
    settings = {"completion_tokens": completion, "steps": steps}
    settings |= {"config": json.loads(config.to_json_best_effort())}
    found = {"settings": settings, "points": []}
    if (out / "growth.json").exists():
        found = json.loads((out / "growth.json").read_text())
        if found["settings"] != settings:
            raise UserError(f"{out} holds other measurements: choose another --out.")
    # The policy generates past the end of a rewrite.
    warnings.filterwarnings("ignore", message="a text is longer than")
    known = {(point["prompt"], point["group"]) for point in found["points"]}
    missing = [(p, g) for g in groups for p in prompts if (p, g) not in known]
    run = forced.build(config) if missing else None
    for prompt, group in missing:
        seconds = measure(run, prompt, group, completion, steps)
        found["points"].append({"prompt": prompt, "group": group, "seconds": seconds})
        print(f"prompt {prompt}, group {group}: {np.median(seconds):.2f} s", flush=True)
        found["cost"] = prompt_cost(found["points"])
        files.replace(out / "growth.json", json.dumps(found, indent=1))
        files.replace(out / "growth.png", draw(found["points"]))
        files.replace(out / "growth.md", markdown(found))
    print(f"report: {out / 'growth.md'}")
    return found


def measure(run: Context, prompt: int, group: int, completion: int, steps: int) -> list[float]:
    """Seconds of each step after the first."""
    run = forced.of_shape(run, prompt, completion, group)
    batches = batch_iterators(run.config, run.queries)["grpo"]
    made = [task.lengthened(run, next(batches), prompt) for _ in range(steps)]
    return [line["seconds"] for line in forced.timed_steps(run, made)][1:]


def prompt_cost(points: list[dict]) -> list[dict]:
    """Fits a line to the median step times of each group size with several prompt lengths.

    Returns:
      Seconds per token of prompt length, of all prompts of a step together, and at length 0.
    """
    cost = []
    for group in sorted({point["group"] for point in points}):
        here = [point for point in points if point["group"] == group]
        lengths = [point["prompt"] for point in here]
        if len(set(lengths)) < 2:
            continue
        slope, rest = np.polyfit(lengths, [np.median(point["seconds"]) for point in here], 1)
        cost.append(
            {"group": group, "seconds_per_prompt_token": float(slope), "seconds_at_0": float(rest)}
        )
    return cost


def markdown(found: dict) -> str:
    """Tables of the times and of the fitted costs."""
    prompts = sorted({point["prompt"] for point in found["points"]})
    groups = sorted({point["group"] for point in found["points"]})
    seconds = {(p["prompt"], p["group"]): np.median(p["seconds"]) for p in found["points"]}
    cell = lambda key: f"{seconds[key]:.2f}" if key in seconds else ""
    times = [[str(g), *(cell((p, g)) for p in prompts)] for g in groups]
    first = found["cost"][0]["seconds_per_prompt_token"] if found["cost"] else None
    costs = [
        [
            str(line["group"]),
            f"{1e3 * line['seconds_per_prompt_token']:.2f}",
            f"{line['seconds_per_prompt_token'] / first:.2f}",
            f"{line['group'] / found['cost'][0]['group']:.0f}",
            f"{line['seconds_at_0']:.2f}",
        ]
        for line in found["cost"]
    ]
    about = {
        "command": f"`python -m benchmarks.growth {shlex.join(sys.argv[1:])}`",
        "a step": f"{found['settings']['config']['grpo']['batch_size']} prompts, completions of "
        f"{found['settings']['completion_tokens']} tokens",
    }
    parts = [
        "# Time of a GRPO step by prompt length and group size",
        "Median seconds per step; a column for each prompt length in tokens.",
        comparison.table(["group", *map(str, prompts)], times),
        "A line fitted to each row:",
        comparison.table(
            [
                *("group", "ms a token of length", "against the smallest group"),
                *("group against the smallest", "seconds at length 0"),
            ],
            costs,
        ),
        "![times](growth.png)",
        "\n".join(f"- {key}: {value}" for key, value in (about | comparison.machine()).items()),
    ]
    return "\n\n".join(parts) + "\n"


def draw(points: list[dict]) -> bytes:
    """Plots time by prompt length for each group size, and the reverse; returns a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), dpi=130, layout="constrained")
    axes = zip(figure.subplots(1, 2), (("prompt", "group"), ("group", "prompt")), strict=True)
    for axis, (along, line) in axes:
        for value in sorted({point[line] for point in points}):
            here = sorted((p[along], np.median(p["seconds"])) for p in points if p[line] == value)
            axis.plot(*zip(*here, strict=True), "o-", markersize=3, label=f"{line} {value}")
        axis.set_xlabel({"prompt": "prompt, tokens", "group": "completions a prompt"}[along])
        axis.set_ylabel("seconds a step")
        axis.set_ylim(bottom=0)
        axis.grid(color="#e6e6e6", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        # Above the axes, where it covers no line.
        axis.legend(
            frameon=False, fontsize=8, ncols=4, columnspacing=1,
            loc="lower left", bbox_to_anchor=(0, 1),
        )  # fmt: skip
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def _numbers(flag: str) -> list[int]:
    given = getattr(FLAGS, flag)
    if not given or not all(number.isdigit() and int(number) for number in given):
        raise UserError(f"--{flag} must be numbers from 1 with commas between them, such as 8,16.")
    return [int(number) for number in given]


if __name__ == "__main__":
    exit_with_sentence(main)
