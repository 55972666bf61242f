"""Checks that a run that is killed repeatedly has the same bits as an undisturbed one.

    python benchmarks/kills.py --out=runs/kills --kills=25 --processes=1
    python benchmarks/kills.py --out=runs/kills --kills=25 --processes=2

SIGKILL is sent at random moments of the steps, and every third time while a checkpoint is written.
Of several processes one is killed, and the others must end by themselves. Prints a table of the
kills, then the results of the comparison.
"""

import argparse
import json
import random
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tiny_runs

LIMIT = 600  # seconds to wait for a moment, and for the other processes to end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/kills"))
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder, rng = given.out.resolve(), random.Random(given.seed)
    tiny_runs.prepare(folder)
    devices = 4 if given.processes > 1 else 1
    # One to three steps lie between two kills.
    settings = {"warm_up.steps": 4, "grpo.steps": 3 * given.kills + 8, "checkpoint.every": 2}
    begin = lambda name: tiny_runs.start(folder, name, settings, given.processes, devices)
    quiet, killed = f"quiet-{given.processes}", f"killed-{given.processes}"
    tiny_runs.finish(begin(quiet))
    print("| kill | moment | newest log line | newest checkpoint | exit codes |")
    print("|---:|---|---:|---:|---|")
    for number in range(1, given.kills + 1):
        run = begin(killed)
        moment = "while saving" if number % 3 == 0 else "in a step"
        await_moment(folder / killed, moment, rng, run)
        run[rng.randrange(len(run))].kill()
        codes = [process.wait(timeout=LIMIT) for process in run]
        assert all(codes), f"a process ended without an error: {codes}"
        steps = checkpoints(folder / killed)
        print(
            f"| {number} | {moment} | {newest_step(folder / killed)} | {steps[-1:]} | {codes} |",
            flush=True,
        )
    tiny_runs.finish(begin(killed))
    for file in ("metrics.jsonl", "rewrites.jsonl"):
        same = tiny_runs.lines(folder, quiet, file) == tiny_runs.lines(folder, killed, file)
        print(f"{file}: {'the same' if same else 'DIFFERENT'}")
    print(f"state: {compare_states(folder / quiet, folder / killed)}")


def await_moment(workdir: Path, moment: str, rng: random.Random, run: list) -> None:
    """Waits for a random moment after the next step, or for a half-written checkpoint."""
    before, deadline = newest_step(workdir), time.monotonic() + LIMIT
    half_written = lambda: set(workdir.glob("checkpoints/*orbax-checkpoint-tmp*"))
    left_behind = half_written()  # by an earlier kill
    while time.monotonic() < deadline:
        if any(process.poll() is not None for process in run):
            raise SystemExit("the run ended before it could be killed: see its log")
        if moment == "in a step" and newest_step(workdir) > before:
            # The first step after a start compiles, so the fastest step is the typical one.
            time.sleep(rng.uniform(0, 2 * min(line["seconds"] for line in lines(workdir))))
            return
        if moment == "while saving" and half_written() - left_behind:
            return
        time.sleep(0.002)
    raise SystemExit(f"the moment {moment!r} did not come within {LIMIT} s")


def lines(workdir: Path) -> list[dict]:
    """The complete lines of the log so far."""
    log = workdir / "metrics.jsonl"
    text = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def newest_step(workdir: Path) -> int:
    """The newest step in the log; 0 if there is none."""
    return max((line["step"] for line in lines(workdir)), default=0)


def checkpoints(workdir: Path) -> list[int]:
    return sorted(int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit())


def compare_states(one: Path, other: Path) -> str:
    def last(workdir: Path) -> dict:
        path = workdir / "checkpoints" / str(checkpoints(workdir)[-1]) / "state"
        reader = ocp.PyTreeCheckpointer()
        as_numpy = lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray)
        wanted = jax.tree.map(as_numpy, reader.metadata(path).item_metadata.tree)
        state = reader.restore(path, restore_args=wanted)
        return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}

    ours, theirs = last(one), last(other)
    different = [
        name
        for name in ours.keys() | theirs.keys()
        if name not in ours or name not in theirs or not np.array_equal(ours[name], theirs[name])
    ]
    return f"DIFFERENT: {different}" if different else f"the same bits in {len(ours)} arrays"


if __name__ == "__main__":
    main()
