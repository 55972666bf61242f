"""The report's numbers, its honesty about them, and its pictures."""

import json
import types

import numpy as np
import pytest
from PIL import Image

from grape_jax import contact_sheet, metrics, report

QUERIES = 40
CORPUS = 50


def _queries(languages=("en",)):
    return [
        types.SimpleNamespace(
            id=f"q{i}",
            text=f"query | {i}",
            language=languages[i % len(languages)],
            group=f"c{i // 2}",
            targets=(i,),
            reference=f"name {i}",
        )
        for i in range(QUERIES)
    ]


def _answers(method, decoding, ranks):
    nearest = np.tile(np.arange(5), (QUERIES, 1)) + QUERIES
    for i, rank in enumerate(ranks):
        if rank <= 5:
            nearest[i, rank - 1] = i
    texts = tuple(f"{method} {i}" for i in range(QUERIES))
    return report.Answers(method, decoding, texts, np.asarray(ranks), nearest)


def _test_set(languages=("en",)):
    generator = np.random.default_rng(0)
    draw = lambda top: generator.integers(1, top, size=QUERIES)
    answers = [
        _answers("GRPO", "greedy", draw(12)),
        _answers("GRPO", "sampled", draw(15)),
        _answers("warm-up", "greedy", draw(14)),
        _answers("untrained", "greedy", draw(40)),
        _answers("untrained", "sampled", draw(50)),
        _answers("raw query", "", draw(40)),
        _answers("English name", "", np.ones(QUERIES, int)),
    ]
    return report.TestSet("unseen concepts", "noisy", _queries(languages), tuple(answers), _picture)


def _picture(row):
    return Image.new("RGB", (64, 64), (200, 5 * (row % CORPUS), 90))


LOG = [
    *({"step": s, "phase": "warm-up", "loss": 1 / s} for s in range(1, 6)),
    *({"step": s, "phase": "grpo", "reward": 0.1 * s, "kl": None} for s in range(1, 9)),
    {"step": 9, "phase": "grpo", "validation_recall_at_10": 0.5, "reward": float("nan")},
    {"note": "a line without a step"},
]


def _write(path, test_sets, log=LOG):
    return report.write(path, test_sets, log, {"seed": np.int64(7)})


def test_json_holds_the_numbers_of_the_ranks(tmp_path):
    test_set = _test_set()
    _write(tmp_path, [test_set])
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["about"]["seed"] == 7
    found = numbers["test_sets"][0]
    grpo, untrained = test_set.find("GRPO", "greedy"), test_set.find("untrained", "greedy")
    scores = next(m for m in found["methods"] if (m["method"], m["decoding"]) == ("GRPO", "greedy"))
    assert scores["recall_at_5"]["mean"] == pytest.approx(np.mean(grpo.ranks <= 5))
    assert scores["median_rank"] == np.median(grpo.ranks)
    difference = found["differences"][0]
    wanted = metrics.paired_difference(grpo.ranks <= 10.0, untrained.ranks <= 10, test_set.concepts)
    assert (difference["a"], difference["b"]) == ("GRPO", "untrained")
    assert difference["recall_at_10"]["low"] == pytest.approx(wanted.low)
    assert found["answers"][3]["rank"]["GRPO, greedy"] == grpo.ranks[3]
    assert found["answers"][3]["searched"]["raw query"] == "raw query 3"


def test_markdown_shows_the_methods_in_order_and_only_those_present(tmp_path):
    _write(tmp_path, [_test_set()])
    text = (tmp_path / "report.md").read_text()
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    wanted = ["raw query", "untrained, greedy", "untrained, sampled", "warm-up, greedy"]
    wanted += ["GRPO, greedy", "GRPO, sampled", "English name"]
    assert rows[2 : 2 + len(wanted)] == wanted
    assert "constant caption" not in text and "warm-up, sampled" not in text
    assert "before_after.png" in text and "curves.png" in text
    assert "query \\| " in text  # a query cannot break its table
    assert f"--workdir={tmp_path}" in text


@pytest.mark.parametrize("gain, said", [(30, "is clear of zero"), (0, "contains zero")])
def test_headline_says_when_zero_is_inside(tmp_path, gain, said):
    before = np.full(QUERIES, 31)
    before[::3] = 1
    after = before - np.where(before > 1, gain, 0)
    answers = (_answers("untrained", "greedy", before), _answers("GRPO", "greedy", after))
    _write(tmp_path, [report.TestSet("unseen concepts", "long", _queries(), answers, _picture)])
    text = (tmp_path / "report.md").read_text()
    assert said in text.split("##")[0]
    assert ("cannot be told from zero" in text) == (gain == 0)


def test_an_evaluation_before_training(tmp_path):
    test_set = _test_set()
    untrained = tuple(a for a in test_set.answers if a.method in ("raw query", "untrained"))
    before = report.TestSet(test_set.name, test_set.shift, test_set.queries, untrained, _picture)
    _write(tmp_path, [before], log=[])
    text = (tmp_path / "report.md").read_text()
    assert "Nothing has been trained yet" in text and "GRPO" not in text
    assert not (tmp_path / "curves.png").exists() and "curves.png" not in text


def test_languages_appear_where_there_are_several(tmp_path):
    numbers = _write(tmp_path, [_test_set(("de", "fr", "ar"))])
    languages = numbers["test_sets"][0]["languages"]
    assert [part["language"] for part in languages] == ["ar", "de", "fr"]
    assert sum(part["queries"] for part in languages) == QUERIES
    assert "By language" in (tmp_path / "report.md").read_text()
    assert _write(tmp_path, [_test_set()])["test_sets"][0]["languages"] == []


def test_every_shift_has_its_headline_and_examples(tmp_path):
    first = _test_set()
    second = report.TestSet(first.name, "long", first.queries, first.answers, _picture)
    seen = report.TestSet("seen concepts", "long", first.queries, first.answers, _picture)
    _write(tmp_path, [first, second, seen])
    text = (tmp_path / "report.md").read_text()
    assert text.split("##")[0].count("**Training ") == 2
    assert text.count("Drawn at random") == 2
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert len(set(headings)) == len(headings)


def test_writing_leaves_whole_files_only(tmp_path):
    _write(tmp_path, [_test_set(), _test_set()])
    names = {"report.json", "report.md", "curves.png", "before_after.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in ("curves.png", "before_after.png"):
        assert Image.open(tmp_path / name).convert("L").getextrema()[0] < 60


@pytest.mark.parametrize(
    "gains, losses, wanted",
    [
        (80, 40, (8, 4)),
        (100, 1, (11, 1)),
        (100, 3, (10, 2)),
        (3, 100, (2, 10)),
        (5, 0, (5, 0)),
        (0, 20, (0, 12)),
        (2, 2, (2, 2)),
        (9, 2, (9, 2)),
    ],
)
def test_examples_follow_the_proportion_of_gains_and_losses(gains, losses, wanted):
    assert report._split(gains, losses, 12) == wanted


def test_examples_are_drawn_from_all_that_moved():
    examples = report._examples(_test_set())
    moved = examples.before.ranks - examples.after.ranks
    signs = [int(np.sign(moved[index])) for index in examples.chosen]
    assert signs == sorted(signs, reverse=True) and 0 not in signs
    assert len(set(examples.chosen)) == report.EXAMPLES
    assert examples.before.label == "untrained, greedy"
    assert examples.after.label == "GRPO, greedy"


def test_steps_count_on_where_a_phase_starts_again_and_repeats_are_dropped():
    log = [{"step": s, "phase": "warm-up", "loss": 1.0} for s in (1, 2, 3)]
    log += [{"step": s, "phase": "grpo", "reward": 0.0} for s in (1, 2)]
    log += [{"step": 2, "phase": "grpo", "reward": 5.0}, {"step": 3, "phase": "grpo"}]
    lines = report._on_one_axis(log)
    assert [line["x"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[4]["reward"] == 5.0
    counted_on = [{"step": 1, "phase": "warm-up"}, {"step": 2, "phase": "grpo"}]
    assert [line["x"] for line in report._on_one_axis(counted_on)] == [1, 2]


def test_contact_sheet_frames_the_right_picture_in_green(tmp_path):
    pictures = [Image.new("RGB", (64, 64), "white")] * 5
    sheets = []
    for right in (None, 0, 4):
        path = tmp_path / f"{right}.png"
        contact_sheet.contact_sheet([("a query", "a rewrite", pictures, right, "rank 1")], path)
        sheet = np.asarray(Image.open(path).convert("RGB")).astype(int)
        green = (sheet == (0x1A, 0x8F, 0x3C)).all(axis=-1)
        sheets.append(np.flatnonzero(green.any(axis=0)))
    nowhere, first, last = sheets
    assert len(nowhere) == 0
    assert first.min() == contact_sheet.MARGIN and np.ptp(first) == contact_sheet.THUMB - 1
    assert (
        last.max() == contact_sheet.MARGIN + contact_sheet.STRIP - 1
        and np.ptp(last) == contact_sheet.THUMB - 1
    )


def test_queries_that_are_worded_alike_stay_apart():
    row = contact_sheet.Row("the same words", "a rewrite", [], None, "")
    assert [len(group) for group in contact_sheet._groups([row] * 4, columns=2)] == [2, 2]
    assert [len(group) for group in contact_sheet._groups([row] * 4, columns=1)] == [4]


def test_contact_sheet_takes_an_empty_rewrite_and_fewer_pictures(tmp_path):
    contact_sheet.contact_sheet([("", "", [_picture(1)], None, "")], tmp_path / "one.png")
    assert Image.open(tmp_path / "one.png").width > contact_sheet.STRIP


@pytest.mark.parametrize(
    "text", ["猫の顔", "고양이", "وجه قطة", "лицо кота", "a 🐱 face", "\x00\ud800"]
)
def test_any_script_is_drawn_without_boxes_or_warnings(text, recwarn):
    font, drawn = contact_sheet._drawable(text, bold=False)
    needed = {c for c in drawn if c.isprintable() and not c.isspace()}
    assert needed <= contact_sheet._characters(font)
    contact_sheet._Text(text, 14, 300, lines=1)
    assert not recwarn.list


def test_a_script_without_a_font_is_named(monkeypatch):
    monkeypatch.setattr(contact_sheet, "_system_fonts", lambda: ())
    _, drawn = contact_sheet._drawable("a 고양이 cat", bold=False)
    assert drawn == "a [no hangul font] cat"


def test_long_text_is_shortened_to_its_width():
    text = contact_sheet._Text("word " * 200, 14, 300, lines=2)
    assert len(text.lines) == 2 and text.lines[1].endswith("…")
    assert all(text.font.getlength(line) <= 300 for line in text.lines)
    unbroken = contact_sheet._Text("x" * 500, 14, 300, lines=3)
    assert len(unbroken.lines) == 3
