"""GRAPE from end to end: warm-up, GRPO, evaluation before and after, report.

    python -m grape_jax.train --config=configs/emoji.py --workdir=runs/emoji

The same command again goes on where a run was stopped. On several machines each runs it, with
--coordinator, --process_id and --process_count, or without where a TPU pod or SLURM tells them.
"""

import json
import logging
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from orbax.checkpoint import CheckpointManager
from tensorboardX import SummaryWriter
from tqdm import tqdm

from grape_jax import (
    checkpoint,
    command_line,
    evaluation,
    files,
    job,
    processes,
    retriever,
    sharding,
    text,
)
from grape_jax.data import pipeline
from grape_jax.errors import UserError, exit_with_sentence
from grape_jax.job import Job
from grape_jax.learner import TrainState, begin_grpo, grpo_step, warm_up_step
from grape_jax.rewriter import encode, merged_variables, ranks_of, read_answers
from grape_jax.rollout import sample
from grape_jax.types import Rewrites

SHOWN = ("reward", "median_rank", "recall_at_10", "kl", "loss")


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the current step is done and saved, the rest can wait."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}; the same command goes on from there.")


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a flag; a second Ctrl-C stops at once.

    SIGTERM is also what a machine that is about to be taken away sends.
    """

    def __init__(self):
        self.asked = False

    def __enter__(self):
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        tqdm.write("stopping after this step; press Ctrl-C again to stop at once.", sys.stderr)

    def asked_anywhere(self) -> bool:
        """Whether any process was asked to stop; all must ask this together."""
        return processes.any_of(self.asked)


def train(config, workdir: Path) -> None:
    """Runs, or goes on with, the run in `workdir`, up to its report.

    Raises:
      UserError: the user can mend it.
      Interrupted: stopped on request; everything is saved.
    """
    job.check(config)
    # So that the run can be used from any folder.
    config.data_dir = str(Path(config.data_dir).resolve())
    checkpoint.refuse_other_config(workdir, config)
    with StopSignal() as stop:
        run = prepare(config, workdir)
        evaluate_policy(run, workdir, {"params": run.base}, "untrained", 0, stop)
        keep, best = config.checkpoint.keep, config.checkpoint.keep_best
        with checkpoint.open_manager(workdir, keep, best) as manager:
            state = learn(run, workdir, manager, stop)
        method = "GRPO" if config.grpo.steps else "warm-up"
        variables = merged_variables(run, state.trained)
        evaluate_policy(run, workdir, variables, method, int(state.step), stop)
        processes.at("the report")
        evaluation.write_report(run, workdir)
    counted = run.retriever.cut_texts
    if counted.cut:
        processes.say(
            f"{counted.cut} of {counted.read} texts were longer than the retriever reads: cut."
        )


def prepare(config: ConfigDict, workdir: Path) -> Job:
    """Loads all that the run works with, and claims the workdir for it."""
    started = time.perf_counter()
    # Data are prepared by process 0 while the others wait; alone it may take its time.
    processes.at("preparing the run", limited=jax.process_count() > 1)
    processes.say("preparing data, policy and retriever ...")
    run = job.build(config)
    if processes.is_writer():
        checkpoint.keep_config(workdir, config)
    processes.say(
        f"{len(run.bank_NxE)} pictures, policy of {run.policy.layers} layers, "
        f"{jax.device_count()} {jax.default_backend()} device(s) of {jax.process_count()} "
        f"process(es), ready in {time.perf_counter() - started:.0f} s"
    )
    return run


def learn(run: Job, workdir: Path, manager: CheckpointManager, stop: StopSignal) -> TrainState:
    """The loop: warm-up steps, then GRPO steps; resumes from the newest checkpoint."""
    config = run.config
    last = config.warm_up.steps + config.grpo.steps
    about = run.about()
    batches = data_iterators(run)
    state = run.fresh_state("warm_up")
    in_a_row, skipped = 0, 0  # steps without a finite loss: the last ones, and all
    processes.at("restoring the newest checkpoint")
    restored = checkpoint.restore(manager, state, about)
    if restored is not None:
        state, saved = restored
        in_a_row, skipped = saved["skipped"]
        for phase, iterator in batches.items():
            iterator.set_state(saved["positions"][phase])
    first = int(state.step)
    checkpoint.set_aside_after(manager, first)
    log = Log(workdir, first)
    bar = progress(total=last, initial=first, desc="training", unit="step", dynamic_ncols=True)

    def save(step: int, metrics: dict) -> None:
        positions = {phase: iterator.get_state() for phase, iterator in batches.items()}
        saved = {"positions": positions, "skipped": [in_a_row, skipped], "about": about}
        checkpoint.save(manager, step, state, saved, metrics)

    for step in range(first, last):
        if step == config.warm_up.steps:
            if step:
                # The warm-up alone is judged before anything changes it.
                save(step, {})
                checkpoint.wait(manager)
                variables = merged_variables(run, state.trained)
                evaluate_policy(run, workdir, variables, "warm-up", step, stop)
            state = begin_grpo(run.learner("grpo"), state)
        done = step + 1
        processes.at(f"step {done}")
        began = time.perf_counter()
        if step < config.warm_up.steps:
            phase = "warm-up"
            state, metrics = warm_up(run, state, next(batches["warm_up"]), step)
        else:
            phase = "grpo"
            state, metrics, table = explore(run, state, next(batches["grpo"]), step)
            log.keep_rewrites(step, table)
            if step % config.log.sample_every == 0 and processes.is_writer():
                tqdm.write(sample_line(table))
        in_a_row = in_a_row + 1 if metrics["skipped"] else 0
        skipped += int(metrics["skipped"])
        metrics |= {"skipped": skipped, "seconds": time.perf_counter() - began}
        if in_a_row >= config.max_skipped:
            bar.close()
            checkpoint.wait(manager)
            raise UserError(
                f"{in_a_row} steps in a row had no finite loss; the last good checkpoint is step "
                f"{manager.latest_step()}: lower {phase.replace('-', '_')}.learning_rate and begin "
                "in another --workdir."
            )
        validated = bool(config.evaluation.every) and done % config.evaluation.every == 0
        if validated:
            processes.at(f"the validation after step {done}")
            metrics |= evaluation.validate(run, merged_variables(run, state.trained))
        log.write(done, phase, metrics)
        bar.set_postfix_str("  ".join(f"{k} {metrics[k]:.3g}" for k in SHOWN if k in metrics))
        bar.update()
        stopping = stop.asked_anywhere()
        # What was validated may be the best so far.
        if done % config.checkpoint.every == 0 or done == last or validated or stopping:
            processes.at(f"saving step {done}")
            save(done, metrics)
        if stopping:
            bar.close()
            checkpoint.wait(manager)
            raise Interrupted(done)
    bar.close()
    log.close()
    return state


def data_iterators(run: Job) -> dict:
    """One endless stream of (shift, query) for each phase: the rows that this process holds."""
    queries = [(s, query) for s in run.config.shifts for query in run.queries(s, "train")]

    def stream(size: int, seed: int):
        return pipeline.train_iterator(queries, size, seed, sharding.own_rows(run.mesh, size))

    phases = ("warm_up", "grpo")
    return {p: stream(run.config[p].batch_size, run.config.seed + i) for i, p in enumerate(phases)}


def warm_up(run: Job, state: TrainState, batch, step: int) -> tuple[TrainState, dict]:
    """One supervised step, towards the reference texts or towards rewrites that did well."""
    shifts, queries = zip(*batch, strict=True)
    host_prompts = encode(run, [q.text for q in queries], shifts)
    prompts = sharding.batch(run.mesh, host_prompts)
    if run.config.warm_up.towards == "references":
        goals = [q.reference.lower() for q in queries]
    else:
        goals = best_of_own(run, prompts, queries, step)
    tokens, mask = text.encode_references(
        run.tokenizer, goals, run.config.prompt.format, run.config.rollout.max_tokens
    )
    mask &= np.asarray([bool(goal) for goal in goals])[:, None, None]
    tokens, mask = sharding.batch(run.mesh, (tokens, mask))
    state, metrics = warm_up_step(run.learner("warm_up"), state, run.base, prompts, tokens, mask)
    metrics = {name: float(x) for name, x in sharding.whole(run.mesh, metrics).items()}
    return state, metrics | {"pairs": float(mask.any(axis=(1, 2)).sum())}


def best_of_own(run: Job, prompts, queries, step: int) -> list[str]:
    """The rewrite of the untrained policy, of K, that finds each query's picture best.

    Self-distillation (ConvSearch-R1's warm-up): it needs the right pictures and no reference text.

    Returns:
      Texts of this process's queries; "" where none of the K ranks the picture better than the
      query itself does.
    """
    config = run.config
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    # The budget of evaluation: an untrained policy hardly ends within a trained one's.
    sampling = run.sampling(
        config.grpo.group_size, config.rollout.temperature, config.evaluation.max_tokens
    )
    rollout = sample(run.policy, sampling, {"params": run.base}, prompts, key)
    tokens, mask = sharding.own(run.mesh, (rollout.tokens_BxKxT, rollout.mask_BxKxT))
    # The query stands first: a rewrite that only ties with it teaches nothing.
    candidates = [
        (query.target, [query.text, *(words for words, _ in group)])
        for query, group in zip(queries, read_answers(run, tokens, mask), strict=True)
    ]
    # All processes rank the candidates of all.
    candidates = sharding.all_rows(run.mesh, candidates)
    texts = [words for _, row in candidates for words in row]
    targets = np.repeat([target for target, _ in candidates], config.grpo.group_size + 1)
    ranks = ranks_of(run, run.retriever.embed_texts(texts), targets)
    best = ranks.reshape(len(candidates), -1).argmin(axis=1)
    goals = [row[i] if i else "" for (_, row), i in zip(candidates, best, strict=True)]
    return [goals[i] for i in sharding.own_rows(run.mesh, len(goals))]


def explore(run: Job, state: TrainState, batch, step: int) -> tuple[TrainState, dict, list[dict]]:
    """One GRPO step: sample, read the rewrites, rank, learn. Also the table of what was written."""
    config = run.config
    shifts, queries = zip(*batch, strict=True)
    host_prompts = encode(run, [q.text for q in queries], shifts)
    targets = np.asarray([[q.target] for q in queries], np.int32)
    prompts, targets = sharding.batch(run.mesh, (host_prompts, targets))
    key = jax.random.fold_in(jax.random.key(config.seed), step)

    temperature, max_tokens = config.rollout.temperature, config.rollout.max_tokens
    sampling = run.sampling(config.grpo.group_size, temperature, max_tokens)
    variables = merged_variables(run, state.trained)
    rollout = sample(run.policy, sampling, variables, prompts, key)  # jit
    answers, rewrites = read_rewrites(run, rollout)  # host: text in, retriever tokens out
    state, metrics = grpo_step(  # jit, state donated
        run.learner("grpo"),
        state,
        run.base,
        run.retriever.params,
        run.index,
        prompts,
        targets,
        rollout,
        rewrites,
        raw_ranks(run, queries),
    )
    per_rewrite = metrics.pop("rank_BxK"), metrics.pop("reward_BxK")
    rank_BxK, reward_BxK = sharding.own(run.mesh, per_rewrite)
    metrics = sharding.whole(run.mesh, metrics)
    table = [
        {
            "query": query.text,
            "reference": query.reference,
            "rewrites": [
                {"text": words, "rank": int(rank), "reward": float(reward)}
                for (words, _), rank, reward in zip(group, ranks, rewards, strict=True)
            ],
        }
        for query, group, ranks, rewards in zip(queries, answers, rank_BxK, reward_BxK, strict=True)
    ]
    table = sharding.all_rows(run.mesh, table)
    return state, {name: float(value) for name, value in metrics.items()}, table


def raw_ranks(run: Job, queries) -> jax.Array | None:
    """What the queries themselves rank, where the reward is a gain over that: int32 `[B]`."""
    if run.config.grpo.reward_shape != "improvement":
        return None
    # All processes rank the queries of all.
    known = sharding.all_rows(run.mesh, [(query.text, query.target) for query in queries])
    texts, targets = zip(*known, strict=True)
    ranks = ranks_of(run, run.retriever.embed_texts(texts), targets)
    return sharding.batch(run.mesh, ranks[sharding.own_rows(run.mesh, len(ranks))])


def read_rewrites(run: Job, rollout) -> tuple[list, Rewrites]:
    """The one host hop: completions to texts, texts to the retriever's tokens.

    Each process reads the rewrites that its own devices hold.
    """
    tokens, mask = sharding.own(run.mesh, (rollout.tokens_BxKxT, rollout.mask_BxKxT))
    answers = read_answers(run, tokens, mask)
    words = [words for group in answers for words, _ in group]
    tokens_QxL, mask_QxL = retriever.tokenize(
        run.retriever, words, run.config.retriever.text_length
    )
    B, K = tokens.shape[:2]
    rewrites = Rewrites(
        tokens_BxKxL=tokens_QxL.reshape(B, K, -1),
        mask_BxKxL=mask_QxL.reshape(B, K, -1),
        well_formed_BxK=np.asarray([[ok for _, ok in group] for group in answers]),
        has_text_BxK=np.asarray([[bool(words) for words, _ in group] for group in answers]),
    )
    return answers, sharding.batch(run.mesh, rewrites)


def evaluate_policy(
    run: Job, workdir: Path, variables, method: str, step: int, stop: StopSignal
) -> None:
    """Rewrites the test queries with the policy of a step, with progress; nothing is done twice."""
    sets = evaluation.test_sets(run)
    total = 2 * sum(len(queries) for _, _, queries in sets)
    processes.at(f"the test of the {method} policy")
    with progress(total=total, desc=f"test, {method}", unit="rewrite", leave=False) as bar:

        def after_batch(done: int) -> None:
            bar.update(done)
            processes.at(f"the test of the {method} policy after {bar.n} rewrites")
            if stop.asked_anywhere():
                raise Interrupted(step)

        evaluation.policy_answers(run, workdir, variables, method, sets, after_batch)


def progress(**settings) -> tqdm:
    """A progress bar, of one process."""
    return tqdm(**settings, disable=not processes.is_writer())


def sample_line(table: list[dict]) -> str:
    """The query of the step with the widest spread of ranks, and its best and worst rewrite."""
    ranks = lambda row: [rewrite["rank"] for rewrite in row["rewrites"]]
    row = max(table, key=lambda row: max(ranks(row)) - min(ranks(row)))
    best, worst = (pick(row["rewrites"], key=lambda r: r["rank"]) for pick in (min, max))
    return (
        f"  {row['query']!r}: {best['text']!r} finds it at {best['rank']}, "
        f"{worst['text']!r} at {worst['rank']}"
    )


class Log:
    """metrics.jsonl, rewrites.jsonl and TensorBoard events; a resumed run drops what it redoes.

    Process 0 alone writes.
    """

    def __init__(self, workdir: Path, first: int):
        self.workdir = workdir
        self.events = None
        if processes.is_writer():
            _drop_lines(workdir / "metrics.jsonl", lambda line: line["step"] > first)
            _drop_lines(workdir / "rewrites.jsonl", lambda line: line["step"] > first)
            self.events = SummaryWriter(str(workdir / "tensorboard"), purge_step=first + 1)

    def write(self, step: int, phase: str, metrics: dict) -> None:
        if self.events is None:
            return
        line = {"step": step, "phase": phase} | metrics
        files.append(self.workdir / "metrics.jsonl", json.dumps(line) + "\n")
        for name, value in metrics.items():
            self.events.add_scalar(f"{phase}/{name}", value, step)

    def keep_rewrites(self, step: int, table: list[dict]) -> None:
        if self.events is None:
            return
        lines = [json.dumps({"step": step + 1} | row, ensure_ascii=False) for row in table]
        files.append(self.workdir / "rewrites.jsonl", "".join(f"{line}\n" for line in lines))

    def close(self) -> None:
        if self.events is not None:
            self.events.close()


def _drop_lines(path: Path, dropped) -> None:
    if path.exists():
        # The last line of a killed run may be half a line: it has no end.
        whole = [line for line in path.read_bytes().splitlines(True) if line.endswith(b"\n")]
        files.replace(path, b"".join(line for line in whole if not dropped(json.loads(line))))


def main() -> None:
    run_command(train, "runs/emoji")


def run_command(start: Callable[[ConfigDict, Path], None], example: str) -> None:
    """A command line with --config and --workdir for work that can be stopped and gone on with."""
    command_line.define_config()
    flags.DEFINE_string("workdir", None, "Where the run lives; a run found there goes on.")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where there are several.")
    flags.DEFINE_integer("process_id", None, "Which of the processes this one is, from 0.")
    flags.DEFINE_integer("process_count", None, "How many processes there are.")
    command_line.parse()
    given = flags.FLAGS
    if given.workdir is None:
        raise UserError(f"no workdir is given: add --workdir={example}.")
    workdir = files.path(given.workdir)
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every file it touches
    # The run says at its end how many there were.
    warnings.filterwarnings("ignore", message="a text is longer than")
    processes.join(given.coordinator, given.process_id, given.process_count)
    with processes.watched(given.config.step_timeout):
        try:
            with files.failures_told():
                start(given.config, workdir)
        except Interrupted as stopped:
            processes.say(str(stopped))
        except KeyboardInterrupt:
            said = "stopped at once; the same command goes on from the last checkpoint."
            print(said, file=sys.stderr, flush=True)
            processes.leave_at_once(130)
        except Exception as error:
            if jax.process_count() == 1:
                raise
            processes.end_all(error)


if __name__ == "__main__":
    exit_with_sentence(main)
