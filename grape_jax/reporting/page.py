"""The report as one HTML page without outside references."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape

from grape_jax.reporting import examples, figures, tables, thumbnails, wording
from grape_jax.reporting.results import Answers, TestSet

WALL = 500  # queries on the wall, of all main test sets together
LIMIT = 6_000_000  # bytes of the page
LONGEST = 300  # characters of a text on the wall
SEED = 0  # of the queries that are drawn for the wall
MARK = "/*thumbnails*/"  # in the template, replaced when the size of the rest is known


@dataclasses.dataclass(frozen=True)
class Shown:
    """A picture of the corpus on the page."""

    css: str  # the class of its thumbnail; "": no picture
    name: str
    right: bool = False  # whether it is what the query asks for


@dataclasses.dataclass(frozen=True)
class Search:
    """What one wording of a query has found."""

    label: str
    text: str
    rank: int
    found: list[Shown]


@dataclasses.dataclass(frozen=True)
class Card:
    """A query on the wall."""

    shift: str
    part: str  # its kind, or its language
    outcome: str  # "gained", "lost" or "unchanged"
    language: str
    text: str
    picture: Shown | None  # of a composed query
    targets: list[Shown]
    before: Search
    after: Search


def html(
    numbers: dict,
    test_sets: Sequence[TestSet],
    log: Sequence[dict],
    command: str,
    config: dict[str, Any] | None,
) -> str:
    """The page, of at most `LIMIT` bytes for texts of usual length.

    Args:
      numbers: the content of report.json.
      test_sets: those that the numbers are of; the main ones are on the wall.
      log: lines of metrics.jsonl.
      command: makes the report again.
      config: the run's resolved config; None: not shown.
    """
    main = [t for t in test_sets if t.name == test_sets[0].name]
    pictures: dict[tuple[Any, int], str] = {}
    cards = [card for t in main for card in _cards(t, max(1, WALL // len(main)), pictures)]
    page = _template().render(
        numbers=numbers,
        cards=cards,
        judged=sum(int(t.judged.sum()) for t in main),
        curves=[(label, _inline(svg, f"c{i}")) for i, (label, svg) in enumerate(curves(log))],
        part_figures=_part_figures(numbers),
        settings=_flat(config or {}),
        command=command,
        mark=Markup(MARK),
        tables=tables,
        wording=wording,
        tiles=_tiles,
        primary=_primary_column,
        emphasis=_emphasis,
        facts={k: v for k, v in numbers["about"].items() if k != "command"},
    )
    open_picture = lambda image, row: functools.partial(image, row)
    uris = thumbnails.encode(
        {css: open_picture(image, row) for (image, row), css in pictures.items()},
        LIMIT - len(page.encode(errors="replace")) - 40 * len(pictures),
    )
    rules = "".join(f".{css}{{background-image:url({uri})}}" for css, uri in uris.items())
    return page.replace(MARK, rules)


def curves(log: Sequence[dict]) -> list[tuple[str, str]]:
    """The training curves as SVG."""
    return figures.curve_svgs(log)


# The wall.


def _cards(test_set: TestSet, most: int, pictures: dict[tuple[Any, int], str]) -> list[Card]:
    """The queries of a test set, or a random sample of them; adds the pictures that they show."""
    pair = examples.before_and_after(test_set)
    judged = np.flatnonzero(test_set.judged)
    if pair is None or not len(judged):
        return []
    if len(judged) > most:
        judged = np.sort(np.random.default_rng(SEED).choice(judged, most, replace=False))
    several = len({query.language for query in test_set.queries}) > 1

    def shown(row: int, right: bool = False) -> Shown:
        css = ""
        if test_set.image is not None:
            css = pictures.setdefault((test_set.image, row), f"t{len(pictures)}")
        return Shown(css, test_set.names[row], right)

    def search(answers: Answers, index: int) -> Search:
        targets = test_set.queries[index].targets
        rows = [int(row) for row in answers.nearest[index] if row >= 0]
        return Search(
            answers.label,
            _shortened(answers.texts[index]),
            examples.rank_of(answers, index),
            [shown(row, row in targets) for row in rows],
        )

    def card(index: int) -> Card:
        query = test_set.queries[index]
        before, after = (search(answers, index) for answers in pair)
        return Card(
            shift=test_set.shift,
            part=query.kind or (query.language if several else ""),
            outcome=_outcome(before.rank, after.rank),
            language=query.language,
            text=_shortened(query.text),
            picture=shown(query.image) if query.image >= 0 else None,
            targets=[shown(row) for row in query.targets[:3]],
            before=before,
            after=after,
        )

    return [card(int(index)) for index in judged]


def _outcome(before: int, after: int) -> str:
    if after == before:
        return "unchanged"
    return "gained" if after < before else "lost"


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


# The parts of the template that need more than it can say.


@functools.cache
def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "assets")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"bold": _bold, "cell": _cell}
    return environment.get_template("report.html")


def _bold(text: str) -> Markup:
    """A sentence of `wording`, with its bold parts."""
    kept = str(escape(text)).replace(" %", "\u00a0%")
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", kept))


def _cell(text: str) -> Markup:
    """A cell of a table; the interval after a number is set smaller."""
    number, bracket, interval = text.partition(" [")
    small = Markup(" <small>{}</small>").format(f"[{interval}") if bracket else Markup("")
    return escape(number) + small


def _tiles(test_set: dict) -> list[tuple[str, str, str]]:
    """The most important numbers of a test set: what, value, interval."""
    measure = test_set["measure"]
    wanted = {
        test_set["trained"]: "trained",
        test_set["best_baseline"]: "best baseline",
        "untrained": "untrained",
        "raw query": "raw query",
        "reference text": "upper bound",
    }
    scores = {m["method"]: m for m in test_set["methods"] if m["decoding"] in ("", "greedy")}
    tiles = []
    for method, what in wanted.items():
        if method in scores:
            mean, interval = wording.percent(scores[method][measure]).split(" ", 1)
            tiles.append((what if what == method else f"{what}: {method}", mean, interval))
    return tiles


def _primary_column(test_set: dict) -> list[float]:
    """The value of each method by the measure of the test set, in per cent."""
    return [100 * scores[test_set["measure"]]["mean"] for scores in test_set["methods"]]


def _emphasis(test_set: dict) -> list[str]:
    """The CSS class of each method's row."""
    classes = {test_set["best_baseline"]: "best", test_set["trained"]: "trained"}
    return [
        classes.get(m["method"], "") if m["decoding"] in ("", "greedy") else ""
        for m in test_set["methods"]
    ]


def _part_figures(numbers: dict) -> dict[tuple[int, str], Markup]:
    """The figures by language and kind of each test set, by its number and the list's name."""
    return {
        (i, parts): _inline(figures.parts_svg(test_set, key, parts), f"p{i}{parts}")
        for i, test_set in enumerate(numbers["test_sets"])
        for key, parts, _ in tables.PARTS
        if parts != "lengths" and test_set[parts]
    }


def _inline(svg: str, name: str) -> Markup:
    """An SVG whose ids differ from those of the others on the page."""
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    return Markup(svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1))


def _flat(config: dict[str, Any], prefix: str = "") -> list[str]:
    """The lines `key = value` of a nested config."""
    lines = []
    for key, value in config.items():
        if isinstance(value, dict) and value:
            lines += _flat(value, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key} = {value!r}")
    return lines
