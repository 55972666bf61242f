"""The report of a run: Markdown, JSON and pictures, from its answers and its log.

`write` makes `report.json` (all numbers), `report.md`, `curves.png`, `languages.png`,
`before_after.png` and `gains_and_losses.png` in the directory of the run.
"""

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grape_jax.reporting import examples, figures
from grape_jax.reporting.examples import Examples
from grape_jax.reporting.results import (
    CONSTANT,
    CUTOFFS,
    GRPO,
    HYDE,
    METHODS,
    MULTI_QUERY,
    RAW,
    SUBSET_CUTOFFS,
    UNTRAINED,
    WARM_UP,
    TestSet,
    fused,
    numbers_of,
)
from grape_jax.runtime import files

SHIFTS = {
    "noisy": "queries with typing errors",
    "long": "long descriptions",
    "languages": "queries in other languages",
    "chinese": "Chinese captions",
    "multilingual": "captions in many languages",
    "articles": "sections of articles",
    "edits": "changes to a picture",
}


def write(
    workdir: str | Path,
    test_sets: Sequence[TestSet],
    log: Sequence[dict],
    about: dict[str, Any],
) -> dict:
    """Writes the files of a report, each atomically.

    Pictures that would be empty are not written: without log lines, with only one method or
    language, or for a corpus without pictures.

    Args:
      workdir: the directory of the run.
      test_sets: one for each name and shift. Those with the name of the first are the main ones,
        with headlines and examples.
      log: lines of metrics.jsonl; unknown, missing and null entries are ignored.
      about: facts about the run, printed at the end. Its entry "command", if any, is shown as the
        command that makes the report again.

    Returns:
      The content of report.json. Recall is from 0 to 1, an interval a dict of mean, low and high.

    Raises:
      UserError: a test set is empty, or a method has answers to another number of queries.
    """
    workdir = files.path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    in_numbers = [numbers_of(test_set) for test_set in test_sets]
    numbers: dict[str, Any] = {"test_sets": in_numbers, "about": about}
    main = [test_set for test_set in test_sets if test_set.name == test_sets[0].name]
    drawn = _present(examples.random_sample(t, max(4, examples.DRAWN // len(main))) for t in main)
    largest = _present(
        examples.largest_changes(t, max(2, examples.EXTREMES // len(main))) for t in main
    )
    images = {
        "curves.png": figures.write_curves(workdir / "curves.png", log),
        "languages.png": figures.write_languages(workdir / "languages.png", in_numbers),
        "before_after.png": _draw(workdir / "before_after.png", drawn),
        "gains_and_losses.png": _draw(workdir / "gains_and_losses.png", largest),
    }
    text = _markdown(workdir, numbers, drawn, largest, {name for name in images if images[name]})
    files.replace(workdir / "report.md", text.encode(errors="replace"))
    as_json = json.dumps(numbers, indent=1, ensure_ascii=False, default=_plain)
    files.replace(workdir / "report.json", as_json.encode(errors="replace"))
    return numbers


# The end of a run on the terminal.

NAME_WIDTH = 16  # of the first column
BASELINES = (RAW, UNTRAINED, fused(UNTRAINED), HYDE, MULTI_QUERY, CONSTANT)  # without training


def summary(numbers: dict) -> list[str]:
    """Lines for the terminal: greedy Recall@10 of the main test sets, a column for each shift.

    Args:
      numbers: from `write`.

    Returns:
      At most six lines; none if all right answers are withheld.
    """
    first = numbers["test_sets"][:1]
    main = [t for t in numbers["test_sets"] if t["name"] == first[0]["name"] and t["judged"]]
    if not main:
        return []
    columns = [_summary_of(test_set) for test_set in main]
    rows = [["", *(f"{t['shift']}, {t['judged']} queries" for t in main)]]
    for name in dict.fromkeys(name for column in columns for name in column):
        rows.append([name, *(column.get(name, "") for column in columns)])
    widths = [NAME_WIDTH, *(max(map(len, cells)) for cells in [*zip(*rows, strict=True)][1:])]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return [f"Recall@10 in per cent with 95 % intervals, {main[0]['name']}:", *lines]


def _summary_of(test_set: dict) -> dict[str, str]:
    scores = {
        m["method"]: m["recall_at_10"]
        for m in test_set["methods"]
        if m["decoding"] in ("", "greedy")
    }
    rows = {"raw query": RAW, "untrained": UNTRAINED}
    trained = next((method for method in (GRPO, WARM_UP) if method in scores), None)
    if trained:
        rows[f"trained ({trained})"] = trained
    found = {row: _percent(scores[method]) for row, method in rows.items() if method in scores}
    baselines = [method for method in BASELINES if method in scores]
    if baselines:
        best = max(baselines, key=lambda method: scores[method]["mean"])
        found["best baseline"] = f"{_percent(scores[best])} {best}"
    return found


def _present(found: Iterable[Examples | None]) -> list[Examples]:
    return [example for example in found if example is not None]


def _draw(path: Path, chosen: list[Examples]) -> bool:
    return bool(chosen) and examples.write_sheet(
        path, chosen, [_rule(example) for example in chosen]
    )


def _rule(example: Examples) -> str:
    return f"{_sentence(_shift(example.test_set.shift))}: {example.rule}"


# Markdown.


def _markdown(
    workdir: Path,
    numbers: dict,
    drawn: list[Examples],
    largest: list[Examples],
    images: set[str],
) -> str:
    parts = ["# Query rewriting for a frozen retriever: what was learned", _opening(numbers)]
    for test_set in numbers["test_sets"]:
        parts += _section(test_set)
    if "languages.png" in images:
        parts += ["## Recall by language", "![recall by language](languages.png)"]
    sections = (
        ("Before and after", "before_after.png", drawn),
        ("The largest gains and losses", "gains_and_losses.png", largest),
    )
    for title, image, chosen in sections:
        if chosen:
            parts += [f"## {title}", f"![{title.lower()}]({image})" if image in images else ""]
        for example in chosen:
            parts += [_rule(example), _example_table(example)]
    if "curves.png" in images:
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
    if not test_set["judged"]:
        return f"**The right answers to {_title(test_set)} are withheld: nothing is judged here.**"
    found = {(d["a"], d["b"]): d for d in test_set["differences"] if d["decoding"] == "greedy"}
    trained = "GRPO" if ("GRPO", "untrained") in found else "warm-up"
    difference = found.get((trained, "untrained"))
    if difference is None:
        return "**Nothing has been trained yet: these are the numbers to start from.**"
    interval = difference["recall_at_10"]
    headline = (
        f"**Training {_effect(interval, f'Recall@10 on {_title(test_set)}')}** "
        f"({trained} − untrained: {_points(interval)}, 95 % interval; greedy decoding, "
        f"{_asked(test_set)}). {_significance(interval)}"
    )
    raw = found.get((trained, "raw query"))
    if raw is not None:
        headline += f" {_against_raw(trained, raw['recall_at_10'])}"
    share = found.get(("GRPO", "warm-up"))
    if share is None:
        return headline
    share_points = _points(share["recall_at_10"])
    grpo_part = f"GRPO's own part, after the warm-up, is {share_points}."
    return f"{headline} {grpo_part} {_significance(share['recall_at_10'])}"


def _effect(interval: dict, on: str) -> str:
    if not interval["clear_of_zero"]:
        return f"shows no effect on {on}"
    verb = "raises" if interval["mean"] > 0 else "lowers"
    return f"{verb} {on} by {abs(100 * interval['mean']):.1f} points"


def _against_raw(trained: str, interval: dict) -> str:
    """Compares the trained rewriter with the query as it was written."""
    if not interval["clear_of_zero"]:
        verdict = "which of the two finds more cannot be told"
    elif interval["mean"] > 0:
        verdict = "searching with the rewrite finds more"
    else:
        verdict = "**searching with the query as it was written finds more**"
    return f"{trained} − raw query is {_points(interval)}: {verdict}."


def _significance(interval: dict) -> str:
    if interval["clear_of_zero"]:
        return "The interval is clear of zero."
    return "The interval contains zero: on these queries it cannot be told from chance."


def _section(test_set: dict) -> list[str]:
    heading = f"## {_sentence(_title(test_set))}"
    if not test_set["judged"]:
        return [
            heading,
            f"{test_set['queries']} queries. Their right answers are withheld: there are the "
            "answers of every method, and no numbers.",
        ]
    parts = [heading, _intro(test_set), _main_table(test_set), _legend(test_set)]
    if test_set["differences"]:
        parts += ["### Differences on the same queries", _difference_table(test_set), _caveat()]
    if test_set["languages"]:
        parts += ["### By language", _part_table(test_set, "language", "languages")]
    if test_set["lengths"]:
        parts += ["### By length of the query", _part_table(test_set, "length", "lengths")]
    return parts


def _intro(test_set: dict) -> str:
    text = (
        f"{_sentence(_asked(test_set))}. In per cent, recall with its 95 % interval from a "
        "bootstrap over groups, which are queries that share what they ask for."
    )
    if test_set["several_targets"]:
        text += (
            " Some queries have several right answers: R@k is the share of them among the best k, "
            "hit@k says that there is at least one."
        )
    return text


def _asked(test_set: dict) -> str:
    text = f"{test_set['judged']} queries in {test_set['groups']} groups"
    withheld = test_set["queries"] - test_set["judged"]
    return f"{text}, {withheld} more without a known answer" if withheld else text


def _title(test_set: dict) -> str:
    return f"{_shift(test_set['shift'])} ({test_set['name']})"


def _shift(shift: str) -> str:
    return SHIFTS.get(shift, f"{shift} queries")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _main_table(test_set: dict) -> str:
    """Recall with intervals, and the means of the other measures."""
    first = test_set["methods"][0]
    hits = [k for k in CUTOFFS if f"hit_at_{k}" in first]
    subsets = [k for k in SUBSET_CUTOFFS if f"subset_recall_at_{k}" in first]
    plain = {f"hit@{k}": f"hit_at_{k}" for k in hits}
    plain |= {f"subset R@{k}": f"subset_recall_at_{k}" for k in subsets}
    plain |= {"MRR": "mrr", "nDCG@10": "ndcg_at_10"}
    rows = [
        [
            _name(scores),
            *(_percent(scores[f"recall_at_{k}"]) for k in CUTOFFS),
            *(f"{100 * scores[key]['mean']:.1f}" for key in plain.values()),
            f"{scores['median_rank']:g}",
        ]
        for scores in test_set["methods"]
    ]
    head = ["searched with", *(f"R@{k}" for k in CUTOFFS), *plain, "median rank"]
    return _table(head, rows)


def _legend(test_set: dict) -> str:
    present = {scores["method"] for scores in test_set["methods"]}
    return "\n".join(f"- {name}: {means}" for name, means in METHODS.items() if name in present)


def _difference_table(test_set: dict) -> str:
    rows = [
        [
            f"{d['a']} − {d['b']}",
            d["decoding"],
            _points(d["recall_at_1"]),
            _p(d["recall_at_1"]["p"]),
            _points(d["recall_at_10"]),
            _p(d["recall_at_10"]["p"]),
            "yes" if d["recall_at_10"]["clear_of_zero"] else "no: cannot be told from zero",
        ]
        for d in test_set["differences"]
    ]
    head = ["difference", "decoding", "R@1, points", "p", "R@10, points", "p"]
    return _table([*head, "R@10 clear of zero"], rows)


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _caveat() -> str:
    return (
        "Intervals from the same resamples of groups on both sides; p from flipping the signs of "
        "groups at random, two-sided, each by itself: among many comparisons some small p come by "
        "chance. Both cover the choice of test queries, not the luck of one training run: compare "
        "several seeds before believing a small difference. Where interval and p disagree, few "
        "groups decide: take the difference as not shown."
    )


def _part_table(test_set: dict, key: str, parts: str) -> str:
    labels = [_name(scores) for scores in test_set["methods"]]
    recall = lambda scores: f"{100 * scores['recall_at_10']['mean']:.1f}"
    rows = [
        [part[key], str(part["queries"]), *(recall(scores) for scores in part["methods"])]
        for part in test_set[parts]
    ]
    if parts == "languages":
        means = [f"{100 * row['recall_at_10']:.1f}" for row in test_set["mean_of_languages"]]
        rows.append(["mean of languages", "", *means])
    return "R@10 in per cent.\n\n" + _table([key, "queries", *labels], rows)


def _example_table(example: Examples) -> str:
    queries, before, after = example.test_set.queries, example.before, example.after
    names, composed = example.test_set.names, example.test_set.composed
    own_picture = lambda query: [_cell(names[query.image]) if query.image >= 0 else ""]
    rank = examples.rank_of
    rows = [
        [
            *(own_picture(queries[i]) if composed else []),
            _cell(queries[i].text),
            f"{_cell(before.texts[i])} ({rank(before, i)})",
            f"{_cell(after.texts[i])} ({rank(after, i)})",
            _cell(names[queries[i].targets[0]]),
        ]
        for i in example.chosen
    ]
    head = ["query picture"] if composed else []
    head += ["query", f"{before.label} (rank)", f"{after.label} (rank)", "right picture"]
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
    """Free text as a table cell, without line breaks and Markdown syntax."""
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


def _plain(value: Any) -> Any:
    """A JSON value for another type: NumPy scalars as numbers, anything else as text."""
    return value.item() if isinstance(value, np.generic) else str(value)
