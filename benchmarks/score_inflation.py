"""Compares a rank reward with a similarity reward, which inflates scores.

    python -m benchmarks.score_inflation --config=configs/score_inflation.py \
        --workdir=runs/score_inflation

Two runs differ only in the reward: the configured one, and the similarity to the target. Seed and
settings are the same, so the warm-ups have the same bits. The same command resumes where it was
stopped.
"""

import io
import json
from pathlib import Path

from ml_collections import ConfigDict

from grape_jax.run.loop import train
from grape_jax.runtime import files, processes
from grape_jax.runtime.command_line import run_command
from grape_jax.runtime.errors import UserError, exit_with_sentence

BASELINE = "similarity"
CURVES = {  # of metrics.jsonl: on held-out queries, greedy
    "validation_target_similarity": "similarity to the target",
    "validation_rest_similarity": "mean similarity to the rest of the corpus",
    "validation_recall_at_10": "Recall@10",
}
COLOURS = ("#2a6fbb", "#c0392b")


def compare(config: ConfigDict, workdir: Path) -> None:
    """Trains with both rewards, then writes score_inflation.md and score_inflation.png.

    Raises:
      UserError: the configured reward is the similarity itself, or there is no validation.
      Interrupted: stopped on request; everything is saved.
    """
    if config.grpo.reward_shape == BASELINE:
        raise UserError("grpo.reward_shape is the baseline itself: choose another, such as linear.")
    if not config.evaluation.every or config.warm_up.steps % config.evaluation.every:
        raise UserError(
            "evaluation.every must divide warm_up.steps: the start of both runs is a point of the "
            "curves."
        )
    curves = {}
    for shape in (config.grpo.reward_shape, BASELINE):
        one = ConfigDict(config.to_dict())
        one.grpo.reward_shape = shape
        train(one, workdir / shape)
        if processes.is_main():
            curves[shape] = read_curve(workdir / shape, config.warm_up.steps)
    if not processes.is_main():
        return
    files.replace(workdir / "score_inflation.png", draw(curves))
    files.replace(workdir / "score_inflation.md", table(curves).encode())
    print(f"table: {workdir / 'score_inflation.md'}")


def read_curve(run: Path, warm_up_steps: int) -> list[dict]:
    """The validation metrics from the end of the warm-up, which is GRPO step 0."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {"step": line["step"] - warm_up_steps} | {key: line[key] for key in CURVES}
        for line in lines
        if line["step"] >= warm_up_steps and all(key in line for key in CURVES)
    ]


def table(curves: dict[str, list[dict]]) -> str:
    """A Markdown table of the validation metrics of both runs."""
    head = ["reward", "GRPO step", *CURVES.values()]
    rows = [
        [shape, str(point["step"]), *(f"{point[key]:.3f}" for key in CURVES)]
        for shape, points in curves.items()
        for point in points
    ]
    rule = ["---", *["---:"] * (len(head) - 1)]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]
    title = "# Similarity against rank as the reward"
    note = "Greedy rewrites of held-out queries; both runs start from the same warm-up (step 0)."
    return "\n\n".join([title, note, "\n".join(lines), "![curves](score_inflation.png)"]) + "\n"


def draw(curves: dict[str, list[dict]]) -> bytes:
    """Plots a panel for each metric with a line for each reward; returns a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), dpi=130, layout="constrained")
    for axis, (key, label) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        for (shape, points), colour in zip(curves.items(), COLOURS, strict=True):
            x, y = ([point[name] for point in points] for name in ("step", key))
            axis.plot(x, y, "o-", color=colour, markersize=3, label=f"reward: {shape}")
        axis.set_title(label, fontsize=10, loc="left")
        axis.set_xlabel("GRPO step", fontsize=9)
        axis.grid(color="#e6e6e6", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def main() -> None:
    run_command(compare, "runs/score_inflation")


if __name__ == "__main__":
    exit_with_sentence(main)
