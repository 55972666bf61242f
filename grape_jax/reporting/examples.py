"""Example queries of a report: a random sample, and the largest gains and losses."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from grape_jax.reporting import metrics
from grape_jax.reporting.contact_sheet import Row, contact_sheet
from grape_jax.reporting.results import GRPO, RAW, UNTRAINED, WARM_UP, Answers, TestSet

DRAWN = 12  # queries in the random sample
EXTREMES = 6  # largest gains, and as many losses
SEED = 0


class Examples(NamedTuple):
    """Queries of a test set with the answers of two methods."""

    test_set: TestSet
    before: Answers
    after: Answers
    chosen: list[int]  # rows of the queries, gains first
    rule: str  # how they were chosen


def random_sample(test_set: TestSet, count: int = DRAWN) -> Examples | None:
    """A random sample of the queries whose rank training has changed; None if there are none."""
    pair = before_and_after(test_set)
    if pair is None:
        return None
    before, after = pair
    gains, losses, stayed = _moved(test_set, before, after)
    if not len(gains) + len(losses):
        return None
    counts = split(len(gains), len(losses), count)
    generator = np.random.default_rng(SEED)
    chosen = [
        int(index)
        for side, size in zip((gains, losses), counts, strict=True)
        for index in sorted(generator.choice(side, size, replace=False))
    ]
    rule = (
        f"from {before.label} to {after.label}, the right picture moved up for {len(gains)} of "
        f"{len(gains) + len(losses) + stayed} queries, down for {len(losses)} and stayed for "
        f"{stayed}. Drawn at random (seed {SEED}) in that proportion, at least two of a kind where "
        f"there are any: {counts[0]} that moved up, then {counts[1]} that moved down."
    )
    return Examples(test_set, before, after, chosen, rule)


def largest_changes(test_set: TestSet, count: int = EXTREMES) -> Examples | None:
    """The queries whose rank has changed by the largest factor; None if no rank has changed.

    Only one query of each group is taken, because the others would show the same pictures.
    """
    present = _stages(test_set)
    if len(present) < 2:
        return None
    before, after = present[0], present[-1]
    gains, losses, _ = _moved(test_set, before, after)
    if not len(gains) + len(losses):
        return None
    sides = [_extremes(test_set, before, after, side, count) for side in (gains, losses)]
    rule = (
        f"from {before.label} to {after.label}, the {len(sides[0])} queries whose right picture "
        f"gained the largest factor in rank, then the {len(sides[1])} that lost the largest, one "
        "for each thing that is asked about. They are extremes, not what is usual."
    )
    return Examples(test_set, before, after, sides[0] + sides[1], rule)


def split(gains: int, losses: int, count: int) -> tuple[int, int]:
    """Splits `count` into gains and losses, in proportion but with at least two of each."""
    total = min(count, gains + losses)
    share = round(total * losses / (gains + losses))
    share = max(share, min(2, losses), total - gains)
    share = min(share, losses, total - min(2, gains))
    return total - share, share


def write_sheet(path: Path, examples: Sequence[Examples], rules: Sequence[str]) -> bool:
    """Writes a contact sheet of queries with the five nearest pictures before and after.

    Args:
      path: the PNG file.
      examples: those of test sets without pictures are left out.
      rules: for the foot, how each of the examples was chosen.

    Returns:
      False, and no file, if no test set has pictures.
    """
    shown = [
        (example, rule, example.test_set.image)
        for example, rule in zip(examples, rules, strict=True)
        if example.test_set.image is not None
    ]
    if not shown:
        return False
    rows, wanted = [], []
    for example, _, image in shown:
        for index in example.chosen:
            query = example.test_set.queries[index]
            target = query.targets[0]
            name = example.test_set.names[target] if example.test_set.named else "right picture"
            wanted.append((image(target), name))
            rows += [
                _row(example, image, answers, index) for answers in (example.before, example.after)
            ]
    note = "At the left the right picture, framed in green where it was found. "
    if any(example.test_set.composed for example, *_ in shown):
        note += "The query picture is what the words beside it change; it is never a result. "
    contact_sheet(
        rows, path, columns=2, wanted=wanted, note=note + " ".join(rule for _, rule, _ in shown)
    )
    return True


def rank_of(answers: Answers, index: int) -> int:
    """The rank of a query's best right picture."""
    return int(metrics.best(answers.ranks[[index]])[0])


def before_and_after(test_set: TestSet) -> tuple[Answers, Answers] | None:
    """The greedy answers before and after training; None if there is nothing to compare.

    Before training: those of the raw query and of the untrained policy.
    """
    present = _stages(test_set)
    if len(present) < 2:
        return None
    untrained = test_set.find(UNTRAINED, "greedy")
    after = present[-1]
    return (untrained if untrained not in (None, after) else present[0]), after


def _stages(test_set: TestSet) -> list[Answers]:
    stages = (RAW, UNTRAINED, WARM_UP, GRPO)
    return [found for stage in stages if (found := test_set.find(stage, "greedy"))]


def _moved(
    test_set: TestSet, before: Answers, after: Answers
) -> tuple[np.ndarray, np.ndarray, int]:
    """The rows of queries that gained and that lost, and the number of unchanged queries."""
    judged = np.flatnonzero(test_set.judged)
    if not len(judged):
        return judged, judged, 0
    moved = metrics.best(before.ranks[judged]) - metrics.best(after.ranks[judged])
    return judged[moved > 0], judged[moved < 0], int((moved == 0).sum())


def _extremes(
    test_set: TestSet, before: Answers, after: Answers, side: np.ndarray, count: int
) -> list[int]:
    """The `count` queries of a side with the largest factors, one a group, largest first."""
    if not len(side):
        return []
    factor = np.log(metrics.best(before.ranks[side]) / metrics.best(after.ranks[side]))
    by_group: dict[str, int] = {}
    for index in side[np.argsort(-np.abs(factor), kind="stable")]:
        by_group.setdefault(test_set.groups[index], int(index))
    return list(by_group.values())[:count]


def _row(
    example: Examples, image: Callable[[int], Image.Image], answers: Answers, index: int
) -> Row:
    test_set, query = example.test_set, example.test_set.queries[index]
    several = len({query.language for query in test_set.queries}) > 1
    title = f"“{query.text}”" + (f"  ({query.language})" if several else "")
    nearest = [int(row) for row in answers.nearest[index] if row >= 0]
    right = next((i for i, row in enumerate(nearest) if row in query.targets), None)
    images = [image(row) for row in nearest]
    caption = f"{answers.label}: rank {rank_of(answers, index)}"
    picture = image(query.image) if query.image >= 0 else None
    return Row(title, answers.texts[index], images, right, caption, picture)
