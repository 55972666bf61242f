"""The page of a report: whole, self-contained, escaped, and small."""

import base64
import dataclasses
import html.parser
import io
import re
import types

import numpy as np
import pytest
from PIL import Image

from grape_jax.reporting import figures, page, report, results, thumbnails

VOID = {"meta", "link", "input", "br", "img", "hr"}
EVIL = "<script>alert(1)</script> \"'> & $x$ </style>"
LOG = [
    *({"step": s, "phase": "grpo", "reward": 0.1 * s, "recall_at_1": 0.1} for s in range(1, 9)),
    {"step": 9, "phase": "grpo", "validation_recall_at_1": 0.5},
]


def _test_set(queries=6, corpus=12, picture=None, text="make it blue", stride=1):
    """Composed queries of two kinds: every first gains, every third loses."""
    asked = [
        types.SimpleNamespace(
            id=f"q{i}", text=text, language="en", group=f"g{i}", targets=(i % corpus,),
            reference="", image=(i + 1) % corpus, kind=("colour", EVIL)[i % 2],
        )
        for i in range(queries)
    ]  # fmt: skip

    def answers(method, decoding, ranks):
        start = stride * np.arange(queries) + 2  # neither the target nor the query's picture
        nearest = (start[:, None] + np.arange(5)) % corpus
        for i, rank in enumerate(ranks):
            if rank <= 5:
                nearest[i, rank - 1] = i % corpus
        texts = tuple(f"{text} {method}" for _ in asked)
        return results.Answers(method, decoding, texts, np.asarray(ranks)[:, None], nearest)

    before = np.where(np.arange(queries) % 3 == 2, 2, 9)
    after = np.where(np.arange(queries) % 3, 9, 1)
    found = (
        answers("raw query", "", before),
        answers("picture + edit", "", before),
        answers("untrained", "greedy", before),
        answers("GRPO", "greedy", after),
    )
    names = [f"name {row} {EVIL}" for row in range(corpus)]
    return results.TestSet("unseen", "edits", asked, found, names, picture or _picture)


def _picture(row):
    return Image.new("RGB", (64, 64), (200, 5 * (row % 50), 90))


class _Page(html.parser.HTMLParser):
    """The elements of a page; refuses tags that are not closed in their order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag, css=""):
        has = lambda a: not css or css in (a.get("class") or "").split()
        return [a for name, a in self.elements if name == tag and has(a)]


def _write(path, test_sets, **options):
    report.write(path, test_sets, LOG, {"seed": 0, "note": EVIL}, **options)
    text = (path / "report.html").read_text()
    return text, _Page(text)


def test_the_page_is_valid_and_refers_to_nothing_outside(tmp_path):
    text, parsed = _write(tmp_path, [_test_set()], config={"grpo": {"steps": 3}, "path": EVIL})
    assert text.lower().startswith("<!doctype html>")
    ids = [a["id"] for _, a in parsed.elements if "id" in a]
    assert len(ids) == len(set(ids)) > 10
    links = [
        a[key]
        for _, a in parsed.elements
        for key in ("src", "href", "xlink:href", "srcset", "action", "data")
        if key in a
    ]
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert all(link[1:] in ids for link in links if link.startswith("#"))
    urls = re.findall(r"url\((.*?)\)", text)
    assert urls and all(url.startswith(("#", "data:image/webp")) for url in urls)
    assert "@import" not in text and "fetch(" not in text and "XMLHttpRequest" not in text
    policy = next(a["content"] for a in parsed.all("meta") if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'")


def test_free_text_is_escaped(tmp_path):
    text, parsed = _write(tmp_path, [_test_set(text=EVIL)], config={"path": EVIL})
    of_figures = text.count('<style type="text/css">')
    assert len(parsed.all("script")) == 1 and len(parsed.all("style")) == 1 + of_figures
    assert "alert(1)" not in "".join(data for tag, data in parsed.texts if tag == "script")
    shown = "".join(data for _, data in parsed.texts)
    assert shown.count(" ".join(EVIL.split())) > 20  # whole, and as text
    labels = {a["aria-label"] for a in parsed.all("i")}
    assert any(EVIL in label for label in labels)


def test_the_wall_shows_each_query_with_its_pictures(tmp_path):
    test_set = _test_set()
    text, parsed = _write(tmp_path, [test_set])
    cards = parsed.all("li", "card")
    outcomes = ["gained", "unchanged", "lost"] * 2
    assert [card["data-outcome"] for card in cards] == outcomes
    assert [card["data-part"] for card in cards] == ["colour", EVIL] * 3
    # Query picture, target, and the five nearest before and after.
    assert len(parsed.all("i")) == len(cards) * (1 + 1 + 5 + 5)
    ticked = parsed.all("i", "right")
    assert len(ticked) == 2 + 2  # the first is found after training, the third was before
    assert all(a["aria-label"].endswith("right answer") for a in ticked)
    rows = {row for a in test_set.answers[2:] for row in a.nearest.ravel().tolist()}
    rows |= {row for query in test_set.queries for row in (*query.targets, query.image)}
    assert text.count("data:image/webp") == len(rows)  # each picture once


def test_every_control_has_a_name_and_every_table_its_heads(tmp_path):
    text, parsed = _write(tmp_path, [_test_set()])
    controls = len(parsed.all("select")) + len(parsed.all("input"))
    assert controls == 3 == len(re.findall(r"<label>[^<]+<(?:select|input)", text))
    assert all(a["aria-label"] for a in parsed.all("i"))
    assert all(a.get("scope") in ("col", "row") for a in parsed.all("th"))
    assert len(parsed.all("caption")) == len(parsed.all("table")) > 3


@pytest.mark.slow
def test_five_hundred_queries_of_noise_fit_the_limit():
    """Noise is the picture that compresses least, and most queries find pictures of their own."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8))
    test_set = _test_set(520, corpus=4000, picture=lambda row: noise, stride=4)
    numbers = {"test_sets": [results.numbers_of(test_set)], "about": {}}
    text = page.html(numbers, [test_set], [], "again", None)
    assert len(_Page(text).all("li", "card")) == page.WALL == 500
    assert "500 of 520 queries" in text
    assert text.count("data:image/webp") > 2000
    assert 2_000_000 < len(text.encode()) <= page.LIMIT == 6_000_000


@pytest.mark.parametrize("limit, fits", [(1_000_000, True), (12_000, True), (100, False)])
def test_thumbnails_shrink_until_they_fit(limit, fits):
    noise = np.random.default_rng(0).integers(0, 256, (128, 96, 4), np.uint8)
    pictures = {f"t{i}": lambda: Image.fromarray(noise) for i in range(10)}
    found = thumbnails.encode(pictures, limit)
    assert len(found) == (10 if fits else 0)
    assert sum(map(len, found.values())) <= limit
    if fits:
        width, height = Image.open(io.BytesIO(base64.b64decode(found["t0"].split(",")[1]))).size
        assert (height == 96) == (limit == 1_000_000) and width == 0.75 * height


def test_a_corpus_without_pictures_shows_names(tmp_path):
    test_set = dataclasses.replace(_test_set(), image=None)
    text, parsed = _write(tmp_path, [test_set])
    assert "data:image" not in text
    shown = [data for tag, data in parsed.texts if tag == "i"]
    assert len(shown) == 6 * 12 and all(name.startswith("name ") for name in shown)


def test_an_evaluation_without_answers_to_compare_has_no_wall(tmp_path):
    test_set = _test_set()
    raw = dataclasses.replace(test_set, answers=test_set.answers[:1])
    _, parsed = _write(tmp_path, [raw])
    assert not parsed.all("li", "card") and not parsed.all("script")
    for query in test_set.queries:
        query.targets = ()
    _, parsed = _write(tmp_path, [test_set])
    assert not parsed.all("li", "card") and not parsed.all("table")


def test_curves_are_thinned_out():
    long = [{"step": s, "phase": "grpo", "reward": (s * 7919) % 13} for s in range(1, 5001)]
    ((label, svg),) = figures.curve_svgs(long)
    assert label == "reward" and svg.startswith("<svg") and len(svg) < 60_000
    assert figures.curve_svgs([]) == []
