"""The tables of a report as texts, for Markdown, HTML and the terminal."""

from typing import NamedTuple

from grape_jax.reporting import examples
from grape_jax.reporting.examples import Examples
from grape_jax.reporting.results import (
    COMPARED_IN_SUBSET,
    COMPOSED,
    GRPO,
    RAW,
    REFERENCE,
    UNTRAINED,
    WARM_UP,
)
from grape_jax.reporting.wording import MEASURES, label, p_value, percent, points

# A part's name, the list of parts, and the heading of their table.
PARTS = (
    ("language", "languages", "By language"),
    ("kind", "kinds", "By kind of change"),
    ("length", "lengths", "By length of the query"),
)
IN_PARTS = (RAW, *COMPOSED, UNTRAINED, WARM_UP, GRPO, REFERENCE)  # columns of breakdowns

EMPTY = "(empty)"  # a rewrite without words


class Table(NamedTuple):
    """Rows of cells below a head."""

    head: list[str]
    rows: list[list[str]]


def main_table(test_set: dict) -> Table:
    """The most important measures of each method; `all_measures` has the others."""
    first = test_set["methods"][0]
    if test_set["composed"]:
        with_intervals = ["recall_at_1", COMPARED_IN_SUBSET, "recall_at_10"]
    else:
        with_intervals = ["recall_at_1", "recall_at_5", "recall_at_10"]
    with_intervals = [key for key in [*with_intervals, "hit_at_10"] if key in first]
    rows = [
        [
            label(scores),
            *(percent(scores[key]) for key in with_intervals),
            f"{scores['median_rank']:g}",
        ]
        for scores in test_set["methods"]
    ]
    return Table(["searched with", *(MEASURES[key] for key in with_intervals), "median rank"], rows)


def all_measures(test_set: dict) -> Table:
    """The mean of every measure and method, in per cent."""
    keys = [key for key in MEASURES if key in test_set["methods"][0]]
    rows = [
        [label(scores), *(f"{100 * scores[key]['mean']:.1f}" for key in keys)]
        for scores in test_set["methods"]
    ]
    return Table(["searched with", *(MEASURES[key] for key in keys)], rows)


def difference_table(test_set: dict) -> Table:
    """Differences between methods by the measure of the test set."""
    measure = test_set["measure"]
    others = ["recall_at_1", "recall_at_10"] if not test_set["composed"] else [measure]
    if COMPARED_IN_SUBSET in test_set["differences"][0] and test_set["composed"]:
        others.append(COMPARED_IN_SUBSET)
    rows = [
        [
            f"{d['a']} − {d['b']}",
            d["decoding"],
            *(points(d[key]) for key in others),
            p_value(d[measure]["p"]),
            "yes" if d[measure]["clear_of_zero"] else "no: cannot be told from zero",
        ]
        for d in test_set["differences"]
    ]
    named = MEASURES[measure]
    head = ["difference", "decoding", *(f"{MEASURES[key]}, points" for key in others)]
    return Table([*head, f"p of {named}", f"{named} clear of zero"], rows)


def part_table(test_set: dict, key: str, parts: str) -> Table:
    """The measure of the main methods for each language, kind or length.

    Args:
      key: the name of a part's name, such as "language".
      parts: the name of the list of parts, such as "languages".
    """
    measure = test_set["measure"]
    shown = [
        i
        for i, scores in enumerate(test_set["methods"])
        if scores["method"] in IN_PARTS and scores["decoding"] in ("", "greedy")
    ]
    cell = lambda scores: f"{100 * scores[measure]['mean']:.1f}"
    rows = [
        [part[key], str(part["queries"]), *(cell(part["methods"][i]) for i in shown)]
        for part in test_set[parts]
    ]
    if parts == "languages":
        means = [f"{100 * test_set['mean_of_languages'][i][measure]:.1f}" for i in shown]
        rows.append(["mean of languages", "", *means])
    return Table([key, "queries", *(test_set["methods"][i]["method"] for i in shown)], rows)


def example_table(example: Examples) -> Table:
    """Queries with their rewrites before and after training."""
    queries, before, after = example.test_set.queries, example.before, example.after
    names, composed = example.test_set.names, example.test_set.composed
    own_picture = lambda query: [names[query.image] if query.image >= 0 else ""]
    rank = examples.rank_of
    rows = [
        [
            *(own_picture(queries[i]) if composed else []),
            queries[i].text,
            f"{before.texts[i] or EMPTY} ({rank(before, i)})",
            f"{after.texts[i] or EMPTY} ({rank(after, i)})",
            names[queries[i].targets[0]],
        ]
        for i in example.chosen
    ]
    head = ["query picture"] if composed else []
    head += ["query", f"{before.label} (rank)", f"{after.label} (rank)", "right picture"]
    return Table(head, rows)
