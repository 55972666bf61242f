"""Evaluation of a finished run with more methods, or of an untrained policy."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from grape_jax.data import catalogue
from grape_jax.reporting.results import UNTRAINED
from grape_jax.rl.learner import TrainState
from grape_jax.run import checks, context
from grape_jax.run.answers import evaluate_policy, missing_tasks, trained_method
from grape_jax.run.final_report import write_report
from grape_jax.run.policy import sampling_variables, untrained_variables
from grape_jax.run.rewriter import restore_trained
from grape_jax.runtime import checkpoint, compilation_cache
from grape_jax.runtime.shutdown import StopSignal


def evaluate(config: ConfigDict | None, workdir: Path, methods: tuple[str, ...] | None) -> None:
    """Writes the missing answers, then the report.

    Args:
      config: for a new workdir, or one that holds a run of this config; None: the run's own.
      methods: replaces the config's `evaluation.methods`; None: keeps them.

    Raises:
      UserError: there is neither a run nor a config, or something else needs a change by the user.
      Interrupted: stopped on request; everything is saved.
    """
    stored = config is None
    chosen = ConfigDict(checkpoint.read_config(workdir)) if config is None else config
    if methods is not None:
        chosen.evaluation.methods = methods
    checks.check(chosen)
    if stored:
        compilation_cache.enable(chosen)
        run = context.build(context.on_local_devices(chosen.to_dict()))
    else:
        context.with_absolute_paths(chosen)
        checkpoint.refuse_other_config(workdir, chosen)
        compilation_cache.enable(chosen)
        run = context.build(chosen)
        checkpoint.write_config(workdir, chosen)
    method = trained_method(chosen)
    with StopSignal() as stop:
        evaluate_policy(run, workdir, untrained_variables(run.policy), UNTRAINED, 0, stop)
        missing = missing_tasks(chosen, run.queries, workdir, method)
        if missing and checkpoint.has_checkpoints(workdir):
            last = chosen.warm_up.steps + chosen.grpo.steps
            benchmark = catalogue.find(chosen.benchmark)
            withheld = [benchmark.withheld] if benchmark.withheld else []
            identity = run.identity([*benchmark.test_sets, *withheld])
            trained = _finished_parameters(workdir, last, run.state_shapes(), identity)
            if trained is not None:
                variables = sampling_variables(run.policy, trained)
                evaluate_policy(run, workdir, variables, method, last, stop)
    write_report(run, workdir)


def _finished_parameters(
    workdir: Path, last: int, shapes: TrainState, identity: dict
) -> dict[str, Any] | None:
    """The trained parameters, or None with a note if training has not come to its last step."""
    with checkpoint.open_manager(workdir) as manager:
        done = manager.latest_step()
        if done is None or done < last:
            print(f"trained {done or 0} of {last} steps: the unfinished policy is left out.")
            return None
        return restore_trained(manager, shapes, identity)
