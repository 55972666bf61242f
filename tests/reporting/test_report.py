"""The report's numbers, its honesty about them, and its pictures."""

import dataclasses
import json
import types

import numpy as np
import pytest
from PIL import Image

from grape_jax.reporting import contact_sheet, examples, figures, metrics, report, results
from grape_jax.runtime.errors import UserError
from grape_jax.types import NO_RANK

QUERIES = 40
CORPUS = 50
NAMES = [f"name {row}" for row in range(CORPUS)]


def _queries(languages=("en",)):
    return [
        types.SimpleNamespace(
            id=f"q{i}",
            text=f"query | {i}",
            language=languages[i % len(languages)],
            group=f"c{i // 2}",
            targets=(i,),
            reference=f"name {i}",
            image=-1,
            kind="",
        )
        for i in range(QUERIES)
    ]


def _answers(method, decoding, ranks):
    nearest = np.tile(np.arange(5), (QUERIES, 1)) + QUERIES
    for i, rank in enumerate(ranks):
        if rank <= 5:
            nearest[i, rank - 1] = i
    texts = tuple(f"{method} {i}" for i in range(QUERIES))
    return results.Answers(method, decoding, texts, np.asarray(ranks)[:, None], nearest)


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
        _answers("reference text", "", np.ones(QUERIES, int)),
    ]
    return results.TestSet(
        "unseen concepts", "noisy", _queries(languages), tuple(answers), NAMES, _picture
    )


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
    assert scores["mrr"]["mean"] == pytest.approx(np.mean(1 / grpo.ranks))
    assert scores["median_rank"] == np.median(grpo.ranks)
    assert "hit_at_5" not in scores  # the same as recall where a query has one right picture
    difference = found["differences"][0]
    gained = 1.0 * (grpo.ranks <= 10) - 1.0 * (untrained.ranks <= 10)
    (wanted,) = metrics.clustered_bootstrap(gained, test_set.groups)
    assert (difference["a"], difference["b"]) == ("GRPO", "untrained")
    assert difference["recall_at_10"]["low"] == pytest.approx(wanted.low)
    (p,) = metrics.sign_flip_test(gained, test_set.groups)
    assert difference["recall_at_10"]["p"] == pytest.approx(p)
    assert found["answers"][3]["ranks"]["GRPO, greedy"] == grpo.ranks[3].tolist()
    assert found["answers"][3]["searched"]["raw query"] == "raw query 3"


def test_markdown_shows_the_methods_in_order_and_only_those_present(tmp_path):
    _write(tmp_path, [_test_set()])
    text = (tmp_path / "report.md").read_text()
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    wanted = ["raw query", "untrained, greedy", "untrained, sampled", "warm-up, greedy"]
    wanted += ["GRPO, greedy", "GRPO, sampled", "reference text"]
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
    _write(
        tmp_path, [results.TestSet("unseen concepts", "long", _queries(), answers, NAMES, _picture)]
    )
    text = (tmp_path / "report.md").read_text()
    assert said in text.split("##")[0]
    assert ("cannot be told from zero" in text) == (gain == 0)


@pytest.mark.parametrize(
    "raw, said", [(1, "as it was written finds more"), (31, "the rewrite finds more"), (16, "told")]
)
def test_headline_compares_with_no_rewriting_at_all(tmp_path, raw, said):
    untrained, trained, queried = (np.full(QUERIES, rank) for rank in (31, 31, raw))
    trained[::2] = 1
    if raw == 16:
        queried = trained
    answers = (
        _answers("raw query", "", queried),
        _answers("untrained", "greedy", untrained),
        _answers("GRPO", "greedy", trained),
    )
    _write(tmp_path, [results.TestSet("unseen", "long", _queries(), answers, NAMES, _picture)])
    headline = (tmp_path / "report.md").read_text().split("##")[0]
    assert said in headline.split("GRPO − raw query is")[1]


def test_the_summary_has_raw_untrained_trained_and_the_best_baseline(tmp_path):
    """With the intervals of report.json, in six lines; the oracle is no baseline."""
    test_set = _test_set()
    hyde = _answers("HyDE", "", np.where(np.arange(QUERIES) % 4, 3, 30))
    fused = _answers("GRPO + query", "greedy", np.ones(QUERIES, int))
    first = dataclasses.replace(test_set, answers=(*test_set.answers, hyde, fused))
    second = dataclasses.replace(test_set, shift="long")
    seen = dataclasses.replace(first, name="seen concepts")
    numbers = _write(tmp_path, [first, second, seen])
    lines = report.summary(numbers)
    assert len(lines) <= 6 and all(len(line) <= 100 for line in lines)
    assert "unseen concepts" in lines[0] and "95 %" in lines[0]
    assert "noisy" in lines[1] and "long" in lines[1]
    table = {line[: report.NAME_WIDTH].strip(): line for line in lines[2:]}
    assert [*table] == ["raw query", "untrained", "trained (GRPO)", "best baseline"]
    methods = {"raw query": "raw query", "untrained": "untrained", "trained (GRPO)": "GRPO"}
    for found in numbers["test_sets"][:2]:
        scores = {(m["method"], m["decoding"]): m["recall_at_10"] for m in found["methods"]}
        for line, method in methods.items():
            score = scores.get((method, "greedy")) or scores[method, ""]
            shown = [f"{100 * score[key]:.1f}" for key in ("mean", "low", "high")]
            assert "{} [{}, {}]".format(*shown) in table[line]
    best = table["best baseline"]
    assert "75.0 [" in best and "HyDE" in best and "reference text" not in best
    assert "GRPO" not in best and ("raw query" in best) != ("untrained" in best)


def test_the_summary_before_training_and_without_known_answers(tmp_path):
    test_set = _test_set()
    untrained = tuple(a for a in test_set.answers if a.method in ("raw query", "untrained"))
    before = dataclasses.replace(test_set, answers=untrained)
    lines = report.summary(_write(tmp_path, [before], log=[]))
    assert len(lines) == 5 and not any("trained (" in line for line in lines)
    for query in before.queries:
        query.targets = ()
    assert report.summary(_write(tmp_path, [before], log=[])) == []


def test_an_evaluation_before_training(tmp_path):
    test_set = _test_set()
    untrained = tuple(a for a in test_set.answers if a.method in ("raw query", "untrained"))
    before = dataclasses.replace(test_set, answers=untrained)
    _write(tmp_path, [before], log=[])
    text = (tmp_path / "report.md").read_text()
    assert "Nothing has been trained yet" in text and "GRPO" not in text
    assert not (tmp_path / "curves.png").exists() and "curves.png" not in text


@pytest.mark.slow
def test_languages_appear_where_there_are_several(tmp_path):
    numbers = _write(tmp_path, [_test_set(("de", "fr", "ar"))])
    languages = numbers["test_sets"][0]["languages"]
    assert [part["language"] for part in languages] == ["ar", "de", "fr"]
    assert sum(part["queries"] for part in languages) == QUERIES
    text = (tmp_path / "report.md").read_text()
    assert "By language" in text and "languages.png" in text
    assert Image.open(tmp_path / "languages.png").convert("L").getextrema()[0] < 60
    assert _write(tmp_path, [_test_set()])["test_sets"][0]["languages"] == []


def test_every_shift_has_its_headline_and_examples(tmp_path):
    first = _test_set()
    second = dataclasses.replace(first, shift="long")
    seen = dataclasses.replace(second, name="seen concepts")
    _write(tmp_path, [first, second, seen])
    text = (tmp_path / "report.md").read_text()
    assert text.split("##")[0].count("**Training ") == 2
    assert text.count("Drawn at random") == 2
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert len(set(headings)) == len(headings)


def test_writing_leaves_whole_files_only(tmp_path):
    _write(tmp_path, [_test_set(), _test_set()])
    images = {"curves.png", "before_after.png", "gains_and_losses.png"}
    reports = {"report.json", "report.md", "report.html"}
    assert {path.name for path in tmp_path.iterdir()} == reports | images
    for name in images:
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
    assert examples.split(gains, losses, 12) == wanted


def test_examples_are_drawn_from_all_that_moved():
    found = examples.random_sample(_test_set())
    moved = found.before.ranks - found.after.ranks
    signs = [int(np.sign(moved[index, 0])) for index in found.chosen]
    assert signs == sorted(signs, reverse=True) and 0 not in signs
    assert len(set(found.chosen)) == examples.DRAWN
    assert found.before.label == "untrained, greedy"
    assert found.after.label == "GRPO, greedy"


def test_the_largest_gains_and_losses_are_the_largest_factors():
    test_set = _test_set()
    found = examples.largest_changes(test_set, 4)
    assert found.before.label == "raw query" and found.after.label == "GRPO, greedy"
    factor = (found.before.ranks / found.after.ranks)[:, 0]
    best_of_group = {}
    for i in range(QUERIES):
        best_of_group.setdefault(i // 2, []).append(factor[i])
    gains = sorted((max(both) for both in best_of_group.values()), reverse=True)
    losses = sorted(min(both) for both in best_of_group.values())
    wanted = [x for x in gains[:4] if x > 1] + [x for x in losses[:4] if x < 1]
    assert [factor[index] for index in found.chosen] == wanted
    assert any(x < 1 for x in wanted) and wanted[0] > 10


@pytest.mark.slow
def test_several_right_pictures_have_a_hit_rate_of_their_own(tmp_path):
    two = [
        types.SimpleNamespace(**vars(q) | {"targets": (i, i + 1)}) for i, q in enumerate(_queries())
    ]
    ranks = np.stack([np.arange(1, QUERIES + 1), np.arange(7, QUERIES + 7)], axis=1)
    answers = dataclasses.replace(_answers("raw query", "", ranks[:, 0]), ranks=ranks)
    numbers = _write(tmp_path, [results.TestSet("test", "two", two, (answers,), NAMES, None)])
    (scores,) = numbers["test_sets"][0]["methods"]
    assert scores["hit_at_10"]["mean"] == 10 / QUERIES
    assert scores["recall_at_10"]["mean"] == (10 + 4) / 2 / QUERIES
    assert scores["median_rank"] == np.median(np.arange(1, QUERIES + 1))
    text = (tmp_path / "report.md").read_text()
    assert "several right answers" in text and "| hit@10 |" in text


def test_queries_whose_truth_is_withheld_count_nowhere(tmp_path):
    """Half of them, then all; and pictures that are not there are not drawn."""
    whole = _test_set()

    def withheld(count):
        queries = _queries()
        answers = [dataclasses.replace(a, ranks=a.ranks.copy()) for a in whole.answers]
        for i in range(count):
            queries[i].targets = ()
            for one in answers:
                one.ranks[i] = NO_RANK
        return results.TestSet(whole.name, whole.shift, queries, tuple(answers), NAMES, None)

    found = _write(tmp_path, [withheld(QUERIES // 2)])["test_sets"][0]
    assert (found["queries"], found["judged"]) == (QUERIES, QUERIES // 2)
    grpo = next(m for m in found["methods"] if m["method"] == "GRPO")
    ranks = whole.find("GRPO", "greedy").ranks[QUERIES // 2 :]
    assert grpo["recall_at_10"]["mean"] == pytest.approx(np.mean(ranks <= 10))
    assert not (tmp_path / "before_after.png").exists()
    assert "| query |" in (tmp_path / "report.md").read_text()  # the examples' texts are

    found = _write(tmp_path / "all", [withheld(QUERIES)])["test_sets"][0]
    assert (found["judged"], found["methods"], found["differences"]) == (0, [], [])
    assert "are withheld" in (tmp_path / "all" / "report.md").read_text()


def test_one_query_has_a_report(tmp_path):
    answers = results.Answers(
        "raw query", "", ("",), np.array([[3]]), np.array([[4, 3, 0, -1, -1]])
    )
    numbers = _write(
        tmp_path, [results.TestSet("test", "one", _queries()[:1], (answers,), NAMES, None)]
    )
    (scores,) = numbers["test_sets"][0]["methods"]
    assert scores["recall_at_5"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert numbers["test_sets"][0]["lengths"] == []


def test_a_subset_has_its_own_recall():
    """CIRR's, against a reference computation of its own."""
    test_set = _test_set()
    subset = np.random.default_rng(1).integers(1, 6, (QUERIES, 1))
    answers = tuple(dataclasses.replace(a, subset_ranks=subset) for a in test_set.answers)
    numbers = results.numbers_of(dataclasses.replace(test_set, answers=answers))
    for k in (1, 2, 3):
        for scores in numbers["methods"]:
            assert scores[f"subset_recall_at_{k}"]["mean"] == pytest.approx(np.mean(subset <= k))


def test_thirds_by_length_hold_every_query_once():
    queries = _queries()
    for i, query in enumerate(queries):
        query.text = "x" * (1 + i % 7)
    test_set = dataclasses.replace(_test_set(), queries=queries)
    parts = results.numbers_of(test_set)["lengths"]
    assert [part["length"] for part in parts] == [
        "1 to 3 characters", "4 to 5 characters", "6 to 7 characters",
    ]  # fmt: skip
    assert sum(part["queries"] for part in parts) == QUERIES
    short = np.array([len(query.text) <= 3 for query in queries])
    raw = test_set.find("raw query").ranks[short]
    scores = next(m for m in parts[0]["methods"] if m["method"] == "raw query")
    assert scores["recall_at_10"]["mean"] == pytest.approx(np.mean(raw <= 10))
    for query in queries:
        query.text = "all alike"
    assert results.numbers_of(test_set)["lengths"] == []


def test_the_mean_of_languages_counts_each_alike():
    numbers = results.numbers_of(_test_set(("de", "de", "de", "fr")))
    de, fr = (part["methods"][0]["recall_at_10"]["mean"] for part in numbers["languages"])
    assert numbers["mean_of_languages"][0]["recall_at_10"] == pytest.approx((de + fr) / 2)
    assert numbers["methods"][0]["recall_at_10"]["mean"] == pytest.approx((3 * de + fr) / 4)


def test_a_method_that_misses_queries_is_refused():
    test_set = _test_set()
    short = dataclasses.replace(test_set.answers[0], ranks=np.ones((3, 1), int))
    with pytest.raises(UserError, match="answers 3 of 40"):
        results.numbers_of(dataclasses.replace(test_set, answers=(short,)))
    with pytest.raises(UserError, match="is empty"):
        results.numbers_of(dataclasses.replace(test_set, queries=[], answers=()))


def test_steps_count_on_where_a_phase_starts_again_and_repeats_are_dropped():
    log = [{"step": s, "phase": "warm-up", "loss": 1.0} for s in (1, 2, 3)]
    log += [{"step": s, "phase": "grpo", "reward": 0.0} for s in (1, 2)]
    log += [{"step": 2, "phase": "grpo", "reward": 5.0}, {"step": 3, "phase": "grpo"}]
    lines = figures._on_one_axis(log)
    assert [line["x"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[4]["reward"] == 5.0
    counted_on = [{"step": 1, "phase": "warm-up"}, {"step": 2, "phase": "grpo"}]
    assert [line["x"] for line in figures._on_one_axis(counted_on)] == [1, 2]


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


def test_a_composed_query_is_drawn_with_its_own_picture(tmp_path):
    """Once for a query, above its searches; the same words about another picture are another."""
    purple, other = (Image.new("RGB", (64, 64), colour) for colour in ("purple", "olive"))
    found = [Image.new("RGB", (64, 64), "white")] * 5
    # A corpus opens its pictures anew whenever they are asked for.
    row = lambda picture: contact_sheet.Row("in red", "a rewrite", found, None, "", picture.copy())
    rows = [row(purple), row(purple), row(other), row(other)]
    assert [len(group) for group in contact_sheet._groups(rows, columns=1)] == [2, 2]
    contact_sheet.contact_sheet(rows, tmp_path / "composed.png")
    sheet = np.asarray(Image.open(tmp_path / "composed.png").convert("RGB"))
    for colour in ((128, 0, 128), (128, 128, 0)):
        drawn = (sheet == colour).all(axis=-1)
        assert drawn.any(axis=0).sum() == drawn.any(axis=1).sum() == contact_sheet.THUMB - 12


def _composed(named):
    test_set = _test_set()
    queries = [types.SimpleNamespace(**vars(q) | {"image": 49}) for q in test_set.queries]
    return dataclasses.replace(test_set, queries=queries, named=named)


def _edits(trained_at_1):
    """Composed queries of two kinds with every baseline, of which caption + edit is the best."""
    first = lambda share: np.where(np.arange(QUERIES) < share * QUERIES, 1, 7)
    answers = [
        _answers("raw query", "", first(0.1)),
        _answers("picture alone", "", first(0.2)),
        dataclasses.replace(_answers("picture + edit", "", first(0.3)), note="0.4 of the picture"),
        _answers("caption + edit", "", first(0.5)),
        _answers("untrained", "greedy", first(0.05)),
        _answers("untrained", "sampled", first(0.05)),
        _answers("GRPO", "greedy", first(trained_at_1)),
        _answers("GRPO", "sampled", first(trained_at_1)),
        _answers("reference text", "", first(1)),
    ]
    subset = np.tile([[1], [2]], (QUERIES // 2, 1))
    answers = [dataclasses.replace(one, subset_ranks=subset) for one in answers]
    queries = _queries()
    for i, query in enumerate(queries):
        query.image, query.kind = 49, ("colour", "gender")[i % 2]
    return results.TestSet("unseen", "edits", queries, tuple(answers), NAMES, _picture)


@pytest.mark.parametrize(
    "share, said", [(0.9, "more than"), (0.525, "about as many as"), (0.15, "fewer than")]
)
def test_composed_queries_are_compared_with_the_best_baseline_at_rank_one(tmp_path, share, said):
    test_set = _edits(share)
    numbers = _write(tmp_path, [test_set])
    (found,) = numbers["test_sets"]
    assert (found["measure"], found["best_baseline"]) == ("recall_at_1", "caption + edit")
    differences = {(d["a"], d["b"], d["decoding"]): d for d in found["differences"]}
    trained, best = test_set.find("GRPO", "greedy"), test_set.find("caption + edit")
    gained = 1.0 * (trained.ranks == 1) - 1.0 * (best.ranks == 1)
    (wanted,) = metrics.clustered_bootstrap(gained, test_set.groups)
    interval = differences["GRPO", "caption + edit", "greedy"]["recall_at_1"]
    assert (interval["mean"], interval["low"]) == pytest.approx((wanted.mean, wanted.low))
    baselines = {"untrained", "raw query", "picture alone", "picture + edit", "caption + edit"}
    assert {b for a, b, decoding in differences if (a, decoding) == ("GRPO", "greedy")} == baselines
    text = (tmp_path / "report.md").read_text()
    opening, table = text.split("## ")[0], text.split("### Differences")[1].split("###")[0]
    assert f"{said} the best baseline, caption + edit, with 50.0 %" in opening
    shown = [f"{100 * x:.1f}".replace("-", "−") for x in (wanted.low, wanted.high)]
    assert "[{}, {}] points of Recall@1".format(*shown) in opening
    assert "R@10" not in opening + table and "subset R@1, points" in table
    assert "0.4 of the picture" in text and "without the picture" in text  # the legend


@pytest.mark.slow
def test_the_summary_of_composed_queries_is_of_rank_one(tmp_path):
    edits, plain = _edits(0.9), dataclasses.replace(_test_set(), name="unseen")
    lines = report.summary(_write(tmp_path, [edits]))
    assert len(lines) == 6 and lines[0].startswith("Recall@1 ")
    assert "90.0 [" in lines[4] and "50.0 [" in lines[5] and "caption + edit" in lines[5]
    lines = report.summary(_write(tmp_path, [edits, plain]))
    assert len(lines) == 6 and "R@1" in lines[1] and "R@10" in lines[1]


def test_kinds_of_changes_have_their_recall(tmp_path):
    test_set = _edits(0.45)
    (numbers,) = _write(tmp_path, [test_set])["test_sets"]
    assert [part["kind"] for part in numbers["kinds"]] == ["colour", "gender"]
    colour = np.array([query.kind == "colour" for query in test_set.queries])
    for part, inside in zip(numbers["kinds"], (colour, ~colour), strict=True):
        scores = next(
            m for m in part["methods"] if (m["method"], m["decoding"]) == ("GRPO", "greedy")
        )
        ranks = test_set.find("GRPO", "greedy").ranks[inside]
        assert scores["recall_at_1"]["mean"] == pytest.approx(np.mean(ranks == 1))
        assert part["queries"] == inside.sum()
    assert "### By kind" in (tmp_path / "report.md").read_text()
    for query in test_set.queries:
        query.kind = ""
    assert results.numbers_of(test_set)["kinds"] == []


@pytest.mark.parametrize("named", [True, False])
def test_ids_are_no_titles_and_the_query_picture_is_shown(tmp_path, monkeypatch, named):
    drawn = {}
    keep = lambda rows, path, wanted, **_: drawn.update({path.name: (rows, wanted)})
    monkeypatch.setattr(examples, "contact_sheet", keep)
    _write(tmp_path, [_composed(named)])
    for name in ("before_after.png", "gains_and_losses.png"):
        rows, wanted = drawn[name]
        assert all(row.picture.getpixel((0, 0)) == (200, 5 * 49, 90) for row in rows)
        titles = {title for _, title in wanted}
        assert titles <= set(NAMES) if named else titles == {"right picture"}
    text = (tmp_path / "report.md").read_text()
    assert "| query picture | query |" in text and "| name 49 | query" in text


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
