"""The answers of each policy to the test queries, kept on disk as soon as they are written."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from grape_jax.data import catalogue
from grape_jax.data.benchmark import Query
from grape_jax.reporting.results import GRPO, UNTRAINED, WARM_UP
from grape_jax.run import eta
from grape_jax.run.context import Context
from grape_jax.run.policy import with_room, with_system
from grape_jax.run.queries import Queries
from grape_jax.run.rewriting import rewrite
from grape_jax.runtime import files, processes
from grape_jax.runtime.errors import UserError
from grape_jax.runtime.shutdown import Interrupted, StopSignal

SEED_STEP = 10_000  # between the seeds of a query's samples


@dataclasses.dataclass(frozen=True)
class QuerySet:
    """The queries of one shift and split."""

    shift: str
    split: str
    queries: list[Query]


@dataclasses.dataclass(frozen=True)
class Task:
    """One text for each query of a set, to be written by a policy into one file."""

    path: Path
    set: QuerySet
    temperature: float
    seed: int
    system: str | None  # replaces the system turn of the shift's prompt


def test_sets(config: ConfigDict, queries: Queries) -> list[QuerySet]:
    """The test sets of a run."""
    evaluation = config.evaluation
    limit = lambda split: evaluation.seen_limit if split == "test_seen" else evaluation.test_limit
    return [
        QuerySet(shift, split, queries.split(shift, split, limit(split)))
        for split in catalogue.find(config.benchmark).test_sets
        for shift in config.shifts
    ]


def withheld_sets(config: ConfigDict, queries: Queries) -> list[QuerySet]:
    """The sets that a server judges; none if the evaluation is limited."""
    split = catalogue.find(config.benchmark).withheld
    if split is None or config.evaluation.test_limit:
        return []
    return [QuerySet(shift, split, queries.split(shift, split)) for shift in config.shifts]


def trained_method(config: ConfigDict) -> str:
    """The name of the policy at the end of training."""
    return GRPO if config.grpo.steps else WARM_UP


def evaluate_policy(
    context: Context,
    workdir: Path,
    variables: dict[str, Any],
    method: str,
    step: int,
    stop: StopSignal,
) -> float | None:
    """Writes the missing answers of a policy to the test queries, with a progress bar.

    Args:
      method: the name of the policy, such as "untrained".
      step: for the message of an interruption.

    Returns:
      Seconds a rewrite; None if no answer was missing.

    Raises:
      Interrupted: stopped on request; finished files are kept.
      UserError: a prompt of a baseline does not fit into the policy's context.
    """
    tasks = missing_tasks(context.config, context.queries, workdir, method)
    if not tasks:
        return None
    evaluation = context.config.evaluation
    total = sum(len(task.set.queries) for task in tasks)
    processes.set_stage(f"the test of the {method} policy")
    processes.announce(f"testing the {method} policy: {total:,} rewrites ...")
    paces: list[float] = []
    with progress_bar(total=total, desc=f"test, {method}", unit="rewrite", leave=False) as bar:
        began = time.perf_counter()

        def after_batch(done: int) -> None:
            nonlocal began
            paces.append((time.perf_counter() - began) / done)
            began = time.perf_counter()
            bar.update(done)
            processes.set_stage(f"the test of the {method} policy after {bar.n} rewrites")
            if stop.requested_anywhere():
                raise Interrupted(step)

        for task in tasks:
            one = task.set
            texts = context.captions.prompt_texts(one.queries, one.split)
            policy = context.policy
            if task.system is not None:
                policy = with_system(policy, one.shift, task.system)
                policy = with_room(policy, one.shift, texts, evaluation.max_tokens)
            sampling = context.sampling(1, task.temperature, evaluation.max_tokens)
            shifts = [one.shift] * len(texts)
            rewrites = rewrite(
                policy, variables, texts, shifts, sampling, evaluation.batch_size, task.seed,
                after_batch, context.pictures(one.queries, one.split),
            )  # fmt: skip
            if processes.is_main():
                _write(task, rewrites)
    return eta.typical(paces)


def missing_tasks(config: ConfigDict, queries: Queries, workdir: Path, method: str) -> list[Task]:
    """What the policy `method` has to write for the configured methods and is not on disk."""
    evaluation = config.evaluation
    temperature, seed = config.rollout.temperature, config.seed

    def several(name: str, system: str | None) -> list[tuple[str, float, int, str | None]]:
        # The first sample without a prompt of its own is "sampled".
        numbers = range(1 if system is None else 0, evaluation.samples)
        return [(numbered(name, i), temperature, seed + SEED_STEP * i, system) for i in numbers]

    greedy = ("greedy", 0.0, seed, None)
    kinds: list[tuple[str, float, int, str | None]] = [greedy, ("sampled", temperature, seed, None)]
    if method == trained_method(config) and "samples" in evaluation.methods:
        kinds += several("sampled", None)
    if method == UNTRAINED and "hyde" in evaluation.methods:
        kinds += several("caption", evaluation.caption_prompt)
    if method == UNTRAINED and "multi_query" in evaluation.methods:
        kinds += several("variant", evaluation.variant_prompt)
    wanted = [(one, kind) for one in test_sets(config, queries) for kind in kinds]
    wanted += [(one, greedy) for one in withheld_sets(config, queries)]
    tasks = [
        Task(answers_path(workdir, one, method, name), one, temperature, seed, system)
        for one, (name, temperature, seed, system) in wanted
    ]
    present = processes.from_main([task.path.exists() for task in tasks])
    return [task for task, there in zip(tasks, present, strict=True) if not there]


def read_answers(path: Path, queries: Sequence[Query]) -> list[str]:
    """The texts of an answers file, in the order of the queries.

    Raises:
      UserError: the file holds answers to other queries.
    """
    texts, ids = json.loads(path.read_text()), {query.id for query in queries}
    if texts.keys() != ids:
        missing, unknown = len(ids - texts.keys()), len(texts.keys() - ids)
        raise UserError(
            f"{path} holds answers to other queries ({missing} of {len(ids)} have none, and "
            f"{unknown} answers have no query): restore the data, or begin in another --workdir."
        )
    return [texts[query.id] for query in queries]


def answers_path(workdir: Path, query_set: QuerySet, method: str, name: str) -> Path:
    """The file of a policy's answers; `name` is the decoding, numbered from the second sample."""
    return workdir / "answers" / f"{query_set.shift}-{query_set.split}-{method}-{name}.json"


def numbered(name: str, number: int) -> str:
    """The name of a query's i-th text; the first sample is the sampled answer."""
    return name if (name, number) == ("sampled", 0) else f"{name}-{number}"


def progress_bar(**settings) -> tqdm:
    """A progress bar on process 0, on a terminal only: a log file would hold every redrawing."""
    return tqdm(**settings, disable=None if processes.is_main() else True)


def _write(task: Task, rewrites: Sequence[str]) -> None:
    """Writes the answers of one task."""
    task.path.parent.mkdir(parents=True, exist_ok=True)
    by_id = {query.id: text for query, text in zip(task.set.queries, rewrites, strict=True)}
    files.replace(task.path, json.dumps(by_id, ensure_ascii=False, indent=1))
