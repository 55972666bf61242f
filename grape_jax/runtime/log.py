"""What a run says of its steps: JSON lines, TensorBoard events, and a table on the terminal."""

import json
import math
from pathlib import Path

import jax
from tensorboardX import SummaryWriter

from grape_jax.runtime import files, processes

SHOWN_QUERIES = 3  # of a step, in the table of rewrites
COMPILED = "/jax/core/compile/backend_compile_duration"  # jax's event, cached programs included


class Log:
    """metrics.jsonl, rewrites.jsonl and TensorBoard events; a resumed run drops what it redoes.

    Process 0 alone writes. Lines are on a local disk at once. An object store would write the whole
    file anew for each of them: there they wait for `flush`, which comes before each checkpoint, so
    that a run which goes on from one misses none.
    """

    def __init__(self, workdir: Path, first: int):
        self.workdir = workdir
        self.waiting = {}
        self.events = None
        self.compiled = 0
        jax.monitoring.register_event_duration_secs_listener(self._count)
        if processes.is_main():
            _drop_lines(workdir / "metrics.jsonl", lambda line: line["step"] > first)
            _drop_lines(workdir / "rewrites.jsonl", lambda line: line["step"] > first)
            self.events = SummaryWriter(str(workdir / "tensorboard"), purge_step=first + 1)

    def _count(self, event: str, *_, **__) -> None:
        self.compiled += event == COMPILED

    def write(self, step: int, phase: str, metrics: dict) -> None:
        if self.events is None:
            return
        # Since the line before: a step that goes on compiling is a step of ever new shapes.
        metrics = metrics | {"compilations": self.compiled}
        self.compiled = 0
        # JSON has no word for what is not finite.
        known = {name: x if math.isfinite(x) else None for name, x in metrics.items()}
        self._append("metrics.jsonl", [json.dumps({"step": step, "phase": phase} | known)])
        for name, value in metrics.items():
            self.events.add_scalar(f"{phase}/{name}", value, step)

    def lines(self) -> list[dict]:
        """The lines of metrics.jsonl so far; none on a process that does not write."""
        path = self.workdir / "metrics.jsonl"
        if self.events is None or not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines()]

    def keep_rewrites(self, step: int, table: list[dict]) -> None:
        if self.events is None:
            return
        lines = [json.dumps({"step": step + 1} | row, ensure_ascii=False) for row in table]
        self._append("rewrites.jsonl", lines)

    def _append(self, name: str, lines: list[str]) -> None:
        self.waiting[name] = self.waiting.get(name, "") + "".join(f"{line}\n" for line in lines)
        if files.is_local(self.workdir):
            self.flush()

    def flush(self) -> None:
        """Writes what waits."""
        for name, text in self.waiting.items():
            files.append(self.workdir / name, text)
        self.waiting = {}

    def close(self) -> None:
        self.flush()
        jax.monitoring.unregister_event_duration_listener(self._count)
        if self.events is not None:
            self.events.close()


def _drop_lines(path: Path, dropped) -> None:
    if path.exists():
        # The last line of a killed run may be half a line: it has no end.
        whole = [line for line in path.read_bytes().splitlines(True) if line.endswith(b"\n")]
        files.replace(path, b"".join(line for line in whole if not dropped(json.loads(line))))


def sample_table(step: int, table: list[dict]) -> str:
    """For the terminal: the queries of widest spread, each with its best, middle and worst rewrite.

    Texts stand last: those of other scripts are of any width.
    """
    by_rank = lambda row: sorted(row["rewrites"], key=lambda rewrite: rewrite["rank"])
    spread = lambda row: by_rank(row)[-1]["rank"] - by_rank(row)[0]["rank"]
    lines = [f"step {step + 1}" + f"{'rank':>9}{'reward':>9}  rewrite"]
    for row in sorted(table, key=spread, reverse=True)[:SHOWN_QUERIES]:
        meant = f", which is {row['reference']!r}" if row["reference"] else ""
        lines.append(f"  {row['query']!r}{meant}")
        ranked = by_rank(row)
        for i in sorted({0, len(ranked) // 2, len(ranked) - 1}):
            one = ranked[i]
            said = repr(one["text"])
            if not one["well_formed"]:
                said = f"malformed: {one['completion']!r}"
            lines.append(f"{one['rank']:15d}{one['reward']:9.3f}  {said}")
    return "\n".join(lines)
