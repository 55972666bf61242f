"""Several runs or seeds side by side, from their report.json."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grape_jax.reporting import metrics, wording
from grape_jax.reporting.tables import Table
from grape_jax.runtime import files
from grape_jax.runtime.errors import UserError

BASELINES = ("untrained", "raw query", "best baseline")  # that trained rewrites are compared with
NOTE = (
    "sd is the standard deviation between runs, which shows the luck of training. Intervals (95 %, "
    "bootstrap over groups) cover the choice of test queries; for all runs, each query counts with "
    "its mean over the runs."
)


def read(workdirs: Sequence[str]) -> dict[str, dict]:
    """The report.json of each run, by a short name of the run.

    Raises:
      UserError: fewer than two runs are given, or one has no readable report.
    """
    if len(set(workdirs)) < 2:
        raise UserError("--compare needs two runs or more: --compare runs/a runs/b.")
    last = [Path(name).name for name in workdirs]
    names = last if len(set(last)) == len(last) else list(workdirs)
    return {name: _report(Path(run)) for name, run in zip(names, workdirs, strict=True)}


def _report(workdir: Path) -> dict:
    path = files.path(workdir) / "report.json"
    again = f"write it with `python -m grape_jax.evaluate --workdir={workdir}`"
    if not path.exists():
        raise UserError(f"{workdir} has no report.json: {again}.")
    try:
        report = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): {again}.") from error
    if not all("measure" in test_set for test_set in report.get("test_sets", [{}])):
        raise UserError(f"{path} is of an earlier version: {again}.")
    return report


def compare(reports: Mapping[str, dict]) -> dict[str, Any]:
    """The numbers of every test set that all runs have, as JSON values.

    Args:
      reports: the content of report.json by the name of the run, two or more.

    Raises:
      UserError: the runs have no test set in common, or one with different queries.
    """
    by_run = [
        {(t["shift"], t["name"]): t for t in report["test_sets"] if t["judged"]}
        for report in reports.values()
    ]
    common = [key for key in by_run[0] if all(key in sets for sets in by_run)]
    if not common:
        raise UserError(
            f"{', '.join(reports)} have no judged test set in common: compare runs of one "
            "benchmark with the same shifts."
        )
    left_out = sorted({key for sets in by_run for key in sets} - set(common))
    return {
        "runs": list(reports),
        "left_out": [" ".join(key) for key in left_out],
        "test_sets": [
            _compare_set(dict(zip(reports, (sets[key] for sets in by_run), strict=True)))
            for key in common
        ],
    }


def _compare_set(runs: dict[str, dict]) -> dict[str, Any]:
    first_name, first = next(iter(runs.items()))
    for name, one in runs.items():
        _check_queries(first_name, first, name, one)
    measure = first["measure"]
    cutoff = int(measure.rsplit("_", 1)[1])
    asked = [record for record in first["answers"] if next(iter(record["ranks"].values()))]
    groups = np.array([record["group"] for record in asked])
    values = {name: _recalls(one, cutoff) for name, one in runs.items()}
    return {
        "shift": first["shift"],
        "name": first["name"],
        "judged": first["judged"],
        "groups": first["groups"],
        "measure": measure,
        "methods": _methods(runs, measure),
        "against_baselines": _against_baselines(runs, values, groups),
        "between_runs": _between_runs(runs, values, groups),
    }


def _check_queries(first_name: str, first: dict, name: str, one: dict) -> None:
    """Refuses runs with other queries, of which no difference is paired."""
    wanted, found = ({(r["id"], r["query"]) for r in t["answers"]} for t in (first, one))
    order = [r["id"] for r in first["answers"]] == [r["id"] for r in one["answers"]]
    if wanted == found and order and first["measure"] == one["measure"]:
        return
    raise UserError(
        f"{first_name} and {name} have different queries in {wording.title(first)} "
        f"({len(wanted & found)} of {len(wanted | found)} are in both): evaluate both on the same "
        "data, with the same evaluation.test_limit and evaluation.seen_limit."
    )


def _recalls(test_set: dict, cutoff: int) -> dict[str, np.ndarray]:
    """The recall of each judged query by method: the share of right items in the first `cutoff`."""
    judged = [record["ranks"] for record in test_set["answers"]]
    return {
        method: np.array([np.mean(np.array(r[method]) <= cutoff) for r in judged if r[method]])
        for method in judged[0]
    }


def _methods(runs: dict[str, dict], measure: str) -> list[dict]:
    """The measure of every method that all runs have."""
    scores = [{wording.label(m): m[measure]["mean"] for m in t["methods"]} for t in runs.values()]
    found = []
    for label in scores[0]:
        if all(label in one for one in scores):
            values = [one[label] for one in scores]
            found.append({"method": label, "runs": values} | _spread(values))
    return found


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values),
        "low": min(values),
        "high": max(values),
    }


def _trained(test_set: dict) -> str | None:
    return test_set["trained"] and f"{test_set['trained']}, greedy"


def _baseline(test_set: dict, name: str) -> str | None:
    """The label of a baseline in one run; None if it is not there."""
    method = test_set["best_baseline"] if name == "best baseline" else name
    labels = {wording.label(m) for m in test_set["methods"]}
    return next((label for label in (method, f"{method}, greedy") if label in labels), None)


def _against_baselines(runs: dict[str, dict], values: dict, groups: np.ndarray) -> list[dict]:
    """Differences of trained rewrites and baselines in each run, and averaged over the runs."""
    found = []
    for name in BASELINES:
        labels = {run: (_trained(one), _baseline(one, name)) for run, one in runs.items()}
        if all(a and b for a, b in labels.values()):
            columns = [values[run][a] - values[run][b] for run, (a, b) in labels.items()]
            *each, mean = _intervals([*columns, np.mean(columns, axis=0)], groups)
            sd = statistics.stdev(interval["mean"] for interval in each)
            found.append({"baseline": name, "runs": each, "all": mean, "sd": sd})
    return found


def _between_runs(runs: dict[str, dict], values: dict, groups: np.ndarray) -> list[dict]:
    """Differences of each run's trained rewrites and those of the first run."""
    first, *others = runs
    trained = {run: _trained(one) for run, one in runs.items()}
    if not all(trained.values()):
        return []
    columns = [values[run][trained[run]] - values[first][trained[first]] for run in others]
    return [
        {"a": run, "b": first} | interval
        for run, interval in zip(others, _intervals(columns, groups), strict=True)
    ]


def _intervals(columns: list[np.ndarray], groups: np.ndarray) -> list[dict]:
    stacked = np.stack(columns, axis=1)
    intervals = metrics.clustered_bootstrap(stacked, groups)
    p_values = metrics.sign_flip_test(stacked, groups)
    return [
        {"mean": i.mean, "low": i.low, "high": i.high, "p": p}
        for i, p in zip(intervals, p_values, strict=True)
    ]


def as_markdown(comparison: dict) -> str:
    """The comparison as Markdown, with tables that are aligned on a terminal too."""
    parts = []
    for test_set in comparison["test_sets"]:
        measure = wording.MEASURES[test_set["measure"]]
        parts.append(f"## {wording.sentence(wording.title(test_set))}")
        parts.append(
            f"{test_set['judged']} queries in {test_set['groups']} groups. {measure} in per cent:"
        )
        parts.append(_aligned(_method_table(test_set, comparison["runs"])))
        if test_set["against_baselines"]:
            parts.append(f"Trained rewrites, greedy, less baselines, in points of {measure}:")
            parts.append(_aligned(_baseline_table(test_set, comparison["runs"])))
        if test_set["between_runs"]:
            parts.append("Trained rewrites of two runs on the same queries, in points:")
            parts.append(_aligned(_run_table(test_set)))
    parts.append(NOTE)
    if comparison["left_out"]:
        parts.append(f"Not in all runs, and left out: {', '.join(comparison['left_out'])}.")
    return "\n\n".join(parts) + "\n"


def _method_table(test_set: dict, runs: list[str]) -> Table:
    percent = lambda value: f"{100 * value:.1f}"
    rows = [
        [row["method"], *map(percent, row["runs"]), percent(row["mean"]), percent(row["sd"])]
        for row in test_set["methods"]
    ]
    return Table(["searched with", *runs, "mean", "sd"], rows)


def _baseline_table(test_set: dict, runs: list[str]) -> Table:
    rows = [
        [
            f"trained − {row['baseline']}",
            *map(wording.points, [*row["runs"], row["all"]]),
            f"{100 * row['sd']:.1f}",
        ]
        for row in test_set["against_baselines"]
    ]
    return Table(["difference", *runs, "all runs", "sd"], rows)


def _run_table(test_set: dict) -> Table:
    rows = [
        [f"{row['a']} − {row['b']}", wording.points(row), wording.p_value(row["p"])]
        for row in test_set["between_runs"]
    ]
    return Table(["difference", "points", "p"], rows)


def _aligned(table: Table) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (table.head, *table.rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    line = lambda row: f"| {' | '.join(map(str.ljust, row, widths))} |"
    head, *rows = cells
    rule = ["-" * width for width in widths]
    return "\n".join(map(line, [head, rule, *rows]))
