"""Figures of a report: training curves, and recall by language."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grape_jax.runtime import files

PHASE_COLOURS = {"warm-up": "#d98c21", "grpo": "#2a6fbb"}
PANELS = (
    ("recall_at_10", "Recall@10, %"),
    ("reward", "reward"),
    ("median_rank", "median rank"),
    ("kl", "KL to the reference policy"),
    ("entropy", "entropy"),
    ("length", "rewrite length, tokens"),
    ("loss", "loss of the warm-up"),
)
VALIDATION = "validation_recall_at_10"
# The methods in the figure by language; of rewrites only greedy ones.
LANGUAGE_COLOURS = {
    "raw query": "#888888",
    "untrained": "#c0392b",
    "warm-up": "#d98c21",
    "GRPO": "#2a6fbb",
    "reference text": "#1a8f3c",
}


def write_languages(path: Path, test_sets: Sequence[dict]) -> bool:
    """Writes a figure of Recall@10 with intervals for each language, one panel a test set.

    Args:
      path: the PNG file.
      test_sets: from `results.numbers_of`.

    Returns:
      False, and no file, if no test set has several languages.
    """
    from matplotlib.figure import Figure

    drawn = [test_set for test_set in test_sets if test_set["languages"]]
    if not drawn:
        return False
    most = max(len(test_set["languages"]) for test_set in drawn)
    size = (4.2 * len(drawn) + 1.2, 0.34 * most + 1.5)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    axes = figure.subplots(1, len(drawn), squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axis, test_set in zip(axes, drawn, strict=True):
        handles |= _draw_languages(axis, test_set)
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": 5}
    figure.legend(list(handles.values()), list(handles), frameon=False, fontsize=8, **place)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    files.replace(path, buffer.getvalue())
    return True


def _draw_languages(axis: Any, test_set: dict) -> dict[str, Any]:
    """Draws a panel, languages sorted by the last method; returns the handles for the legend."""
    kept = [
        (i, row["method"])
        for i, row in enumerate(test_set["languages"][0]["methods"])
        if row["method"] in LANGUAGE_COLOURS and row["decoding"] in ("", "greedy")
    ]
    rewritten = [i for i, name in kept if name != "reference text"]
    recall = lambda part, i: part["methods"][i]["recall_at_10"]
    parts = sorted(test_set["languages"], key=lambda part: recall(part, rewritten[-1])["mean"])
    y = np.arange(len(parts))
    handles = {}
    for place, (i, name) in enumerate(kept):
        mean, low, high = (
            100 * np.array([recall(part, i)[key] for part in parts])
            for key in ("mean", "low", "high")
        )
        # Shifted, so that intervals do not overlap.
        shifted = y + 0.13 * ((len(kept) - 1) / 2 - place)
        colour = LANGUAGE_COLOURS[name]
        axis.hlines(shifted, low, high, color=colour, linewidth=1.2, alpha=0.5)
        handles[name] = axis.plot(mean, shifted, "o", color=colour, markersize=4)[0]
    axis.set_yticks(y, [f"{part['language']} ({part['queries']})" for part in parts], fontsize=8)
    axis.set_ylim(-0.6, len(parts) - 0.4)
    axis.set_xlim(left=0)
    axis.set_xlabel("Recall@10, %, with its 95 % interval", fontsize=9)
    axis.set_title(f"{test_set['shift']}: {test_set['name']}", fontsize=10, loc="left")
    axis.tick_params(labelsize=8)
    axis.grid(axis="x", color="#e6e6e6", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return handles


def write_curves(path: Path, log: Sequence[dict]) -> bool:
    """Writes a figure of training curves, one panel a metric.

    Args:
      path: the PNG file.
      log: lines of metrics.jsonl.

    Returns:
      False, and no file, if the log has no metrics to draw.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    lines = _on_one_axis(log)
    panels = [(key, label) for key, label in PANELS if _has_points(lines, key)]
    if not panels:
        return False
    columns = min(4, len(panels) + 1)
    rows = math.ceil((len(panels) + 1) / columns)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(3.3 * columns, 2.5 * rows), dpi=130, layout=layout)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    for axis, (key, label) in zip(axes, panels, strict=False):
        _draw_panel(axis, lines, key, label)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.tick_params(labelbottom=True)
    for axis in axes[(rows - 1) * columns : len(panels)]:
        axis.set_xlabel("step", fontsize=9)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    axes[len(panels)].legend(*_legend_entries(lines), loc="center", frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    files.replace(path, buffer.getvalue())
    return True


def _on_one_axis(log: Sequence[dict]) -> list[dict]:
    """The lines in order, with an "x" that increases across phases that each count from 1."""
    latest = {}  # a resumed run repeats steps: the last line counts
    for line in log:
        if isinstance(line.get("step"), int | float):
            latest[line.get("phase", "grpo"), line["step"]] = line
    lines: list[dict] = []
    start, last, phase = 0, 0, None
    for (name, step), line in sorted(latest.items(), key=lambda e: (e[0][0] != "warm-up", e[0][1])):
        if phase not in (None, name) and step <= last:
            start = last
        phase, last = name, start + step
        lines.append({**line, "phase": name, "x": last})
    return lines


def _points_of(lines: list[dict], key: str, phase: str) -> tuple[np.ndarray, np.ndarray]:
    found = [
        (line["x"], line[key])
        for line in lines
        if line["phase"] == phase and isinstance(line.get(key), int | float)
    ]
    points = np.array(found, dtype=np.float64).reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    return points[:, 0], points[:, 1]


def _has_points(lines: list[dict], key: str) -> bool:
    # GRPO's loss does not show progress; only the loss of the warm-up is drawn.
    phases = ("warm-up",) if key == "loss" else PHASE_COLOURS
    keys = (key, VALIDATION) if key == "recall_at_10" else (key,)
    return any(len(_points_of(lines, k, phase)[0]) for k in keys for phase in phases)


def _draw_panel(axis: Any, lines: list[dict], key: str, label: str) -> None:
    from matplotlib.ticker import LogFormatter

    scale = 100 if key == "recall_at_10" else 1
    for phase, colour in PHASE_COLOURS.items():
        if key == "loss" and phase != "warm-up":
            continue
        x, y = _points_of(lines, key, phase)
        axis.plot(x, scale * y, color=colour, linewidth=0.7, alpha=0.35)
        axis.plot(x, scale * _running_mean(y), color=colour, linewidth=1.6)
        if key == "recall_at_10":
            x, y = _points_of(lines, VALIDATION, phase)
            style = {"markersize": 5, "markerfacecolor": "white", "markeredgewidth": 1.4}
            axis.plot(x, scale * y, "o", color=colour, **style)
    if key == "median_rank":
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(LogFormatter())
        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    _shade_warm_up(axis, lines)
    axis.set_title(label, fontsize=10, loc="left")
    axis.tick_params(labelsize=8, which="both")
    axis.grid(color="#e6e6e6", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _shade_warm_up(axis: Any, lines: list[dict]) -> None:
    steps = [line["x"] for line in lines if line["phase"] == "warm-up"]
    if steps:
        axis.axvspan(min(steps), max(steps), color=PHASE_COLOURS["warm-up"], alpha=0.08, lw=0)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """The mean over a window of about a tenth of the points, shorter at the ends."""
    half = len(values) // 20
    return np.array(
        [values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))], np.float64
    )


def _legend_entries(lines: list[dict]) -> tuple[list, list[str]]:
    from matplotlib.lines import Line2D

    handles, labels = [], []
    for phase, colour in PHASE_COLOURS.items():
        if any(line["phase"] == phase for line in lines):
            handles.append(Line2D([], [], color=colour, linewidth=1.6))
            labels.append(f"{'GRPO' if phase == 'grpo' else phase}, running mean")
    if any(len(_points_of(lines, VALIDATION, phase)[0]) for phase in PHASE_COLOURS):
        handles.append(
            Line2D([], [], linestyle="", marker="o", markerfacecolor="white", color="#444444")
        )
        labels.append("validation")
    handles.append(Line2D([], [], color="#888888", linewidth=0.7, alpha=0.6))
    labels.append("each step")
    return handles, labels
