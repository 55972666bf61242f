"""Logs of a training run: JSON lines and TensorBoard events."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from grape_jax.runtime import files, processes

# tensorboardX imports torch where it is installed, for a type check of images. That takes longer
# than the import of jax; a module that is None in `sys.modules` is not found.
_hidden = sys.modules.setdefault("torch", None) is None  # type: ignore[arg-type]
from tensorboardX import SummaryWriter  # noqa: E402

if _hidden:
    del sys.modules["torch"]

# The event that JAX records for every compilation, and for every program loaded from its cache.
COMPILED = "/jax/core/compile/backend_compile_duration"


class Log:
    """Writer of metrics.jsonl, rewrites.jsonl and TensorBoard events, on process 0 only.

    On a local disk every line is written at once. An object store would write the whole file again
    for each line, so there lines are kept until `flush`, to be called before each checkpoint.

    Args:
      workdir: the run's directory.
      first: the step that the run starts from; entries of later steps are deleted, because a
        resumed run repeats them.
    """

    def __init__(self, workdir: Path, first: int):
        self.workdir = workdir
        self.pending: dict[str, str] = {}  # text that is not written yet, by file name
        self.events: SummaryWriter | None = None
        self.compiled = 0
        jax.monitoring.register_event_duration_secs_listener(self._count)
        if processes.is_main():
            _drop_lines(workdir / "metrics.jsonl", lambda line: line["step"] > first)
            _drop_lines(workdir / "rewrites.jsonl", lambda line: line["step"] > first)
            self.events = SummaryWriter(str(workdir / "tensorboard"), purge_step=first + 1)

    def _count(self, event: str, *_, **__) -> None:
        self.compiled += event == COMPILED

    def write(self, step: int, phase: str, metrics: dict[str, float]) -> None:
        """Writes the metrics of a step; numbers that are not finite are null in metrics.jsonl."""
        if self.events is None:
            return
        # Compilations since the previous line: in steady state there are none.
        metrics = metrics | {"compilations": self.compiled}
        self.compiled = 0
        # JSON has neither infinity nor NaN.
        finite = {name: x if math.isfinite(x) else None for name, x in metrics.items()}
        self._append("metrics.jsonl", [json.dumps({"step": step, "phase": phase} | finite)])
        for name, value in metrics.items():
            self.events.add_scalar(f"{phase}/{name}", value, step)

    def lines(self) -> list[dict]:
        """The lines of metrics.jsonl so far; none on processes other than 0."""
        path = self.workdir / "metrics.jsonl"
        if self.events is None or not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines()]

    def keep_rewrites(self, step: int, table: list[dict]) -> None:
        """Writes one line a query to rewrites.jsonl; `step` counts from 0, in the file from 1."""
        if self.events is None:
            return
        lines = [json.dumps({"step": step + 1} | row, ensure_ascii=False) for row in table]
        self._append("rewrites.jsonl", lines)

    def _append(self, name: str, lines: list[str]) -> None:
        self.pending[name] = self.pending.get(name, "") + "".join(f"{line}\n" for line in lines)
        if files.is_local(self.workdir):
            self.flush()

    def flush(self) -> None:
        """Writes pending lines."""
        for name, text in self.pending.items():
            files.append(self.workdir / name, text)
        self.pending = {}

    def close(self) -> None:
        """Writes pending lines and closes the files."""
        self.flush()
        jax.monitoring.unregister_event_duration_listener(self._count)
        if self.events is not None:
            self.events.close()


def _drop_lines(path: Path, dropped: Callable[[dict], bool]) -> None:
    if path.exists():
        # A killed run may leave an incomplete last line, without a line break.
        complete = [line for line in path.read_bytes().splitlines(True) if line.endswith(b"\n")]
        files.replace(path, b"".join(line for line in complete if not dropped(json.loads(line))))
