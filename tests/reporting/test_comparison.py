"""Several runs side by side: means, spread and paired differences, against plain NumPy."""

import copy
import json

import numpy as np
import pytest

from grape_jax.reporting import comparison, metrics
from grape_jax.runtime.errors import UserError

QUERIES, GROUPS = 30, 10


def _report(seed, cutoff=10):
    """A report.json with known ranks; the raw query's are the same in all runs."""
    trained = np.random.default_rng(seed).integers(1, 20, QUERIES)
    raw = np.random.default_rng(9).integers(1, 40, QUERIES)
    untrained = np.random.default_rng(8).integers(1, 60, QUERIES)
    ranks = {"raw query": raw, "untrained, greedy": untrained, "GRPO, greedy": trained}
    measure = f"recall_at_{cutoff}"
    methods = []
    for label, found in ranks.items():
        method, _, decoding = label.partition(", ")
        methods.append({"method": method, "decoding": decoding})
        methods[-1][measure] = {"mean": float(np.mean(found <= cutoff))}
    answers = [
        {
            "id": f"q{i}",
            "query": f"query {i}",
            "group": f"g{i % GROUPS}",
            "ranks": {label: [int(found[i])] for label, found in ranks.items()},
        }
        for i in range(QUERIES)
    ]
    answers.append(
        {"id": "withheld", "query": "?", "group": "w", "ranks": {label: [] for label in ranks}}
    )
    test_set = {
        "name": "unseen concepts",
        "shift": "noisy",
        "judged": QUERIES,
        "groups": GROUPS,
        "measure": measure,
        "trained": "GRPO",
        "best_baseline": "raw query",
        "methods": methods,
        "answers": answers,
    }
    return {"test_sets": [test_set]}


def _hits(report, label):
    cutoff = int(report["test_sets"][0]["measure"].rsplit("_", 1)[1])
    judged = [a["ranks"][label] for a in report["test_sets"][0]["answers"] if a["ranks"][label]]
    return np.array([float(rank <= cutoff) for (rank,) in judged])


@pytest.mark.parametrize("cutoff", [1, 10])
def test_means_spread_and_paired_differences(cutoff):
    reports = {f"seed{i}": _report(i, cutoff) for i in range(3)}
    (found,) = comparison.compare(reports)["test_sets"]
    hits = np.array([_hits(report, "GRPO, greedy") for report in reports.values()])
    row = next(m for m in found["methods"] if m["method"] == "GRPO, greedy")
    assert row["runs"] == pytest.approx(hits.mean(axis=1))
    assert row["mean"] == pytest.approx(hits.mean())
    assert row["sd"] == pytest.approx(hits.mean(axis=1).std(ddof=1))
    assert (row["low"], row["high"]) == pytest.approx((hits.mean(1).min(), hits.mean(1).max()))

    raw = _hits(reports["seed0"], "raw query")
    groups = np.array([f"g{i % GROUPS}" for i in range(QUERIES)])
    against = {row["baseline"]: row for row in found["against_baselines"]}
    assert [*against] == ["untrained", "raw query", "best baseline"]
    assert against["best baseline"]["all"] == against["raw query"]["all"]
    for interval, values in zip(
        [*against["raw query"]["runs"], against["raw query"]["all"]],
        [*(hits - raw), hits.mean(axis=0) - raw],
        strict=True,
    ):
        (wanted,) = metrics.clustered_bootstrap(values[:, None], groups)
        assert interval["mean"] == pytest.approx(values.mean())
        assert (interval["low"], interval["high"]) == pytest.approx((wanted.low, wanted.high))

    between = found["between_runs"]
    assert [(row["a"], row["b"]) for row in between] == [("seed1", "seed0"), ("seed2", "seed0")]
    assert between[1]["mean"] == pytest.approx((hits[2] - hits[0]).mean())
    (p,) = metrics.sign_flip_test((hits[2] - hits[0])[:, None], groups)
    assert between[1]["p"] == pytest.approx(p)


def test_the_text_has_every_run_and_number():
    reports = {"a": _report(0), "b|c": _report(1)}
    text = comparison.as_markdown(comparison.compare(reports))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in rows[:5]}) == 1  # aligned
    assert "b\\|c" in rows[0]
    mean = np.mean([_hits(report, "GRPO, greedy").mean() for report in reports.values()])
    row = next(line for line in rows if line.startswith("| GRPO, greedy"))
    assert row.split("|")[4].strip() == f"{100 * mean:.1f}"


def test_only_what_all_runs_have_is_compared():
    one, two = _report(0), _report(1)
    extra = copy.deepcopy(two["test_sets"][0]) | {"name": "seen concepts"}
    two["test_sets"].append(extra)
    two["test_sets"][0]["methods"].append({"method": "HyDE", "decoding": ""} | {
        "recall_at_10": {"mean": 1.0}
    })  # fmt: skip
    found = comparison.compare({"a": one, "b": two})
    assert found["left_out"] == ["noisy seen concepts"]
    assert "HyDE" not in [row["method"] for row in found["test_sets"][0]["methods"]]
    for report in (one, two):
        report["test_sets"][0]["trained"] = None
    (untrained,) = comparison.compare({"a": one, "b": two})["test_sets"]
    assert untrained["against_baselines"] == untrained["between_runs"] == []


def _write(folder, report):
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(report))
    return str(folder)


def test_runs_have_short_names_where_they_differ(tmp_path):
    runs = [_write(tmp_path / name, _report(0)) for name in ("one/x", "two/x", "y")]
    assert [*comparison.read(runs[1:])] == ["x", "y"]
    assert [*comparison.read(runs[:2])] == runs[:2]


def test_mistakes_say_what_to_do(tmp_path):
    one, two = _report(0), _report(1)
    two["test_sets"][0]["answers"][3]["query"] = "another"
    with pytest.raises(UserError, match=r"a and b have different queries.*test_limit"):
        comparison.compare({"a": one, "b": two})
    two["test_sets"][0]["shift"] = "long"
    with pytest.raises(UserError, match="no judged test set in common"):
        comparison.compare({"a": one, "b": two})
    run = _write(tmp_path / "run", one)
    with pytest.raises(UserError, match="two runs or more"):
        comparison.read([run, run])
    with pytest.raises(UserError, match=r"has no report\.json"):
        comparison.read([run, str(tmp_path / "none")])
    old = copy.deepcopy(one)
    del old["test_sets"][0]["measure"]
    with pytest.raises(UserError, match="earlier version"):
        comparison.read([run, _write(tmp_path / "old", old)])
    (tmp_path / "run" / "report.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        comparison.read([run, str(tmp_path / "old")])
