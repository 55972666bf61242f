"""Figures of a report: training curves, and recall by language or kind, as PNG files and SVG."""

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grape_jax.runtime import files

PHASE_COLOURS = {"warm-up": "#d98c21", "grpo": "#2a6fbb"}
PANELS = (
    ("recall_at_1", "Recall@1, %"),
    ("recall_at_10", "Recall@10, %"),
    ("reward", "reward"),
    ("median_rank", "median rank"),
    ("kl", "KL to the reference policy"),
    ("entropy", "entropy"),
    ("length", "rewrite length, tokens"),
    ("loss", "loss of the warm-up"),
)
RECALLS = ("recall_at_1", "recall_at_10")  # in per cent, with points of the validation
SVG_POINTS = 400  # of a curve in a page; longer ones are thinned out
# The methods in the figure by language or kind; of rewrites only greedy ones.
METHOD_COLOURS = {
    "raw query": "#888888",
    "picture + edit": "#8e6bb5",
    "caption + edit": "#16a39a",
    "untrained": "#c0392b",
    "warm-up": "#d98c21",
    "GRPO": "#2a6fbb",
    "reference text": "#1a8f3c",
}


def write_languages(path: Path, test_sets: Sequence[dict]) -> bool:
    """Writes a figure of recall with intervals for each language, one panel a test set.

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
        handles |= _draw_parts(axis, test_set, "language", "languages")
        axis.set_title(f"{test_set['shift']}: {test_set['name']}", fontsize=10, loc="left")
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": 5}
    figure.legend(list(handles.values()), list(handles), frameon=False, fontsize=8, **place)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    files.replace(path, buffer.getvalue())
    return True


def parts_svg(test_set: dict, key: str, parts: str) -> str:
    """A figure of recall with intervals for each part of a test set, as an `<svg>` element.

    Args:
      test_set: from `results.numbers_of`.
      key: the name of a part's name, such as "language".
      parts: the name of the list of parts, such as "languages"; it may not be empty.
    """
    from matplotlib.figure import Figure

    height = 0.4 * len(test_set[parts]) + 1.3
    figure = Figure(figsize=(4.6, height), layout="constrained")
    handles = _draw_parts(figure.subplots(), test_set, key, parts)
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": 3}
    figure.legend(list(handles.values()), list(handles), frameon=False, fontsize=8, **place)
    return _svg(figure)


def _draw_parts(axis: Any, test_set: dict, key: str, parts: str) -> dict[str, Any]:
    """Draws a panel, parts sorted by the last method; returns the handles for the legend."""
    measure = test_set["measure"]
    kept = [
        (i, row["method"])
        for i, row in enumerate(test_set[parts][0]["methods"])
        if row["method"] in METHOD_COLOURS and row["decoding"] in ("", "greedy")
    ]
    rewritten = [i for i, name in kept if name != "reference text"]
    recall = lambda part, i: part["methods"][i][measure]
    found = sorted(test_set[parts], key=lambda part: recall(part, rewritten[-1])["mean"])
    y = np.arange(len(found))
    handles = {}
    for place, (i, name) in enumerate(kept):
        mean, low, high = (
            100 * np.array([recall(part, i)[key] for part in found])
            for key in ("mean", "low", "high")
        )
        # Shifted, so that intervals do not overlap.
        shifted = y + 0.13 * ((len(kept) - 1) / 2 - place)
        colour = METHOD_COLOURS[name]
        axis.hlines(shifted, low, high, color=colour, linewidth=1.2, alpha=0.5)
        handles[name] = axis.plot(mean, shifted, "o", color=colour, markersize=4)[0]
    names = [f"{part[key]} ({part['queries']})" for part in found]
    axis.set_yticks(y, names, fontsize=8, parse_math=False)
    axis.set_ylim(-0.6, len(found) - 0.4)
    axis.set_xlim(left=0)
    named = measure.replace("recall_at_", "Recall@")
    axis.set_xlabel(f"{named}, %, with its 95 % interval", fontsize=9)
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


def curve_svgs(log: Sequence[dict]) -> list[tuple[str, str]]:
    """Training curves as `<svg>` elements, each with the name of its metric; none without points.

    Args:
      log: lines of metrics.jsonl.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    lines = _on_one_axis(log)
    drawn = []
    for key, label in PANELS:
        if _has_points(lines, key):
            figure = Figure(figsize=(3.4, 2.4), layout="constrained")
            axis = figure.subplots()
            _draw_panel(axis, lines, key, "", SVG_POINTS)
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.set_xlabel("step", fontsize=8)
            drawn.append((label, _svg(figure)))
    return drawn


def _svg(figure: Any) -> str:
    """A figure as an `<svg>` element for a page, with its texts as text."""
    import matplotlib

    buffer = io.StringIO()
    # The salt of ids is constant, so that a page is the same when it is made again.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "grape_jax"}):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    text = buffer.getvalue()
    element = text[text.index("<svg") :]
    # The page gives the size, and names what the figure shows.
    return re.sub(r' (width|height)="[\d.]+pt"', "", element, count=2)


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
    keys = (key, _validation(key)) if key in RECALLS else (key,)
    return any(len(_points_of(lines, k, phase)[0]) for k in keys for phase in phases)


def _validation(key: str) -> str:
    return f"validation_{key}"


def _draw_panel(axis: Any, lines: list[dict], key: str, label: str, most: int = 0) -> None:
    """Draws a metric; with `most`, at most about so many points of a phase."""
    from matplotlib.ticker import LogFormatter

    scale = 100 if key in RECALLS else 1
    for phase, colour in PHASE_COLOURS.items():
        if key == "loss" and phase != "warm-up":
            continue
        x, y = _points_of(lines, key, phase)
        kept = slice(None, None, math.ceil(len(x) / most) or 1 if most else 1)
        axis.plot(x[kept], scale * y[kept], color=colour, linewidth=0.7, alpha=0.35)
        axis.plot(x[kept], scale * _running_mean(y)[kept], color=colour, linewidth=1.6)
        if key in RECALLS:
            x, y = _points_of(lines, _validation(key), phase)
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
    validated = [_validation(key) for key in RECALLS]
    if any(len(_points_of(lines, key, phase)[0]) for key in validated for phase in PHASE_COLOURS):
        handles.append(
            Line2D([], [], linestyle="", marker="o", markerfacecolor="white", color="#444444")
        )
        labels.append("validation")
    handles.append(Line2D([], [], color="#888888", linewidth=0.7, alpha=0.6))
    labels.append("each step")
    return handles, labels
