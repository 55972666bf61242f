"""Makes a run's report again, with more methods if asked, or evaluates a policy without training.

    python -m grape_jax.evaluate --workdir=runs/emoji --methods=all
    python -m grape_jax.evaluate --config=configs/emoji.py --workdir=runs/untrained

What is on disk is kept; only what is missing is written.
"""

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from grape_jax.reporting.results import EXTRAS, UNTRAINED
from grape_jax.run import checks, context, evaluation
from grape_jax.run.context import Job
from grape_jax.run.loop import evaluate_policy, with_whole_paths
from grape_jax.run.rewriter import merged_variables, restore_trained, sampling_variables
from grape_jax.runtime import checkpoint, command_line, compilation_cache, files
from grape_jax.runtime.errors import UserError, exit_with_sentence
from grape_jax.runtime.shutdown import StopSignal, interruptible


def evaluate(config: ConfigDict | None, workdir: Path, methods: tuple[str, ...] | None) -> None:
    """Writes the answers that are missing, then the report.

    Args:
      config: of a workdir that is new, or that holds a run of this config; None: the run's own.
      methods: instead of the config's `evaluation.methods`; None: those.

    Raises:
      UserError: there is no run and no config, or the user can mend it otherwise.
      Interrupted: stopped on request; everything is saved.
    """
    stored = config is None
    config = ConfigDict(checkpoint.read_config(workdir)) if stored else config
    if methods is not None:
        config.evaluation.methods = methods
    checks.check(config)
    if stored:
        compilation_cache.enable(config)
        run = context.build(context.on_these_devices(config.to_dict()))
    else:
        with_whole_paths(config)
        checkpoint.refuse_other_config(workdir, config)
        compilation_cache.enable(config)
        run = context.build(config)
        checkpoint.claim(workdir, config)
    with StopSignal() as stop:
        evaluate_policy(run, workdir, sampling_variables(run, run.base), UNTRAINED, 0, stop)
        evaluate_trained(run, workdir, stop)
    evaluation.write_report(run, workdir)


def evaluate_trained(run: Job, workdir: Path, stop: StopSignal) -> None:
    """The answers of the policy at the end of training, where it has come there."""
    method = evaluation.trained_method(run.config)
    if not evaluation.still_to_write(run, workdir, method) or not checkpoint.holds_any(workdir):
        return
    with checkpoint.open_manager(workdir) as manager:
        done, last = manager.latest_step(), run.config.warm_up.steps + run.config.grpo.steps
        if done is None or done < last:
            print(f"trained {done or 0} of {last} steps: the unfinished policy is left out.")
            return
        about = run.about() | {"data": run.data_digests(evaluation.splits(run.config))}
        trained = restore_trained(manager, run, about)
    evaluate_policy(run, workdir, merged_variables(run, trained), method, last, stop)


def main() -> None:
    command_line.define_config()
    flags.DEFINE_string("workdir", None, "The run, or where to keep an evaluation without one.")
    flags.DEFINE_list(
        "methods", None, f"Instead of evaluation.methods: all, or some of {', '.join(EXTRAS)}."
    )
    command_line.parse(config_needed=False)
    if flags.FLAGS.workdir is None:
        raise UserError("no workdir is given: add --workdir=runs/emoji.")
    methods = flags.FLAGS.methods
    if methods is not None:
        methods = EXTRAS if methods == ["all"] else tuple(methods)
    command_line.quiet()
    with interruptible():
        evaluate(flags.FLAGS.config, files.path(flags.FLAGS.workdir), methods)


if __name__ == "__main__":
    exit_with_sentence(main)
