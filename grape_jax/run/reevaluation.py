"""Evaluation of a finished run with more methods, or of an untrained policy."""

from pathlib import Path

from ml_collections import ConfigDict

from grape_jax.data import catalogue
from grape_jax.reporting.results import UNTRAINED
from grape_jax.run import checks, context
from grape_jax.run.answers import evaluate_policy, missing_tasks, trained_method
from grape_jax.run.context import Context
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
    with StopSignal() as stop:
        evaluate_policy(run, workdir, untrained_variables(run.policy), UNTRAINED, 0, stop)
        _evaluate_trained(run, workdir, stop)
    write_report(run, workdir)


def _evaluate_trained(run: Context, workdir: Path, stop: StopSignal) -> None:
    """Writes the answers of the policy at the end of training, if training has ended."""
    method = trained_method(run.config)
    if not missing_tasks(run.config, run.queries, workdir, method):
        return
    if not checkpoint.has_checkpoints(workdir):
        return
    with checkpoint.open_manager(workdir) as manager:
        done, last = manager.latest_step(), run.config.warm_up.steps + run.config.grpo.steps
        if done is None or done < last:
            print(f"trained {done or 0} of {last} steps: the unfinished policy is left out.")
            return
        benchmark = catalogue.find(run.config.benchmark)
        splits = [*benchmark.test_sets, *([benchmark.withheld] if benchmark.withheld else [])]
        trained = restore_trained(manager, run, run.identity(splits))
    variables = sampling_variables(run.policy, trained)
    evaluate_policy(run, workdir, variables, method, last, stop)
