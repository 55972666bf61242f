"""The report of `benchmarks.compare`: numbers, tables and a figure from the files of the runs."""

import dataclasses
import importlib.metadata
import io
import json
import os
import platform
import re
from pathlib import Path

import numpy as np
from scipy import stats

from grape_jax.reporting import metrics
from grape_jax.runtime import files

OURS, THEIRS = "grape_jax", "PyTorch (TRL)"
LEFT_OUT = 2  # first steps of a run, which compile and allocate, and are not timed
BLOCKS = 4  # blocks of steps whose mean rewards are compared
PACKAGES = ("jax", "flax", "optax", "torch", "transformers", "trl", "peft", "accelerate")
COLOURS = {OURS: "#2a6fbb", THEIRS: "#c0392b"}


@dataclasses.dataclass(frozen=True)
class Run:
    version: str  # OURS or THEIRS
    seed: int
    steps: list[dict]  # of each GRPO step: "step", "seconds", "length", and its metrics
    process_bytes: int | None  # peak memory of the process; None: it did not end
    # Of each test set: "name", "shift", "groups" and "ranks", from decoding to ranks; before
    # training "ranks_at_start" where they were measured.
    tests: list[dict]

    @property
    def name(self) -> str:
        return f"{self.version}, seed {self.seed}"


def write(out: Path, runs: list[Run], rows: int, about: dict) -> None:
    """Writes report.md, report.json and curves.png.

    Args:
      runs: the runs with at least one step.
      rows: completions in a step, B x K.
      about: the command and settings, by label.
    """
    numbers = {
        "about": about | machine(),
        "speed": [speed(run, rows) for run in runs],
        "agreement": agreement(runs),
        "recalls": recalls(runs),
        "runs": [{"version": run.version, "seed": run.seed, "steps": run.steps} for run in runs],
    }
    files.replace(out / "curves.png", draw(runs))
    files.replace(out / "report.json", json.dumps(numbers, indent=1, ensure_ascii=False))
    files.replace(out / "report.md", markdown(numbers))


def machine() -> dict:
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    return {
        "machine": f"{len(os.sched_getaffinity(0))} cores, {cpu[1] if cpu else platform.machine()}",
        "packages": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES),
    }


def speed(run: Run, rows: int) -> dict:
    """Medians over the steps after `LEFT_OUT`; of a shorter run, over the last step."""
    timed = run.steps[min(LEFT_OUT, len(run.steps) - 1) :]
    seconds = np.array([step["seconds"] for step in timed])
    tokens = np.array([step["length"] * rows for step in timed])
    return {
        "run": run.name,
        "version": run.version,
        "steps_timed": len(timed),
        "seconds_per_step": float(np.median(seconds)),
        "fastest": float(seconds.min()),
        "slowest": float(seconds.max()),
        "completion_tokens_per_second": float(np.median(tokens / seconds)),
        "steps_peak_bytes": max(
            (s["peak_bytes"] for s in timed if "peak_bytes" in s), default=None
        ),
        "process_peak_bytes": run.process_bytes,
    }


def agreement(runs: list[Run]) -> list[dict]:
    """Mean rewards and KL of both versions over blocks of steps.

    `half_width` is that of the 95 % prediction interval of one more seed of ours around their mean
    (Student's t), which the PyTorch run is compared with.
    """
    ours = [run for run in runs if run.version == OURS]
    theirs = [run for run in runs if run.version == THEIRS]
    shared = min((len(run.steps) for run in runs), default=0)
    if not ours or not theirs or shared < BLOCKS:
        return []
    table = []
    for key in ("reward", "kl"):
        if not all(key in run.steps[0] for run in runs):
            continue
        for block in np.array_split(np.arange(shared), BLOCKS):
            mean = lambda run: float(np.mean([run.steps[i][key] for i in block]))  # noqa: B023
            values = np.array([mean(run) for run in ours])
            found = {
                "what": key,
                "steps": f"{block[0] + 1}-{block[-1] + 1}",
                "ours": float(values.mean()),
                "theirs": float(np.mean([mean(run) for run in theirs])),
                "half_width": None,
            }
            n = len(values)
            if n > 1:
                reach = stats.t.ppf(0.975, n - 1) * np.sqrt(1 + 1 / n)
                found["half_width"] = float(reach * values.std(ddof=1))
            table.append(found)
    return table


def recalls(runs: list[Run]) -> list[dict]:
    """Recall on every test set with its interval, at the start and at the end of each run."""
    table = []
    tests = [(run, test) for run in runs for test in run.tests]
    sets = dict.fromkeys((test["name"], test["shift"]) for _, test in tests)
    for which in sets:
        here = [(run, t) for run, t in tests if (t["name"], t["shift"]) == which]
        started = [(run, t) for run, t in here if t.get("ranks_at_start")][:1]
        lines = [("start of both", t["ranks_at_start"], t) for _, t in started]
        lines += [(run.name, test["ranks"], test) for run, test in here]
        for name, ranks, test in lines:
            for decoding, found in ranks.items():
                entry = {"test_set": which[0], "shift": which[1], "run": name}
                entry |= {"decoding": decoding, "queries": len(found)}
                cutoffs = (1, 10)
                hits = np.stack([metrics.hits_at(np.asarray(found), k) for k in cutoffs], axis=1)
                intervals = metrics.clustered_bootstrap(hits, np.asarray(test["groups"]))
                for k, interval in zip(cutoffs, intervals, strict=True):
                    entry[f"recall_at_{k}"] = dataclasses.asdict(interval)
                table.append(entry)
    return table


def markdown(numbers: dict) -> str:
    """The report in Markdown."""
    parts = ["# grape_jax beside PyTorch", _speed_table(numbers["speed"])]
    parts += _ratio(numbers["speed"])
    if numbers["recalls"]:
        parts.append(_recall_table(numbers["recalls"]))
    if numbers["agreement"]:
        parts += [_agreement_table(numbers["agreement"])]
        parts.append(
            "Means over blocks of steps. The interval is the 95 % prediction interval of one more "
            "seed of grape_jax (Student's t)."
        )
    parts.append("![reward and KL by step](curves.png)")
    parts.append("\n".join(f"- {key}: {value}" for key, value in numbers["about"].items()))
    return "\n\n".join(parts) + "\n"


def _speed_table(speeds: list[dict]) -> str:
    rows = [
        [
            speed["run"],
            str(speed["steps_timed"]),
            f"{speed['seconds_per_step']:.2f} ({speed['fastest']:.2f}-{speed['slowest']:.2f})",
            f"{speed['completion_tokens_per_second']:.3g}",
            _gigabytes(speed["steps_peak_bytes"]),
            _gigabytes(speed["process_peak_bytes"]),
        ]
        for speed in speeds
    ]
    head = [
        *("run", "steps timed", "seconds a step: median (range)", "completion tokens a second"),
        *("peak memory in the steps", "peak memory of the process"),
    ]
    return table(head, rows)


def _ratio(speeds: list[dict]) -> list[str]:
    """A sentence with the ratios of both versions' medians; none unless both were run."""
    versions = {
        version: [speed for speed in speeds if speed["version"] == version]
        for version in (OURS, THEIRS)
    }
    if not all(versions.values()):
        return []

    def ratio(key: str) -> float | None:
        values = [[speed[key] for speed in found] for found in versions.values()]
        if not all(all(v is not None for v in side) for side in values):
            return None
        ours, theirs = (float(np.median(side)) for side in values)
        return ours / theirs

    said = [f"grape_jax takes 1/{1 / ratio('seconds_per_step'):.2f} of the time of a step"]
    for key, what in (("steps_peak_bytes", "steps"), ("process_peak_bytes", "process")):
        if (found := ratio(key)) is not None:
            said.append(f"{found:.2f} of the memory of the {what}")
    return [", ".join(said) + "."]


def _recall_table(entries: list[dict]) -> str:
    percent = lambda x: f"{100 * x['mean']:.1f} [{100 * x['low']:.1f}, {100 * x['high']:.1f}]"
    rows = [
        [
            f"{entry['test_set']} ({entry['shift']}, {entry['queries']})",
            *(entry["run"], entry["decoding"]),
            *(percent(entry["recall_at_1"]), percent(entry["recall_at_10"])),
        ]
        for entry in entries
    ]
    return table(["test set", "run", "decoding", "Recall@1 [95 %]", "Recall@10 [95 %]"], rows)


def _agreement_table(found_in_blocks: list[dict]) -> str:
    rows = []
    for found in found_in_blocks:
        width = found["half_width"]
        inside = width is not None and abs(found["theirs"] - found["ours"]) <= width
        rows.append(
            [
                *(found["what"], found["steps"], f"{found['ours']:.4f}", f"{found['theirs']:.4f}"),
                "one seed only" if width is None else f"± {width:.4f}",
                "" if width is None else ("yes" if inside else "no"),
            ]
        )
    return table(["mean", "steps", OURS, THEIRS, "interval", "inside"], rows)


def draw(runs: list[Run]) -> bytes:
    """Plots reward and KL by step, a line for each run; returns a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), dpi=130, layout="constrained")
    for axis, (key, label) in zip(
        figure.subplots(1, 2), (("reward", "reward"), ("kl", "KL to the start")), strict=True
    ):
        labelled = set()
        for run in runs:
            points = [(step["step"], step[key]) for step in run.steps if key in step]
            if not points:
                continue
            first = run.version not in labelled
            labelled.add(run.version)
            axis.plot(
                *zip(*points, strict=True),
                color=COLOURS[run.version],
                linewidth=0.8 if run.version == OURS else 1.6,
                label=run.version if first else None,
            )
        axis.set_title(label, fontsize=10, loc="left")
        axis.set_xlabel("GRPO step", fontsize=9)
        axis.grid(color="#e6e6e6", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        if labelled:
            axis.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _gigabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e9:.2f} GB"
