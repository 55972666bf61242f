"""Which queries a report shows with pictures: a fair draw, the largest gains and losses."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from grape_jax.reporting import metrics
from grape_jax.reporting.contact_sheet import Row, contact_sheet
from grape_jax.reporting.results import GRPO, RAW, UNTRAINED, WARM_UP, Answers, TestSet

DRAWN = 12  # queries in the before-and-after picture
EXTREMES = 6  # gains, and as many losses, in the picture of the largest
SEED = 0


class Examples(NamedTuple):
    """Some queries of a test set, as one method answers them and as another does."""

    test_set: TestSet
    before: Answers
    after: Answers
    chosen: list[int]  # queries, gains first
    rule: str  # how they were chosen, without the test set's name


def drawn(test_set: TestSet, count: int = DRAWN) -> Examples | None:
    """A draw among the queries that training has moved; None where there are none."""
    present = _stages(test_set)
    if len(present) < 2:
        return None
    untrained = test_set.find(UNTRAINED, "greedy")
    after = present[-1]
    before = untrained if untrained not in (None, after) else present[0]
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


def largest(test_set: TestSet, count: int = EXTREMES) -> Examples | None:
    """The queries whose rank has changed by the largest factor; None where nothing has moved.

    Of queries about one thing only the one that moved most is taken: they would all show the same.
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
    """How many of `count` are gains and losses: in proportion, two of a kind at the least."""
    total = min(count, gains + losses)
    share = round(total * losses / (gains + losses))
    share = max(share, min(2, losses), total - gains)
    share = min(share, losses, total - min(2, gains))
    return total - share, share


def draw(path: Path, examples: Sequence[Examples], rules: Sequence[str]) -> bool:
    """Writes a sheet of queries with the five nearest before and after.

    Args:
      rules: how each was chosen, for the foot.

    Returns:
      False, and no file, where none of the corpora has pictures.
    """
    shown = [
        (example, rule)
        for example, rule in zip(examples, rules, strict=True)
        if example.test_set.image is not None
    ]
    if not shown:
        return False
    rows, wanted = [], []
    for example, _ in shown:
        for index in example.chosen:
            query = example.test_set.queries[index]
            target = query.targets[0]
            name = example.test_set.names[target] if example.test_set.named else "right picture"
            wanted.append((example.test_set.image(target), name))
            rows += [_row(example, answers, index) for answers in (example.before, example.after)]
    note = "At the left the right picture, framed in green where it was found. "
    if any(example.test_set.composed for example, _ in shown):
        note += "The query picture is what the words beside it change; it is never a result. "
    contact_sheet(
        rows, path, columns=2, wanted=wanted, note=note + " ".join(rule for _, rule in shown)
    )
    return True


def rank_of(answers: Answers, index: int) -> int:
    """The rank of one query's best right picture."""
    return int(metrics.best(answers.ranks[[index]])[0])


def _stages(test_set: TestSet) -> list[Answers]:
    stages = (RAW, UNTRAINED, WARM_UP, GRPO)
    return [found for stage in stages if (found := test_set.find(stage, "greedy"))]


def _moved(test_set: TestSet, before: Answers, after: Answers) -> tuple:
    """Queries that gained, queries that lost (int arrays), and how many stayed."""
    judged = np.flatnonzero(test_set.judged)
    if not len(judged):
        return judged, judged, 0
    moved = metrics.best(before.ranks[judged]) - metrics.best(after.ranks[judged])
    return judged[moved > 0], judged[moved < 0], int((moved == 0).sum())


def _extremes(
    test_set: TestSet, before: Answers, after: Answers, side: np.ndarray, count: int
) -> list[int]:
    """The `count` queries of one side with the largest factor, one a group, largest first."""
    if not len(side):
        return []
    factor = np.log(metrics.best(before.ranks[side]) / metrics.best(after.ranks[side]))
    by_group = {}
    for index in side[np.argsort(-np.abs(factor), kind="stable")]:
        by_group.setdefault(test_set.groups[index], int(index))
    return list(by_group.values())[:count]


def _row(example: Examples, answers: Answers, index: int) -> Row:
    test_set, query = example.test_set, example.test_set.queries[index]
    several = len({query.language for query in test_set.queries}) > 1
    title = f"“{query.text}”" + (f"  ({query.language})" if several else "")
    nearest = [int(row) for row in answers.nearest[index] if row >= 0]
    right = next((place for place, row in enumerate(nearest) if row in query.targets), None)
    images = [test_set.image(row) for row in nearest]
    caption = f"{answers.label}: rank {rank_of(answers, index)}"
    picture = test_set.image(query.image) if query.image >= 0 else None
    return Row(title, answers.texts[index], images, right, caption, picture)
