"""The training loop: warm-up, GRPO, evaluation before and after, report.

Resumes from the newest checkpoint of the workdir: its state and data positions.
"""

import functools
from collections.abc import Mapping
from pathlib import Path

import grain
from ml_collections import ConfigDict
from orbax.checkpoint import CheckpointManager

from grape_jax.reporting.results import UNTRAINED, WARM_UP
from grape_jax.rl.learner import TrainState, start_grpo
from grape_jax.run import checks, context, steps
from grape_jax.run.answers import evaluate_policy, trained_method
from grape_jax.run.context import Context
from grape_jax.run.evaluation import validate
from grape_jax.run.final_report import write_report
from grape_jax.run.monitor import open_monitor
from grape_jax.run.policy import sampling_variables, untrained_variables
from grape_jax.run.queries import batch_iterators
from grape_jax.run.sample_rewrite import sample_printer
from grape_jax.runtime import checkpoint, compilation_cache, lock
from grape_jax.runtime.shutdown import Interrupted, StopSignal


def train(config: ConfigDict, workdir: Path) -> None:
    """Runs or resumes the run in `workdir`, up to its report.

    Raises:
      UserError: the config, the files or the devices need a change by the user.
      Interrupted: stopped on request; everything is saved.
    """
    checks.check(config)
    context.with_absolute_paths(config)
    checkpoint.refuse_other_config(workdir, config)
    compilation_cache.enable(config)
    keep, keep_best = config.checkpoint.keep, config.checkpoint.keep_best
    with lock.exclusive(workdir):
        run = context.prepare(config, workdir)
        with StopSignal() as stop:
            variables = untrained_variables(run.policy)
            pace = evaluate_policy(run, workdir, variables, UNTRAINED, 0, stop)
            del variables
            with checkpoint.open_manager(workdir, keep, keep_best) as manager:
                state = train_policy(run, workdir, manager, stop, pace)
            variables = sampling_variables(run.policy, state.trained)
            step = int(state.step)
            evaluate_policy(run, workdir, variables, trained_method(config), step, stop)
            del variables
            write_report(run, workdir)


def train_policy(
    run: Context,
    workdir: Path,
    manager: CheckpointManager,
    stop: StopSignal,
    pace: float | None = None,
) -> TrainState:
    """Takes the remaining steps of the warm-up and of GRPO.

    Args:
      pace: seconds a rewrite, for the estimates of validations and of the test.
    """
    config = run.config
    last = config.warm_up.steps + config.grpo.steps
    identity = run.identity(splits=None)
    batches = batch_iterators(config, run.queries)
    resumed = resume(manager, run.state_shapes(), identity, batches)
    state, skipped = resumed or (run.initial_state("warm_up"), (0, 0))
    monitor = open_monitor(run.queries, run.galleries, workdir, int(state.step), skipped, pace)
    print_sample = sample_printer(run)

    def save(step: int, metrics: dict) -> None:
        positions = {phase: iterator.get_state() for phase, iterator in batches.items()}
        monitor.flush()
        saved = {"positions": positions, "skipped": monitor.skipped, "about": identity}
        checkpoint.save(manager, step, state, saved, metrics)

    with monitor:
        if int(state.step) < last:
            print_sample(state)
        for step in range(int(state.step), last):
            if step == config.warm_up.steps:
                if step:
                    # The warm-up is evaluated before GRPO changes it.
                    save(step, {})
                    checkpoint.wait(manager)
                    variables = sampling_variables(run.policy, state.trained)
                    evaluate_policy(run, workdir, variables, WARM_UP, step, stop)
                    del variables
                state = start_grpo(run.learner("grpo"), state)

            monitor.start_step(step + 1)
            if step < config.warm_up.steps:
                state, metrics = steps.warm_up(run, state, next(batches["warm_up"]), step)
                entries: list[dict] = []
            else:
                state, metrics, entries = steps.grpo_update(run, state, batches["grpo"], step)
            table, stopping = monitor.share(entries, stop)
            monitor.end_step(metrics, table)

            done = step + 1
            validated = bool(config.evaluation.every) and done % config.evaluation.every == 0
            if validated and monitor.healthy:
                variables = sampling_variables(run.policy, state.trained)
                metrics |= monitor.validation(functools.partial(validate, run, variables))
                del variables
            monitor.write(metrics)
            if done % config.log.sample_every == 0 or done == last:
                print_sample(state)
            monitor.check_divergence(lambda: newest(manager))

            # A step that changed nothing must not push out older checkpoints.
            due = done % config.checkpoint.every == 0 or validated
            if (due and monitor.healthy) or done == last or stopping:
                monitor.saving(functools.partial(save, done, metrics))
            if stopping:
                checkpoint.wait(manager)
                raise Interrupted(done)
    return state


def resume(
    manager: CheckpointManager,
    shapes: TrainState,
    identity: dict,
    batches: Mapping[str, grain.DatasetIterator],
) -> tuple[TrainState, tuple[int, int]] | None:
    """The state of the newest checkpoint and its numbers of skipped steps; None if there is none.

    Sets the iterators to the positions that belong to the state.
    """
    restored = checkpoint.restore(manager, shapes, identity)
    if restored is None:
        return None
    state, saved = restored
    for phase, iterator in batches.items():
        iterator.set_state(saved["positions"][phase])
    checkpoint.set_aside_after(manager, int(state.step))
    return state, saved["skipped"]


def newest(manager: CheckpointManager) -> int | None:
    """The newest checkpoint, once pending ones are written."""
    checkpoint.wait(manager)
    return manager.latest_step()
