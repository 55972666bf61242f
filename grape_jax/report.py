"""What a run says for itself: numbers, tables, curves and pictures, from ranks alone.

`write` leaves four files in a run's directory: `report.json` (every number), `report.md`,
`curves.png` and `before_after.png`.
"""

import dataclasses
import io
import json
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from grape_jax import files, metrics
from grape_jax.contact_sheet import Row, contact_sheet

# The order of the rows, and what each one means to someone who sees the table for the first time.
METHODS = {
    "raw query": "the query as the user wrote it",
    "untrained": "rewritten by the language model as it comes",
    "warm-up": "rewritten after supervised fine-tuning, before GRPO",
    "GRPO": "rewritten after GRPO",
    "constant caption": "one and the same text for every query, which still scores some hits",
    "English name": "the right picture's own name, an oracle that shows what the retriever can do",
}
PAIRS = (
    ("GRPO", "untrained"),
    ("GRPO", "raw query"),
    ("GRPO", "warm-up"),
    ("warm-up", "untrained"),
    ("untrained", "raw query"),
)
DECODINGS = ("greedy", "sampled")
SHIFTS = {
    "noisy": "queries with typing errors",
    "long": "long descriptions",
    "languages": "queries in other languages",
}
EXAMPLES = 12  # queries in the before-and-after picture
EXAMPLE_SEED = 0


@dataclasses.dataclass(frozen=True)
class Answers:
    """One method's answers on one test set, in the order of its queries."""

    method: str  # one of METHODS
    decoding: str  # "" (nothing decoded), "greedy" or "sampled"
    texts: tuple[str, ...]  # [n], what was searched with
    ranks: np.ndarray  # int [n], rank of the right picture, 1 is best
    nearest: np.ndarray  # int [n, 5], corpus rows of the five nearest pictures, best first

    @property
    def label(self) -> str:
        return f"{self.method}, {self.decoding}" if self.decoding else self.method


@dataclasses.dataclass(frozen=True)
class TestSet:
    """Queries and every method's answers to them."""

    name: str  # "unseen concepts" or "seen concepts, unseen wording"
    shift: str  # "noisy", "long" or "languages"
    queries: Sequence[Any]  # each with .id .text .language .concept .target .reference
    answers: tuple[Answers, ...]

    @property
    def concepts(self) -> np.ndarray:
        """str [n], the bootstrap's cluster of each query."""
        return np.array([str(query.concept) for query in self.queries])

    def find(self, method: str, decoding: str = "") -> Answers | None:
        """A method's answers; one that decodes nothing is found whatever the decoding."""
        for answers in self.answers:
            if answers.method == method and answers.decoding in ("", decoding):
                return answers
        return None


def write(
    workdir: str | Path,
    test_sets: Sequence[TestSet],
    log: Sequence[dict],
    corpus_images: Callable[[int], Image.Image],
    about: dict[str, Any],
) -> dict:
    """Writes report.json, report.md, curves.png and before_after.png, each in one move.

    A picture that would be empty (no log lines, or one method only) is not written.

    Args:
      workdir: the run's directory.
      test_sets: one for each name and shift; those named as the first are the main ones, which
        the headline and the examples are about.
      log: the lines of metrics.jsonl; unknown, missing and null entries are passed over.
      corpus_images: gives the picture of a corpus row.
      about: what made these numbers, printed at the end; its entry "command", if any, is shown as
        the command that makes the report again.

    Returns:
      The content of report.json. Recall is a share, 0 to 1; an interval is mean, low, high.

    Raises:
      UserError: a test set is empty, or a method answers another number of queries.
    """
    workdir = files.path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    numbers = {"test_sets": [_numbers(test_set) for test_set in test_sets], "about": about}
    main = [test_set for test_set in test_sets if test_set.name == test_sets[0].name]
    drawn = [_examples(test_set, max(4, EXAMPLES // len(main))) for test_set in main]
    examples = [example for example in drawn if example is not None]
    has_curves = _write_curves(workdir / "curves.png", log)
    if examples:
        _write_before_after(workdir / "before_after.png", examples, corpus_images)
    text = _markdown(workdir, numbers, examples, has_curves)
    files.replace(workdir / "report.md", text.encode(errors="replace"))
    as_json = json.dumps(numbers, indent=1, ensure_ascii=False, default=_plain)
    files.replace(workdir / "report.json", as_json.encode(errors="replace"))
    return numbers


# Numbers.


def _numbers(test_set: TestSet) -> dict:
    return {
        "name": test_set.name,
        "shift": test_set.shift,
        "queries": len(test_set.queries),
        "concepts": len(set(test_set.concepts)),
        "methods": [_scores(answers, test_set.concepts) for answers in _in_order(test_set)],
        "differences": _differences(test_set),
        "languages": _by_language(test_set),
        "answers": [_record(test_set, index) for index in range(len(test_set.queries))],
    }


def _in_order(test_set: TestSet) -> list[Answers]:
    order = {method: i for i, method in enumerate(METHODS)}
    return sorted(test_set.answers, key=lambda a: (order.get(a.method, len(order)), a.decoding))


def _scores(answers: Answers, concepts: np.ndarray) -> dict:
    recalls = {
        f"recall_at_{k}": dataclasses.asdict(
            metrics.clustered_bootstrap(metrics.hits_at(answers.ranks, k), concepts)
        )
        for k in (1, 5, 10)
    }
    return {
        "method": answers.method,
        "decoding": answers.decoding,
        **recalls,
        "median_rank": metrics.median_rank(answers.ranks),
        "mrr": metrics.mrr(answers.ranks),
        "ndcg_at_10": metrics.ndcg_at(answers.ranks, 10),
    }


def _differences(test_set: TestSet) -> list[dict]:
    """Recall@10 of one method less another's, on the same queries and the same resamples."""
    found = []
    for decoding in DECODINGS:
        for better, worse in PAIRS:
            a, b = test_set.find(better, decoding), test_set.find(worse, decoding)
            if a is None or b is None:
                continue
            interval = metrics.paired_difference(
                metrics.hits_at(a.ranks, 10), metrics.hits_at(b.ranks, 10), test_set.concepts
            )
            entry = {"a": better, "b": worse, "decoding": decoding}
            entry["recall_at_10"] = dataclasses.asdict(interval)
            entry["clear_of_zero"] = interval.clear_of_zero
            found.append(entry)
    return found


def _by_language(test_set: TestSet) -> list[dict]:
    """The same scores for each language, where there is more than one."""
    languages = np.array([query.language for query in test_set.queries])
    if len(set(languages)) < 2:
        return []
    table = []
    for language in sorted(set(languages)):
        chosen = languages == language
        part = [
            dataclasses.replace(answers, ranks=np.asarray(answers.ranks)[chosen])
            for answers in _in_order(test_set)
        ]
        scores = [_scores(answers, test_set.concepts[chosen]) for answers in part]
        table.append({"language": language, "queries": int(chosen.sum()), "methods": scores})
    return table


def _record(test_set: TestSet, index: int) -> dict:
    query = test_set.queries[index]
    return {
        "id": query.id,
        "query": query.text,
        "language": query.language,
        "concept": query.concept,
        "reference": query.reference,
        "searched": {a.label: a.texts[index] for a in _in_order(test_set)},
        "rank": {a.label: int(a.ranks[index]) for a in _in_order(test_set)},
    }


# Examples: the same draw for the picture and for the table of texts.


class _Examples(NamedTuple):
    test_set: TestSet
    before: Answers
    after: Answers
    chosen: list[int]  # queries, gains first
    rule: str  # how they were chosen


def _examples(test_set: TestSet, count: int = EXAMPLES) -> _Examples | None:
    stages = ("raw query", "untrained", "warm-up", "GRPO")
    present = [found for stage in stages if (found := test_set.find(stage, "greedy"))]
    if len(present) < 2:
        return None
    untrained = test_set.find("untrained", "greedy")
    after = present[-1]
    before = untrained if untrained not in (None, after) else present[0]
    moved = np.asarray(before.ranks) - np.asarray(after.ranks)
    gains, losses = np.flatnonzero(moved > 0), np.flatnonzero(moved < 0)
    if not len(gains) + len(losses):
        return None
    counts = _split(len(gains), len(losses), count)
    generator = np.random.default_rng(EXAMPLE_SEED)
    chosen = [
        int(index)
        for side, size in zip((gains, losses), counts, strict=True)
        for index in sorted(generator.choice(side, size, replace=False))
    ]
    rule = (
        f"{_sentence(_shift(test_set.shift))}: from {before.label} to {after.label}, the right "
        f"picture moved up for {len(gains)} of {len(moved)} queries, down for "
        f"{len(losses)} and stayed for {len(moved) - len(gains) - len(losses)}. "
        f"Drawn at random (seed {EXAMPLE_SEED}) in that proportion, at least two of a kind where "
        f"there are any: {counts[0]} that moved up, then {counts[1]} that moved down."
    )
    return _Examples(test_set, before, after, chosen, rule)


def _split(gains: int, losses: int, count: int) -> tuple[int, int]:
    """How many of `count` are gains and losses: in proportion, two of a kind at the least."""
    total = min(count, gains + losses)
    share = round(total * losses / (gains + losses))
    share = max(share, min(2, losses), total - gains)
    share = min(share, losses, total - min(2, gains))
    return total - share, share


def _write_before_after(path: Path, examples: list[_Examples], corpus_images: Callable) -> None:
    rows, wanted = [], []
    for example in examples:
        for index in example.chosen:
            query = example.test_set.queries[index]
            wanted.append((corpus_images(query.target), query.reference))
            rows += [
                _row(example.test_set, answers, index, corpus_images)
                for answers in (example.before, example.after)
            ]
    rules = " ".join(example.rule for example in examples)
    note = f"At the left the right picture, framed in green where it was found. {rules}"
    contact_sheet(rows, path, columns=2, wanted=wanted, note=note)


def _row(test_set: TestSet, answers: Answers, index: int, corpus_images: Callable) -> Row:
    query = test_set.queries[index]
    several = len({query.language for query in test_set.queries}) > 1
    title = f"“{query.text}”" + (f"  ({query.language})" if several else "")
    nearest = [int(row) for row in answers.nearest[index]]
    right = nearest.index(query.target) if query.target in nearest else None
    images = [corpus_images(row) for row in nearest]
    caption = f"{answers.label}: rank {answers.ranks[index]}"
    return Row(title, answers.texts[index], images, right, caption)


# Markdown.


def _markdown(workdir: Path, numbers: dict, examples: list[_Examples], has_curves: bool) -> str:
    parts = ["# Query rewriting for a frozen retriever: what was learned", _opening(numbers)]
    for test_set in numbers["test_sets"]:
        parts += _section(test_set)
    if examples:
        parts += ["## Before and after", "![before and after](before_after.png)"]
        for example in examples:
            parts += [example.rule, _example_table(example)]
    if has_curves:
        parts += ["## Training", "![training curves](curves.png)"]
    parts += ["## How this was made", _about(workdir, numbers["about"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _opening(numbers: dict) -> str:
    sentence = (
        "A small language model rewrites search queries; the retriever that searches with the "
        "rewrites and its index of pictures stay as they are."
    )
    if not numbers["test_sets"]:
        return sentence
    first = numbers["test_sets"][0]["name"]
    headlines = [_headline(t) for t in numbers["test_sets"] if t["name"] == first]
    return "\n\n".join([sentence, *dict.fromkeys(headlines)])


def _headline(test_set: dict) -> str:
    found = {(d["a"], d["b"]): d for d in test_set["differences"] if d["decoding"] == "greedy"}
    trained = "GRPO" if ("GRPO", "untrained") in found else "warm-up"
    difference = found.get((trained, "untrained"))
    if difference is None:
        return "**Nothing has been trained yet: these are the numbers to start from.**"
    interval = difference["recall_at_10"]
    change = 100 * interval["mean"]
    verb = "raises" if change > 0 else "lowers" if change < 0 else "changes"
    headline = (
        f"**Training {verb} Recall@10 on {_title(test_set)} by {abs(change):.1f} points** "
        f"({trained} − untrained: {_points(interval)}, 95 % interval; greedy decoding, "
        f"{test_set['queries']} queries about {test_set['concepts']} concepts). {_told(difference)}"
    )
    share = found.get(("GRPO", "warm-up"))
    if share is None:
        return headline
    share_points = _points(share["recall_at_10"])
    return f"{headline} GRPO's own part, after the warm-up, is {share_points}. {_told(share)}"


def _told(difference: dict) -> str:
    if difference["clear_of_zero"]:
        return "The interval is clear of zero."
    return "The interval contains zero: on these queries it cannot be told from chance."


def _section(test_set: dict) -> list[str]:
    intro = (
        f"{test_set['queries']} queries about {test_set['concepts']} concepts. Recall in per cent "
        "with its 95 % interval, from a bootstrap over concepts."
    )
    parts = [f"## {_sentence(_title(test_set))}", intro, _main_table(test_set), _legend(test_set)]
    if test_set["differences"]:
        parts += ["### Differences on the same queries", _difference_table(test_set), _caveat()]
    if test_set["languages"]:
        parts += ["### By language", _language_table(test_set)]
    return parts


def _title(test_set: dict) -> str:
    return f"{_shift(test_set['shift'])} ({test_set['name']})"


def _shift(shift: str) -> str:
    return SHIFTS.get(shift, f"{shift} queries")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _main_table(test_set: dict) -> str:
    rows = [
        [
            _name(scores),
            *(_percent(scores[f"recall_at_{k}"]) for k in (1, 5, 10)),
            f"{scores['median_rank']:g}",
        ]
        for scores in test_set["methods"]
    ]
    return _table(["searched with", "R@1", "R@5", "R@10", "median rank"], rows)


def _legend(test_set: dict) -> str:
    present = {scores["method"] for scores in test_set["methods"]}
    return "\n".join(f"- {name}: {means}" for name, means in METHODS.items() if name in present)


def _difference_table(test_set: dict) -> str:
    rows = [
        [
            f"{d['a']} − {d['b']}",
            d["decoding"],
            _points(d["recall_at_10"]),
            "yes" if d["clear_of_zero"] else "no: cannot be told from zero",
        ]
        for d in test_set["differences"]
    ]
    return _table(["difference", "decoding", "R@10, points", "clear of zero"], rows)


def _caveat() -> str:
    return (
        "The intervals cover the choice of test queries, not the luck of one training run: "
        "compare several seeds before believing a small difference."
    )


def _language_table(test_set: dict) -> str:
    labels = [_name(scores) for scores in test_set["methods"]]
    rows = [
        [
            part["language"],
            str(part["queries"]),
            *(f"{100 * scores['recall_at_10']['mean']:.1f}" for scores in part["methods"]),
        ]
        for part in test_set["languages"]
    ]
    return "R@10 in per cent.\n\n" + _table(["language", "queries", *labels], rows)


def _example_table(example: _Examples) -> str:
    queries, before, after = example.test_set.queries, example.before, example.after
    rows = [
        [
            _cell(queries[i].text),
            f"{_cell(before.texts[i])} ({before.ranks[i]})",
            f"{_cell(after.texts[i])} ({after.ranks[i]})",
            _cell(queries[i].reference),
        ]
        for i in example.chosen
    ]
    head = ["query", f"{before.label} (rank)", f"{after.label} (rank)", "right picture"]
    return _table(head, rows)


def _about(workdir: Path, about: dict) -> str:
    again = f"python -m grape_jax.evaluate --workdir={shlex.quote(str(workdir))}"
    command = about.get("command", again)
    rows = [[_cell(str(k)), _cell(str(v))] for k, v in about.items() if k != "command"]
    facts = _table(["", ""], rows) + "\n\n" if rows else ""
    return f"{facts}This report is made again by\n\n```bash\n{command}\n```"


def _table(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1) if len(head) > 4 else ["---"] * len(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *rows])


def _cell(text: str) -> str:
    """Free text as one table cell: no line breaks, nothing that Markdown would read."""
    escaped = "".join(f"\\{c}" if c in "\\`*_|<>[]#" else c for c in " ".join(text.split()))
    return escaped or "(empty)"


def _name(scores: dict) -> str:
    return ", ".join(part for part in (scores["method"], scores["decoding"]) if part)


def _percent(interval: dict) -> str:
    mean, low, high = (100 * interval[key] for key in ("mean", "low", "high"))
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def _points(interval: dict) -> str:
    mean, low, high = (100 * interval[key] for key in ("mean", "low", "high"))
    return f"{mean:+.1f} [{low:.1f}, {high:.1f}]".replace("-", "−")


# Curves.

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


def _write_curves(path: Path, log: Sequence[dict]) -> bool:
    """Small multiples over the steps; False where the log holds nothing to draw."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    lines = _on_one_axis(log)
    panels = [(key, label) for key, label in PANELS if _has_points(lines, key)]
    if not panels:
        return False
    columns = min(4, len(panels) + 1)
    rows = math.ceil((len(panels) + 1) / columns)
    figure = Figure(figsize=(3.3 * columns, 2.5 * rows), dpi=130, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
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
    """The lines in order, with "x" counting on where a phase starts its steps again."""
    latest = {}  # a resumed run repeats steps: its last word counts
    for line in log:
        if isinstance(line.get("step"), int | float):
            latest[line.get("phase", "grpo"), line["step"]] = line
    lines, start, last, phase = [], 0, 0, None
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
    # The loss of GRPO says nothing about progress: only the warm-up's is drawn.
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
        style = {"marker": "o", "markerfacecolor": "white", "color": "#444444"}
        handles.append(Line2D([], [], linestyle="", **style))
        labels.append("validation")
    handles.append(Line2D([], [], color="#888888", linewidth=0.7, alpha=0.6))
    labels.append("each step")
    return handles, labels


def _plain(value: Any) -> Any:
    """What JSON cannot hold: a NumPy number becomes Python's, anything else its text."""
    return value.item() if isinstance(value, np.generic) else str(value)
