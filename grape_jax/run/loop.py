"""GRAPE from end to end: warm-up, GRPO, evaluation before and after, report.

    python -m grape_jax.train --config=configs/emoji.py --workdir=runs/emoji

The same command again goes on where a run was stopped. On several machines each runs it, with
--coordinator, --process_id and --process_count, or without where a TPU pod or SLURM tells them.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from orbax.checkpoint import CheckpointManager
from tqdm import tqdm

from grape_jax.data import pipeline
from grape_jax.data.benchmark import Query, excluded_of
from grape_jax.retrieval import encoder
from grape_jax.rl import grpo
from grape_jax.rl.learner import TrainState, begin_grpo, grpo_step, warm_up_step
from grape_jax.rl.prompts import encode_references
from grape_jax.rl.rollout import filtered_mass, sample
from grape_jax.rl.scoring import score_rewrites
from grape_jax.run import checks, context, eta, evaluation
from grape_jax.run.context import Job
from grape_jax.run.rewriter import (
    Answer,
    encode,
    merged_variables,
    ranks_of,
    read_answers,
    sampling_variables,
)
from grape_jax.runtime import (
    checkpoint,
    command_line,
    compilation_cache,
    files,
    lock,
    processes,
    sharding,
)
from grape_jax.runtime.errors import UserError, exit_with_sentence
from grape_jax.runtime.log import Log, sample_table
from grape_jax.runtime.shutdown import Interrupted, StopSignal, interruptible
from grape_jax.types import Prompts, Rewrites, Rollout, Scores

SHOWN = ("reward", "median_rank", "recall_at_10", "kl", "loss")


def train(config, workdir: Path) -> None:
    """Runs, or goes on with, the run in `workdir`, up to its report.

    Raises:
      UserError: the user can mend it; another run is at work in the workdir.
      Interrupted: stopped on request; everything is saved.
    """
    checks.check(config)
    with_whole_paths(config)
    checkpoint.refuse_other_config(workdir, config)
    compilation_cache.enable(config)
    with lock.held(workdir):
        _train(config, workdir)


def _train(config, workdir: Path) -> None:
    """`train` in a workdir that no other run writes to."""
    run = prepare(config, workdir)
    with StopSignal() as stop:
        variables = sampling_variables(run, run.base)
        pace = evaluate_policy(run, workdir, variables, "untrained", 0, stop)
        keep, best = config.checkpoint.keep, config.checkpoint.keep_best
        with checkpoint.open_manager(workdir, keep, best) as manager:
            state = learn(run, workdir, manager, stop, pace)
        method = evaluation.trained_method(config)
        variables = merged_variables(run, state.trained)
        evaluate_policy(run, workdir, variables, method, int(state.step), stop)
        evaluation.write_report(run, workdir)


def with_whole_paths(config: ConfigDict) -> None:
    """Makes the config's paths absolute, so that its run can be used from any folder."""
    config.data_dir = str(Path(config.data_dir).resolve())
    for name in ("images", "embeddings", "queries"):
        path = config.local[name]
        config.local[name] = path and str(Path(path).expanduser().resolve())
    if config.prompt.caption_bank:
        config.prompt.caption_bank = str(Path(config.prompt.caption_bank).resolve())


def prepare(config: ConfigDict, workdir: Path) -> Job:
    """Loads all that the run works with, and claims the workdir for it."""
    started = time.perf_counter()
    processes.preparing("preparing the run")
    processes.say("preparing data, policy and retriever ...")
    run = context.build(config)
    processes.writer_first(lambda: checkpoint.claim(workdir, config))
    processes.say(
        f"{len(run.gallery('train'))} pictures, policy of {run.policy.layers} layers, "
        f"{jax.device_count()} {jax.default_backend()} device(s) of {jax.process_count()} "
        f"process(es), ready in {time.perf_counter() - started:.0f} s"
    )
    return run


def learn(
    run: Job,
    workdir: Path,
    manager: CheckpointManager,
    stop: StopSignal,
    pace: float | None = None,
) -> TrainState:
    """The loop: warm-up steps, then GRPO steps; resumes from the newest checkpoint.

    Args:
      pace: seconds a rewrite, for the estimate until a validation has been measured.
    """
    config = run.config
    last = config.warm_up.steps + config.grpo.steps
    about = run.about() | {"data": run.data_digests()}
    batches = data_iterators(run)
    in_a_row, skipped = 0, 0  # steps without a finite loss: the last ones, and all
    processes.at("restoring the newest checkpoint")
    restored = checkpoint.restore(manager, run.state_shapes(), about)
    if restored is None:
        state = run.fresh_state("warm_up")
    else:
        state, saved = restored
        in_a_row, skipped = saved["skipped"]
        for phase, iterator in batches.items():
            iterator.set_state(saved["positions"][phase])
    first = int(state.step)
    checkpoint.set_aside_after(manager, first)
    log = Log(workdir, first)
    measured = eta.measured_in(log.lines())
    if pace is not None and not measured[eta.VALIDATION]:
        measured[eta.VALIDATION].append(pace * evaluation.validation_size(run))
    # tqdm's own estimate counts the pauses of evaluations as steps.
    shown = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
    bar = progress(total=last, initial=first, desc="training", dynamic_ncols=True, bar_format=shown)

    def save(step: int, metrics: dict) -> None:
        positions = {phase: iterator.get_state() for phase, iterator in batches.items()}
        saved = {"positions": positions, "skipped": [in_a_row, skipped], "about": about}
        log.flush()
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
            state, metrics, table = explore(run, state, batches["grpo"], step)
            log.keep_rewrites(step, table)
            if step % config.log.sample_every == 0 and processes.is_writer():
                tqdm.write(sample_table(step, table))
        in_a_row = in_a_row + 1 if metrics["skipped"] else 0
        skipped += bool(metrics["skipped"])
        metrics |= {"skipped": skipped, "seconds": time.perf_counter() - began}
        measured[phase].append(metrics["seconds"])
        if in_a_row >= config.max_skipped:
            log.write(done, phase, metrics)
            log.close()
            bar.close()
            checkpoint.wait(manager)
            good = manager.latest_step()
            before = f"the last checkpoint before them is step {good}" if good else "none was saved"
            raise UserError(
                f"{in_a_row} steps in a row had a loss or gradient that was not finite; {before}: "
                f"lower {phase.replace('-', '_')}.learning_rate and begin in another --workdir."
            )
        validated = bool(config.evaluation.every) and done % config.evaluation.every == 0
        if validated:
            processes.at(f"the validation after step {done}")
            began = time.perf_counter()
            metrics |= evaluation.validate(run, merged_variables(run, state.trained))
            metrics["validation_seconds"] = time.perf_counter() - began
            measured[eta.VALIDATION].append(metrics["validation_seconds"])
        log.write(done, phase, metrics)
        left = eta.text(eta.work_left(config, done), measured)
        values = [f"{name} {metrics[name]:.3g}" for name in SHOWN if name in metrics]
        bar.update()
        bar.set_postfix_str("  ".join([left, *values] if left else values))
        stopping = stop.asked_anywhere()
        # What was validated may be the best so far. A step that changed nothing must not push out
        # what came before it.
        due = done % config.checkpoint.every == 0 or validated
        if (due and not in_a_row) or done == last or stopping:
            processes.at(f"saving step {done}")
            began = time.perf_counter()
            save(done, metrics)
            measured[eta.SAVING].append(time.perf_counter() - began)
        if stopping:
            bar.close()
            checkpoint.wait(manager)
            raise Interrupted(done)
    bar.close()
    log.close()
    return state


def data_iterators(run: Job) -> dict:
    """One endless stream of batches of (shift, query) for each phase that has steps.

    A batch is of one shift; a process gets the rows that it holds.
    """
    config, shifts = run.config, run.config.shifts
    sets = {
        "warm_up": [[(shift, query) for query in run.lessons(shift)] for shift in shifts],
        "grpo": [[(shift, query) for query in run.queries(shift, "train")] for shift in shifts],
    }

    def stream(phase: str, seed: int):
        size = config[phase].batch_size
        rows = sharding.own_rows(run.mesh, size)
        return pipeline.train_iterator(sets[phase], size, seed, rows)

    return {
        phase: stream(phase, config.seed + i)
        for i, phase in enumerate(("warm_up", "grpo"))
        if config[phase].steps
    }


def warm_up(run: Job, state: TrainState, batch, step: int) -> tuple[TrainState, dict]:
    """One supervised step, towards the reference texts or towards rewrites that did well."""
    shifts, queries = zip(*batch, strict=True)
    host_prompts = encode(run, run.prompt_texts(queries, "train"), shifts)
    prompts = sharding.batch(run.mesh, host_prompts)
    if run.config.warm_up.towards == "references":
        goals = [q.reference.lower() for q in queries]
    else:
        goals = best_of_own(run, prompts, queries, step)
    tokens, mask = encode_references(
        run.tokenizer, goals, run.config.prompt.format, run.config.rollout.max_tokens
    )
    mask &= np.asarray([bool(goal) for goal in goals])[:, None, None]
    tokens, mask = sharding.batch(run.mesh, (tokens, mask))
    state, metrics = warm_up_step(run.learner("warm_up"), state, run.base, prompts, tokens, mask)
    metrics = {name: float(x) for name, x in sharding.whole(run.mesh, metrics).items()}
    metrics["prompt_length"] = prompts.tokens_BxS.shape[1]
    return state, metrics | {"pairs": float(mask.any(axis=(1, 2)).sum())}


def best_of_own(run: Job, prompts, queries, step: int) -> list[str]:
    """The rewrite of the untrained policy, of K, that finds each query's picture best.

    Self-distillation (ConvSearch-R1's warm-up): it needs the right pictures and no reference text.

    Returns:
      Texts of this process's queries; "" where none of the K ranks the picture better than the
      query itself does. One that would not end within rollout.max_tokens does not count: cut off,
      it would teach not to end.
    """
    config = run.config
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    # The budget of evaluation: an untrained policy hardly ends within a trained one's.
    sampling = run.sampling(
        config.grpo.group_size, config.rollout.temperature, config.evaluation.max_tokens
    )
    rollout = sample(run.policy, sampling, sampling_variables(run, run.base), prompts, key)
    tokens, mask = sharding.own(run.mesh, (rollout.tokens_BxKxT, rollout.mask_BxKxT))
    # The query stands first: a rewrite that only ties with it teaches nothing.
    candidates = [
        [query.text, *(answer.text for answer in group)]
        for query, group in zip(queries, read_answers(run, tokens, mask), strict=True)
    ]
    # All processes rank the candidates of all.
    queries, candidates = all_queries(run, queries), sharding.all_rows(run.mesh, candidates)
    texts = [words for row in candidates for words in row]
    asked = [query for query, row in zip(queries, candidates, strict=True) for _ in row]
    ranks = ranks_of(run, run.retriever.embed_texts(texts), asked, "train")
    limit = config.rollout.max_tokens
    _, mask = encode_references(run.tokenizer, texts, config.prompt.format, limit + 1)
    usable = (mask.sum(axis=(1, 2)) <= limit) & np.asarray([bool(words) for words in texts])
    shape = len(queries), config.grpo.group_size + 1
    ranks, usable = ranks.reshape(shape), usable.reshape(shape)
    usable[:, 0] = True
    best = np.where(usable, ranks, len(run.gallery("train")) + 1).argmin(axis=1)
    goals = [row[i] if i else "" for row, i in zip(candidates, best, strict=True)]
    return [goals[i] for i in sharding.own_rows(run.mesh, len(goals))]


def all_queries(run: Job, queries: Sequence[Query]) -> list[Query]:
    """The queries of a whole batch, of which each process gives its own."""
    known = sharding.all_rows(run.mesh, [dataclasses.asdict(query) for query in queries])
    return [Query(**fields) for fields in known]


def own_pictures(queries: Sequence[Query]) -> np.ndarray | None:
    """`excluded_of` for this process's part of a batch: None on all processes, or on none."""
    rows_Bx1 = excluded_of(queries)
    if processes.any_of(rows_Bx1 is not None) and rows_Bx1 is None:
        return np.full((len(queries), 1), -1, np.int32)
    return rows_Bx1


@dataclasses.dataclass(frozen=True)
class Experience:
    """A batch of queries, what the policy wrote for them, and what that is worth.

    Every process knows the texts of all.
    """

    batch: list[tuple[str, Query]]  # with their shifts
    answers: list[list[Answer]]
    prompts: Prompts
    rollout: Rollout
    scores: Scores


def explore(run: Job, state: TrainState, batches, step: int) -> tuple[TrainState, dict, list[dict]]:
    """One GRPO step: sample, read the rewrites, rank, learn. Also the table of what was written."""
    key = jax.random.key(run.config.seed)
    variables = merged_variables(run, state.trained)
    found = experience(run, variables, next(batches), jax.random.fold_in(key, step))
    rollouts, refilled = 1, 0
    while rollouts <= run.config.grpo.refills and flat_groups(run, found).any():
        # Beyond the last step's number: no two rollouts of the training share a key.
        steps = run.config.warm_up.steps + run.config.grpo.steps
        again = jax.random.fold_in(key, step + rollouts * steps)
        found, replaced = refill(run, found, experience(run, variables, next(batches), again))
        rollouts, refilled = rollouts + 1, refilled + replaced
    del variables  # the step needs the merged copy's memory
    state, metrics = grpo_step(  # jit, state donated
        run.learner("grpo"), state, run.base, found.prompts, found.rollout, found.scores
    )
    if found.rollout.filtered_logprobs_BxKxT is not None:
        metrics["sampler_filtered_mass"] = filtered_mass(found.rollout)
    metrics, paid = sharding.whole(run.mesh, (metrics, found.scores))
    metrics |= {"rollouts": rollouts, "groups_refilled": refilled}
    metrics["prompt_length"] = found.prompts.tokens_BxS.shape[1]
    return state, {name: float(value) for name, value in metrics.items()}, table_of(found, paid)


def table_of(found: Experience, paid: Scores) -> list[dict]:
    """What was written for each query of a step; the scores on the host."""
    return [
        {
            "shift": shift,
            "id": query.id,
            "query": query.text,
            "reference": query.reference,
            "targets": list(query.targets),
            "rewrites": [table_entry(*of_one) for of_one in zip(*of_group, strict=True)],
        }
        for (shift, query), *of_group in zip(
            found.batch, found.answers, paid.rank_BxK, paid.reward_BxK, strict=True
        )
    ]


def experience(run: Job, variables, batch, key) -> Experience:
    """Samples rewrites of a batch of queries, reads them, and ranks what they say.

    Args:
      batch: (shift, query) of the rows that this process holds.
    """
    config = run.config
    shifts, queries = zip(*batch, strict=True)
    host_prompts = encode(run, run.prompt_texts(queries, "train"), shifts)
    rows = run.targets(queries), own_pictures(queries)
    prompts, targets, excluded = sharding.batch(run.mesh, (host_prompts, *rows))
    temperature, max_tokens = config.rollout.temperature, config.rollout.max_tokens
    sampling = run.sampling(config.grpo.group_size, temperature, max_tokens)
    rollout = sample(run.policy, sampling, variables, prompts, key)  # jit
    answers, rewrites = read_rewrites(run, rollout)  # host: text in, retriever tokens out
    scores = score_rewrites(  # jit
        run.scorer(),
        run.retriever.params,
        run.gallery("train").index,
        targets,
        rollout,
        rewrites,
        excluded,
        raw_ranks(run, queries),
    )
    told = [
        (shift, dataclasses.asdict(query), group)
        for shift, query, group in zip(shifts, queries, answers, strict=True)
    ]
    told = sharding.all_rows(run.mesh, told)
    batch = [(shift, Query(**fields)) for shift, fields, _ in told]
    answers = [[Answer(*one) for one in group] for *_, group in told]
    return Experience(batch, answers, prompts, rollout, scores)


def flat_groups(run: Job, found: Experience) -> np.ndarray:
    """Which groups have no variance in their rewards: bool `[B]`, on the host."""
    return np.asarray(grpo.flat_groups(sharding.whole(run.mesh, found.scores.compared)))


def refill(run: Job, found: Experience, more: Experience) -> tuple[Experience, int]:
    """Groups without variance make way for groups with some (DAPO's dynamic sampling, 2503.14476).

    Returns:
      The batch, of the same size, and how many groups were replaced.
    """
    free, good = np.flatnonzero(flat_groups(run, found)), np.flatnonzero(~flat_groups(run, more))
    replaced = min(len(free), len(good))
    size = len(found.batch)
    row_B = np.arange(size)
    row_B[free[:replaced]] = size + good[:replaced]
    choose = lambda one, other: [(one + other)[row] for row in row_B]
    arrays_of = lambda one: (one.prompts, one.rollout, one.scores)
    prompts, rollout, scores = _choose_rows(run.mesh, arrays_of(found), arrays_of(more), row_B)
    batch, answers = choose(found.batch, more.batch), choose(found.answers, more.answers)
    return Experience(batch, answers, prompts, rollout, scores), replaced


def _widened(prompts: Prompts, length: int) -> Prompts:
    """Prompts of one bucket, padded on the left to the length of another."""
    more = ((0, 0), (length - prompts.tokens_BxS.shape[1], 0))
    return jax.tree.map(lambda x: jnp.pad(x, more), prompts)


@functools.partial(jax.jit, static_argnums=0)
def _choose_rows(mesh, one, other, row_B):
    """Rows of two batches laid end to end, placed as a batch."""
    length = max(prompts.tokens_BxS.shape[1] for prompts, *_ in (one, other))
    one, other = ((_widened(prompts, length), *rest) for prompts, *rest in (one, other))
    chosen = jax.tree.map(lambda a, b: jnp.concatenate([a, b])[row_B], one, other)
    return jax.lax.with_sharding_constraint(chosen, sharding.logical(mesh, "batch"))


def table_entry(answer: Answer, rank, reward) -> dict:
    """One rewrite for the log; a malformed one with everything that was written."""
    entry = {
        "text": answer.text,
        "rank": int(rank),
        "reward": float(reward),
        "well_formed": answer.well_formed,
        "length": answer.length,
    }
    return entry if answer.well_formed else entry | {"completion": answer.completion}


def raw_ranks(run: Job, queries) -> jax.Array | None:
    """What the queries themselves rank, where the reward is a gain over that: int32 `[B]`."""
    if run.config.grpo.reward_shape != "improvement":
        return None
    # All processes rank the queries of all.
    known = all_queries(run, queries)
    emb_QxE = run.retriever.embed_texts([query.text for query in known])
    ranks = ranks_of(run, emb_QxE, known, "train")
    return sharding.batch(run.mesh, ranks[sharding.own_rows(run.mesh, len(ranks))])


def read_rewrites(run: Job, rollout) -> tuple[list, Rewrites]:
    """The one host hop: completions to texts, texts to the retriever's tokens.

    Each process reads the rewrites that its own devices hold.
    """
    tokens, mask = sharding.own(run.mesh, (rollout.tokens_BxKxT, rollout.mask_BxKxT))
    answers = read_answers(run, tokens, mask)
    words = [answer.text for group in answers for answer in group]
    tokens_QxL, mask_QxL = encoder.tokenize(run.retriever, words, run.config.retriever.text_length)
    B, K = tokens.shape[:2]
    rewrites = Rewrites(
        tokens_BxKxL=tokens_QxL.reshape(B, K, -1),
        mask_BxKxL=mask_QxL.reshape(B, K, -1),
        well_formed_BxK=np.asarray([[one.well_formed for one in group] for group in answers]),
        has_text_BxK=np.asarray([[bool(one.text) for one in group] for group in answers]),
    )
    return answers, sharding.batch(run.mesh, rewrites)


def evaluate_policy(
    run: Job, workdir: Path, variables, method: str, step: int, stop: StopSignal
) -> float | None:
    """Has the policy of a step answer the test queries, with progress; nothing is done twice.

    Returns:
      Seconds a rewrite; None where all answers were there.
    """
    writings = evaluation.still_to_write(run, workdir, method)
    if not writings:
        return None
    paces = []
    total = sum(len(writing.queries) for writing in writings)
    processes.at(f"the test of the {method} policy")
    with progress(total=total, desc=f"test, {method}", unit="rewrite", leave=False) as bar:

        def after_batch(done: int) -> None:
            nonlocal began
            paces.append((time.perf_counter() - began) / done)
            began = time.perf_counter()
            bar.update(done)
            processes.at(f"the test of the {method} policy after {bar.n} rewrites")
            if stop.asked_anywhere():
                raise Interrupted(step)

        began = time.perf_counter()
        evaluation.write_answers(run, variables, writings, after_batch)
    return eta.typical(paces)


def progress(**settings) -> tqdm:
    """A progress bar, of one process."""
    return tqdm(**settings, disable=not processes.is_writer())


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
    command_line.quiet()
    processes.join(given.coordinator, given.process_id, given.process_count)
    with processes.watched(given.config.step_timeout), interruptible():
        start(given.config, workdir)


if __name__ == "__main__":
    exit_with_sentence(main)
