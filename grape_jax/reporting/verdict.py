"""What rewriting can gain before any training: the numbers, a verdict, a table and a figure."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grape_jax.reporting import metrics
from grape_jax.reporting.figures import METHOD_COLOURS
from grape_jax.reporting.metrics import Interval
from grape_jax.reporting.results import COMPOSED, RAW, REFERENCE, UNTRAINED
from grape_jax.reporting.wording import SHIFTS, percent
from grape_jax.runtime import files

GREEDY, SAMPLED = f"{UNTRAINED}, greedy", f"{UNTRAINED}, sampled"
LITTLE = 0.1  # a smaller share of groups with variance teaches hardly anything


@dataclasses.dataclass(frozen=True)
class Headroom:
    """What the untrained policy writes for training queries of one shift, and what that finds."""

    shift: str
    ranks: dict[str, np.ndarray]  # by method: int `[Q]`, or `[Q, K]` of samples
    clusters: np.ndarray  # `[Q]`, labels: queries with equal ones are resampled together
    varied: float  # share of groups whose rewards differ, from which GRPO can learn
    malformed: float  # share of samples outside the output format
    truncated: float  # share of samples without an end token
    prompt_lengths: tuple[int, ...]  # tokens; a batch of prompts is padded to one of them
    completion_length: int  # tokens
    update_bytes: int  # memory of an update on a device

    @property
    def best_of(self) -> str:
        """The name of the method that takes the best of each query's samples."""
        return f"{UNTRAINED}, best of {self.ranks[SAMPLED].shape[1]}"

    @property
    def by_method(self) -> dict[str, np.ndarray]:
        """`ranks` with the best sample of each query; the reference text, an oracle, comes last."""
        ranks = self.ranks | {self.best_of: self.ranks[SAMPLED].min(axis=1)}
        last = {REFERENCE: ranks.pop(REFERENCE)} if REFERENCE in ranks else {}
        return ranks | last

    def hits(self, method: str, cutoff: int = 10) -> np.ndarray:
        """Whether each query is answered: float `[Q]`, the mean over samples if there are some."""
        return (self.by_method[method].reshape(len(self.clusters), -1) <= cutoff).mean(axis=1)

    @property
    def baseline(self) -> str:
        """The best method that rewrites nothing."""
        others = [name for name in self.ranks if name not in (SAMPLED, GREEDY, REFERENCE)]
        return max(others, key=lambda name: self.hits(name).mean())

    @property
    def gain(self) -> Interval:
        """Recall@10 of the best sample minus that of the best method that rewrites nothing."""
        difference = self.hits(self.best_of) - self.hits(self.baseline)
        return metrics.clustered_bootstrap(difference[:, None], self.clusters)[0]


def sentences(found: Headroom) -> str:
    """Two sentences: whether training can be expected to help, and what GRPO can learn from."""
    share = lambda name: f"{100 * found.hits(name).mean():.0f} %"
    asked = SHIFTS.get(found.shift, found.shift)
    if found.varied < LITTLE or found.gain.mean <= 0:
        opening = f"Rewriting is unlikely to help with {asked}"
    elif found.gain.clear_of_zero:
        opening = f"Rewriting can help with {asked}"
    else:
        opening = f"Rewriting may help with {asked}"
    without = "the query itself" if found.baseline == RAW else found.baseline
    return (
        f"{opening}: the best of {found.ranks[SAMPLED].shape[1]} samples finds "
        f"{share(found.best_of)} in the first ten, {without} {share(found.baseline)}. "
        f"{100 * found.varied:.0f} % of the groups have rewards that differ, from which GRPO can "
        "learn."
    )


def numbers(found: Headroom) -> dict:
    """The numbers for a JSON file, a table and a figure."""
    facts = dataclasses.asdict(found)
    del facts["ranks"], facts["clusters"]
    interval = lambda name, cutoff: dataclasses.asdict(
        metrics.clustered_bootstrap(found.hits(name, cutoff)[:, None], found.clusters)[0]
    )
    return facts | {
        "verdict": sentences(found),
        "queries": len(found.clusters),
        "gain": dataclasses.asdict(found.gain),
        "methods": [
            {
                "method": name,
                "recall_at_1": interval(name, 1),
                "recall_at_10": interval(name, 10),
                "median_rank": float(np.median(ranks)),
            }
            for name, ranks in found.by_method.items()
        ],
    }


def as_markdown(found: dict) -> str:
    """The verdict, the table, and what a run would need, from `numbers`."""
    rows = [
        f"| {row['method']} | {100 * row['recall_at_1']['mean']:.1f} | "
        f"{percent(row['recall_at_10'])} | {row['median_rank']:g} |"
        for row in found["methods"]
    ]
    lengths = ", ".join(map(str, found["prompt_lengths"]))
    return "\n".join(
        [
            f"## {found['shift']}",
            "",
            found["verdict"],
            "",
            f"| {found['queries']} training queries, searched with | R@1 | R@10 | median rank |",
            "| --- | ---: | ---: | ---: |",
            *rows,
            "",
            f"Of the samples, {100 * found['malformed']:.0f} % are outside the output format and "
            f"{100 * found['truncated']:.0f} % have no end within {found['completion_length']} "
            f"tokens. Prompts are padded to {lengths} tokens; an update takes "
            f"{found['update_bytes'] / 2**30:.2g} GiB on each device.",
            "",
        ]
    )


def write_figure(path: Path, shifts: Sequence[dict]) -> None:
    """Writes Recall@10 of every method with its interval, one panel a shift, as PNG.

    Args:
      shifts: from `numbers`.
    """
    from matplotlib.figure import Figure

    most = max(len(found["methods"]) for found in shifts)
    size = (1.5 + 4.3 * len(shifts), 0.9 + 0.36 * most)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    for axis, found in zip(figure.subplots(1, len(shifts), squeeze=False)[0], shifts, strict=True):
        _draw(axis, found)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    files.replace(path, buffer.getvalue())


def _draw(axis: Any, found: dict) -> None:
    rows = found["methods"][::-1]
    names = [row["method"] for row in rows]
    mean, low, high = (
        100 * np.array([row["recall_at_10"][key] for row in rows])
        for key in ("mean", "low", "high")
    )
    axis.barh(names, mean, color=[_colour(name) for name in names], height=0.62)
    axis.errorbar(
        mean, names, xerr=[mean - low, high - mean], fmt="none", ecolor="#333333", capsize=2
    )
    axis.set_xlim(0, 100)
    axis.set_xlabel("Recall@10, %")
    axis.set_title(found["shift"], fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _colour(method: str) -> str:
    """The method's colour in a report's figures; a policy's is that of its greedy rewrites."""
    policy = method.partition(", ")[0]
    return METHOD_COLOURS.get(policy, "#8e6bb5" if method in COMPOSED else "#888888")
