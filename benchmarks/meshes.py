"""Compares the tiny run on all kinds of meshes and numbers of processes with one device.

    python benchmarks/meshes.py --out=runs/meshes --steps=20

Prints a Markdown row for each run: the number of steps in which every sampled text and rank is the
same as on one device, and the largest differences of rewards and losses over all steps.
"""

import argparse
from pathlib import Path

import tiny_runs

MESHES = {
    "data": {},
    "fsdp": {"mesh.data": 1, "mesh.fsdp": 8},
    "tensor": {"mesh.data": 1, "mesh.tensor": 8},
    "mixed": {"mesh.fsdp": 2, "mesh.tensor": 2},
}
SPLITS = ((1, 8), (2, 4), (4, 2))  # processes x devices each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/meshes"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm_up", type=int, default=4, help="of the steps, supervised ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--meshes", nargs="*", default=list(MESHES), choices=MESHES)
    given = parser.parse_args()
    folder = given.out.resolve()
    tiny_runs.prepare(folder)
    steps = {"warm_up.steps": given.warm_up, "grpo.steps": given.steps - given.warm_up}
    steps |= {"checkpoint.every": given.steps, "seed": given.seed}
    tiny_runs.finish(tiny_runs.start(folder, "alone", steps))
    print("| processes x devices | mesh | steps with the same texts and ranks | reward | loss |")
    print("|---|---|---:|---:|---:|", flush=True)
    for processes, devices in SPLITS:
        for mesh in given.meshes:
            name = f"{processes}x{devices}-{mesh}"
            settings = steps | MESHES[mesh]
            tiny_runs.finish(tiny_runs.start(folder, name, settings, processes, devices))
            same, reward, loss = compare(folder, name)
            same = f"{given.warm_up + same} of {given.steps}"
            print(f"| {processes} x {devices} | {mesh} | {same} | {reward:.1e} | {loss:.1e} |")


def compare(folder: Path, name: str) -> tuple[int, float, float]:
    """The number of steps with the same texts and ranks, and the largest differences."""
    ours, theirs = (tiny_runs.lines(folder, run, "rewrites.jsonl") for run in (name, "alone"))
    said = lambda row: [(rewrite["text"], rewrite["rank"]) for rewrite in row["rewrites"]]
    steps = {row["step"] for row in theirs}
    other = {a["step"] for a, b in zip(ours, theirs, strict=True) if said(a) != said(b)}
    reward = max(
        abs(a["reward"] - b["reward"])
        for one, alone in zip(ours, theirs, strict=True)
        for a, b in zip(one["rewrites"], alone["rewrites"], strict=True)
    )
    losses = zip(
        tiny_runs.lines(folder, name, "metrics.jsonl"),
        tiny_runs.lines(folder, "alone", "metrics.jsonl"),
        strict=True,
    )
    return len(steps - other), reward, max(abs(a["loss"] - b["loss"]) for a, b in losses)


if __name__ == "__main__":
    main()
