"""The report of a run: Markdown, HTML, JSON and pictures, from its answers and its log.

`write` makes `report.json` (all numbers), `report.html`, `report.md`, `curves.png`,
`languages.png`, `before_after.png` and `gains_and_losses.png` in the directory of the run.
"""

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grape_jax.reporting import examples, figures, page, tables, wording
from grape_jax.reporting.examples import Examples
from grape_jax.reporting.results import RAW, UNTRAINED, TestSet, numbers_of
from grape_jax.reporting.tables import Table
from grape_jax.reporting.wording import percent, sentence
from grape_jax.runtime import files


def write(
    workdir: str | Path,
    test_sets: Sequence[TestSet],
    log: Sequence[dict],
    about: dict[str, Any],
    config: dict[str, Any] | None = None,
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
      config: the run's resolved config, shown on the page.

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
    again = about.get(
        "command", f"python -m grape_jax.evaluate --workdir={shlex.quote(str(workdir))}"
    )
    text = _markdown(again, numbers, drawn, largest, {name for name in images if images[name]})
    files.replace(workdir / "report.md", text.encode(errors="replace"))
    html = page.html(numbers, test_sets, log, again, config)
    files.replace(workdir / "report.html", html.encode(errors="replace"))
    as_json = json.dumps(numbers, indent=1, ensure_ascii=False, default=_plain)
    files.replace(workdir / "report.json", as_json.encode(errors="replace"))
    return numbers


# The end of a run on the terminal.

NAME_WIDTH = 16  # of the first column


def summary(numbers: dict) -> list[str]:
    """Lines for the terminal: greedy recall of the main test sets, a column for each shift.

    It is Recall@1 for composed queries and Recall@10 for others.

    Args:
      numbers: from `write`.

    Returns:
      At most six lines; none if all right answers are withheld.
    """
    first = numbers["test_sets"][:1]
    main = [t for t in numbers["test_sets"] if t["name"] == first[0]["name"] and t["judged"]]
    if not main:
        return []
    measures = list(dict.fromkeys(t["measure"] for t in main))
    columns = [_summary_of(test_set) for test_set in main]
    rows = [["", *(_column_of(t, named=len(measures) > 1) for t in main)]]
    for name in dict.fromkeys(name for column in columns for name in column):
        rows.append([name, *(column.get(name, "") for column in columns)])
    widths = [NAME_WIDTH, *(max(map(len, cells)) for cells in [*zip(*rows, strict=True)][1:])]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    what = wording.LONG_MEASURES[measures[0]] if len(measures) == 1 else "Recall"
    return [f"{what} in per cent with 95 % intervals, {main[0]['name']}:", *lines]


def _column_of(test_set: dict, named: bool) -> str:
    measure = f", {wording.MEASURES[test_set['measure']]}" if named else ""
    return f"{test_set['shift']}, {test_set['judged']} queries{measure}"


def _summary_of(test_set: dict) -> dict[str, str]:
    scores = {
        m["method"]: m[test_set["measure"]]
        for m in test_set["methods"]
        if m["decoding"] in ("", "greedy")
    }
    rows = {"raw query": RAW, "untrained": UNTRAINED}
    trained, best = test_set["trained"], test_set["best_baseline"]
    if trained:
        rows[f"trained ({trained})"] = trained
    found = {row: percent(scores[method]) for row, method in rows.items() if method in scores}
    if best:
        found["best baseline"] = f"{percent(scores[best])} {best}"
    return found


def _present(found: Iterable[Examples | None]) -> list[Examples]:
    return [example for example in found if example is not None]


def _draw(path: Path, chosen: list[Examples]) -> bool:
    return bool(chosen) and examples.write_sheet(
        path, chosen, [_rule(example) for example in chosen]
    )


def _rule(example: Examples) -> str:
    return f"{sentence(wording.shift_title(example.test_set.shift))}: {example.rule}"


# Markdown.


def _markdown(
    command: str,
    numbers: dict,
    drawn: list[Examples],
    largest: list[Examples],
    images: set[str],
) -> str:
    parts = [f"# {wording.TITLE}", *wording.opening(numbers)]
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
            parts += [_rule(example), _table(tables.example_table(example), free=True)]
    if "curves.png" in images:
        parts += ["## Training", "![training curves](curves.png)"]
    parts += ["## How this was made", _about(command, numbers["about"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(test_set: dict) -> list[str]:
    heading = f"## {sentence(wording.title(test_set))}"
    if not test_set["judged"]:
        return [heading, f"{test_set['queries']} queries. {wording.WITHHELD}"]
    parts = [heading, wording.intro(test_set), _table(tables.main_table(test_set))]
    parts += ["\n".join(f"- {name}: {means}" for name, means in wording.legend(test_set))]
    if test_set["differences"]:
        differences = _table(tables.difference_table(test_set))
        parts += ["### Differences on the same queries", differences, wording.CAVEAT]
    measure = wording.MEASURES[test_set["measure"]]
    for key, name, heading in tables.PARTS:
        if test_set[name]:
            broken_down = _table(tables.part_table(test_set, key, name), free=True)
            parts += [f"### {heading}", f"{measure} in per cent.", broken_down]
    return parts


def _about(command: str, about: dict) -> str:
    rows = [[str(k), str(v)] for k, v in about.items() if k != "command"]
    facts = _table(Table(["", ""], rows), free=True) + "\n\n" if rows else ""
    return f"{facts}This report is made again by\n\n```bash\n{command}\n```"


def _table(table: Table, free: bool = False) -> str:
    """A Markdown table; with `free`, the rows hold free text, which is escaped."""
    head, count = table.head, len(table.head)
    rule = ["---"] + ["---:"] * (count - 1) if count > 4 else ["---"] * count
    rows = [list(map(_escaped, row)) for row in table.rows] if free else table.rows
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *rows])


def _escaped(text: str) -> str:
    """Free text as a table cell, without line breaks and Markdown syntax."""
    return "".join(f"\\{c}" if c in "\\`*_|<>[]#" else c for c in " ".join(text.split()))


def _plain(value: Any) -> Any:
    """A JSON value for another type: NumPy scalars as numbers, anything else as text."""
    return value.item() if isinstance(value, np.generic) else str(value)
