"""Log, terminal and time estimate of the training loop."""

import time
from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from grape_jax.reporting.step_line import step_line
from grape_jax.rl.scoring import best_reward
from grape_jax.run import eta, settings
from grape_jax.run.answers import missing_tasks, trained_method
from grape_jax.run.evaluation import validation_queries
from grape_jax.run.galleries import Galleries
from grape_jax.run.queries import Queries
from grape_jax.runtime import processes, sharding
from grape_jax.runtime.errors import UserError
from grape_jax.runtime.log import Log
from grape_jax.runtime.shutdown import StopSignal


class Monitor:
    """Reports each step of a training; a context manager that closes its files.

    Attributes:
      skipped: numbers of steps without a finite loss: the latest in a row, and all.
    """

    def __init__(
        self,
        config: ConfigDict,
        mesh: Mesh,
        workdir: Path,
        first: int,
        skipped: tuple[int, int],
        validation_seconds: float | None,
        test_seconds: float | None,
        best_reward: float,
        corpus_size: int,
    ):
        """Opens the log, which drops the lines of steps after `first`.

        Args:
          validation_seconds: a first estimate, until a validation has been measured.
          test_seconds: an estimate of the test that follows the training; None: unknown.
          best_reward: reward of a well-formed rewrite at rank 1.
          corpus_size: items that training ranks.
        """
        self.config, self.mesh = config, mesh
        self.log = Log(workdir, first)
        self.skipped = list(skipped)
        self.measured = eta.measured_in(self.log.lines())
        if validation_seconds is not None and not self.measured[eta.VALIDATION]:
            self.measured[eta.VALIDATION].append(validation_seconds)
        self.test_seconds = test_seconds
        self.best_reward, self.corpus_size = best_reward, corpus_size
        self.last = config.warm_up.steps + config.grpo.steps
        self.step, self.phase, self.began = first, "", 0.0

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_) -> None:
        self.log.close()

    def start_step(self, step: int) -> None:
        """Starts the clock of a step, numbered from 1."""
        self.step, self.began = step, time.perf_counter()
        self.phase = "warm-up" if step <= self.config.warm_up.steps else "grpo"
        processes.set_stage(f"step {step}")

    def share(self, entries: list[dict], stop: StopSignal) -> tuple[list[dict], bool]:
        """Gathers the step's record of all processes: the loop's only exchange on the host.

        Args:
          entries: log entries of the rows that this process holds.

        Returns:
          The entries of the whole batch, and whether any process was asked to stop.
        """
        size = self.config.grpo.batch_size
        rows = sharding.local_rows(self.mesh, size).tolist() if entries else []
        records = processes.gather([list(zip(rows, entries, strict=True)), bool(stop.received)])
        by_row = {row: entry for part, _ in records for row, entry in part}
        return [by_row[row] for row in sorted(by_row)], any(asked for _, asked in records)

    def end_step(self, metrics: dict, table: list[dict]) -> None:
        """Counts skipped steps, adds the step's seconds to `metrics`, and logs its rewrites."""
        in_a_row, total = self.skipped
        failed = bool(metrics["skipped"])
        self.skipped = [in_a_row + 1 if failed else 0, total + failed]
        seconds = time.perf_counter() - self.began
        metrics |= {"skipped": self.skipped[1], "seconds": seconds}
        self.measured[self.phase].append(seconds)
        if table:
            self.log.keep_rewrites(self.step - 1, table)

    def validation(self, validate: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Runs a validation and adds its seconds to its metrics."""
        processes.set_stage(f"the validation after step {self.step}")
        began = time.perf_counter()
        metrics = validate()
        metrics["validation_seconds"] = time.perf_counter() - began
        self.measured[eta.VALIDATION].append(metrics["validation_seconds"])
        return metrics

    def write(self, metrics: dict) -> None:
        """Writes the step's metrics to the log, and a line to the terminal."""
        self.log.write(self.step, self.phase, metrics)
        left = eta.text(eta.work_left(self.config, self.step), self.measured, self.test_seconds)
        reward, size = self.best_reward, self.corpus_size
        processes.announce(step_line(self.step, self.last, metrics, reward, size, left))

    def saving(self, save: Callable[[], None]) -> None:
        """Runs a save and measures it."""
        processes.set_stage(f"saving step {self.step}")
        began = time.perf_counter()
        save()
        self.measured[eta.SAVING].append(time.perf_counter() - began)

    def flush(self) -> None:
        """Writes pending log lines, before a checkpoint."""
        self.log.flush()

    @property
    def healthy(self) -> bool:
        """Whether the last step had a finite loss."""
        return not self.skipped[0]

    def check_divergence(self, latest: Callable[[], int | None]) -> None:
        """Ends the run after `max_skipped` steps in a row without a finite loss.

        Args:
          latest: waits for checkpoints and returns the newest.

        Raises:
          UserError: there were so many.
        """
        if self.skipped[0] < self.config.max_skipped:
            return
        good = latest()
        saved = f"the last checkpoint before them is step {good}" if good else "none was saved"
        raise UserError(
            f"{self.skipped[0]} steps in a row had a loss or gradient that was not finite; "
            f"{saved}: lower {self.phase.replace('-', '_')}.learning_rate and begin in another "
            "--workdir."
        )


def open_monitor(
    queries: Queries,
    galleries: Galleries,
    workdir: Path,
    first: int,
    skipped: tuple[int, int],
    pace: float | None,
) -> Monitor:
    """The monitor of a run that goes on after step `first`.

    Args:
      pace: seconds a rewrite, for the estimates of validations and of the final test.
    """
    config, size = queries.config, len(galleries.open("train"))
    tests = missing_tasks(config, queries, workdir, trained_method(config))
    rewrites = sum(len(task.set.queries) for task in tests)
    validations = len(validation_queries(config, queries))
    return Monitor(
        config,
        galleries.mesh,
        workdir,
        first,
        skipped,
        validation_seconds=None if pace is None else pace * validations,
        test_seconds=None if pace is None else pace * rewrites,
        best_reward=best_reward(settings.reward_config(config), size),
        corpus_size=size,
    )
