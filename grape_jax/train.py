"""GRAPE from end to end: warm-up, GRPO, evaluation before and after, report.

    python -m grape_jax.train --config=configs/emoji.py --workdir=runs/emoji

The same command again goes on where a run was stopped.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
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
    grpo,
    job,
    retriever,
    sharding,
    text,
)
from grape_jax.data import pipeline
from grape_jax.data.benchmark import excluded_of
from grape_jax.errors import UserError, exit_with_sentence
from grape_jax.job import Job
from grape_jax.learner import TrainState, begin_grpo, grpo_step, warm_up_step
from grape_jax.rewriter import (
    Answer,
    encode,
    merged_variables,
    ranks_of,
    read_answers,
    sampling_variables,
)
from grape_jax.rollout import filtered_mass, sample
from grape_jax.scoring import score_rewrites
from grape_jax.types import Prompts, Rewrites, Rollout, Scores

SHOWN = ("reward", "median_rank", "recall_at_10", "kl", "loss")
SHOWN_QUERIES = 3  # of a step, in the table of rewrites
COMPILED = "/jax/core/compile/backend_compile_duration"  # jax's event, cached programs included
MAX_SKIPPED = 5  # steps in a row without a finite loss, before the run stops


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the current step is done, the rest can wait."""


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a flag; a second Ctrl-C stops at once."""

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

    def raise_if_asked(self, *_):
        if self.asked:
            raise Interrupted


def train(config, workdir: Path) -> None:
    """Runs, or goes on with, the run in `workdir`, up to its report.

    Raises:
      UserError: the user can mend it.
      Interrupted: stopped on request; everything is saved.
    """
    job.check(config)
    # So that the run can be used from any folder.
    config.data_dir = str(Path(config.data_dir).resolve())
    for name in ("images", "embeddings", "queries"):
        path = config.local[name]
        config.local[name] = path and str(Path(path).expanduser().resolve())
    if config.prompt.caption_bank:
        config.prompt.caption_bank = str(Path(config.prompt.caption_bank).resolve())
    checkpoint.refuse_other_config(workdir, config)
    started = time.perf_counter()
    print("preparing data, policy and retriever ...", flush=True)
    run = job.build(config)
    checkpoint.keep_config(workdir, config)
    print(
        f"{len(run.gallery('train'))} pictures, policy of {run.policy.layers} layers, "
        f"{jax.device_count()} {jax.default_backend()} device(s), "
        f"ready in {time.perf_counter() - started:.0f} s",
        flush=True,
    )
    with StopSignal() as stop:
        evaluate_policy(run, workdir, sampling_variables(run, run.base), "untrained", stop)
        with checkpoint.open_manager(workdir, config.checkpoint.keep) as manager:
            state = learn(run, workdir, manager, stop)
        method = evaluation.trained_method(config)
        evaluate_policy(run, workdir, merged_variables(run, state.trained), method, stop)
    evaluation.write_report(run, workdir)
    counted = run.retriever.cut_texts
    if counted.cut:
        print(f"{counted.cut} of {counted.read} texts were longer than the retriever reads: cut.")


def learn(run: Job, workdir: Path, manager: CheckpointManager, stop: StopSignal) -> TrainState:
    """The loop: warm-up steps, then GRPO steps; resumes from the newest checkpoint."""
    config = run.config
    last = config.warm_up.steps + config.grpo.steps
    batches = data_iterators(run)
    state = run.fresh_state("warm_up")
    restored = checkpoint.restore(manager, state)
    if restored is not None:
        state, positions = restored
        for phase, iterator in batches.items():
            iterator.set_state(positions[phase])
    first = int(state.step)
    log = Log(workdir, first)
    skipped = 0
    bar = tqdm(total=last, initial=first, desc="training", unit="step", dynamic_ncols=True)

    def save(step: int) -> None:
        positions = {phase: iterator.get_state() for phase, iterator in batches.items()}
        checkpoint.save(manager, step, state, positions)

    for step in range(first, last):
        if step == config.warm_up.steps:
            if step:
                # The warm-up alone is judged before anything changes it.
                save(step)
                evaluate_policy(run, workdir, merged_variables(run, state.trained), "warm-up", stop)
            state = begin_grpo(run.learner("grpo"), state)
        began = time.perf_counter()
        if step < config.warm_up.steps:
            phase = "warm-up"
            state, metrics = warm_up(run, state, next(batches["warm_up"]), step)
        else:
            phase = "grpo"
            state, metrics, table = explore(run, state, batches["grpo"], step)
            log.keep_rewrites(step, table)
            if step % config.log.sample_every == 0:
                tqdm.write(sample_table(step, table))
        skipped = skipped + 1 if metrics.pop("skipped") else 0
        if skipped >= MAX_SKIPPED:
            raise UserError(
                f"{skipped} steps in a row had no finite loss; the last good checkpoint is step "
                f"{manager.latest_step()}: lower {phase.replace('-', '_')}.learning_rate and begin "
                "in another --workdir."
            )
        done = step + 1
        metrics["seconds"] = time.perf_counter() - began
        if config.evaluation.every and done % config.evaluation.every == 0:
            variables = merged_variables(run, state.trained)
            metrics |= evaluation.validate(run, variables)
        log.write(done, phase, metrics)
        bar.set_postfix_str("  ".join(f"{k} {metrics[k]:.3g}" for k in SHOWN if k in metrics))
        bar.update()
        if done % config.checkpoint.every == 0 or done == last or stop.asked:
            save(done)
        stop.raise_if_asked()
    bar.close()
    log.close()
    return state


def data_iterators(run: Job) -> dict:
    """One endless stream of batches of (shift, query) for each phase that has steps.

    A batch is of one shift.
    """
    config, shifts = run.config, run.config.shifts
    sets = {
        "warm_up": [[(shift, query) for query in run.lessons(shift)] for shift in shifts],
        "grpo": [[(shift, query) for query in run.queries(shift, "train")] for shift in shifts],
    }
    return {
        phase: pipeline.train_iterator(sets[phase], config[phase].batch_size, config.seed + i)
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
    tokens, mask = text.encode_references(
        run.tokenizer, goals, run.config.prompt.format, run.config.rollout.max_tokens
    )
    mask &= np.asarray([bool(goal) for goal in goals])[:, None, None]
    tokens, mask = sharding.batch(run.mesh, (tokens, mask))
    state, metrics = warm_up_step(run.learner("warm_up"), state, run.base, prompts, tokens, mask)
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    metrics["prompt_length"] = prompts.tokens_BxS.shape[1]
    return state, metrics | {"pairs": float(mask.any(axis=(1, 2)).sum())}


def best_of_own(run: Job, prompts, queries, step: int) -> list[str]:
    """The rewrite of the untrained policy, of K, that finds each query's picture best.

    Self-distillation (ConvSearch-R1's warm-up): it needs the right pictures and no reference text.

    Returns:
      Texts; "" where none of the K ranks the picture better than the query itself does. One that
      would not end within rollout.max_tokens does not count: cut off, it would teach not to end.
    """
    config = run.config
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    # The budget of evaluation: an untrained policy hardly ends within a trained one's.
    sampling = run.sampling(
        config.grpo.group_size, config.rollout.temperature, config.evaluation.max_tokens
    )
    rollout = sample(run.policy, sampling, sampling_variables(run, run.base), prompts, key)
    answers = read_answers(run, *jax.device_get((rollout.tokens_BxKxT, rollout.mask_BxKxT)))
    # The query stands first: a rewrite that only ties with it teaches nothing.
    candidates = [
        [query.text, *(answer.text for answer in group)]
        for query, group in zip(queries, answers, strict=True)
    ]
    texts = [words for row in candidates for words in row]
    asked = [query for query, row in zip(queries, candidates, strict=True) for _ in row]
    ranks = ranks_of(run, run.retriever.embed_texts(texts), asked, "train")
    limit = config.rollout.max_tokens
    _, mask = text.encode_references(run.tokenizer, texts, config.prompt.format, limit + 1)
    usable = (mask.sum(axis=(1, 2)) <= limit) & np.asarray([bool(words) for words in texts])
    shape = len(queries), config.grpo.group_size + 1
    ranks, usable = ranks.reshape(shape), usable.reshape(shape)
    usable[:, 0] = True
    best = np.where(usable, ranks, len(run.gallery("train")) + 1).argmin(axis=1)
    return [row[i] if i else "" for row, i in zip(candidates, best, strict=True)]


@dataclasses.dataclass(frozen=True)
class Experience:
    """A batch of queries, what the policy wrote for them, and what that is worth."""

    batch: list  # (shift, query)
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
    while rollouts <= run.config.grpo.refills and flat_groups(found).any():
        # Beyond the last step's number: no two rollouts of a run share a key.
        steps = run.config.warm_up.steps + run.config.grpo.steps
        again = jax.random.fold_in(key, step + rollouts * steps)
        found, replaced = refill(run, found, experience(run, variables, next(batches), again))
        rollouts, refilled = rollouts + 1, refilled + replaced
    del variables  # the step needs the merged copy's memory
    state, metrics = grpo_step(  # jit, state donated
        run.learner("grpo"), state, run.base, found.prompts, found.rollout, found.scores
    )
    metrics |= {"rollouts": rollouts, "groups_refilled": refilled}
    metrics["prompt_length"] = found.prompts.tokens_BxS.shape[1]
    if found.rollout.filtered_logprobs_BxKxT is not None:
        metrics["sampler_filtered_mass"] = filtered_mass(found.rollout)
    metrics, paid = jax.device_get((metrics, found.scores))
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
    """Samples rewrites of a batch of queries, reads them, and ranks what they say."""
    config = run.config
    shifts, queries = zip(*batch, strict=True)
    host_prompts = encode(run, run.prompt_texts(queries, "train"), shifts)
    rows = run.targets(queries), excluded_of(queries)
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
    return Experience(list(batch), answers, prompts, rollout, scores)


def flat_groups(found: Experience) -> np.ndarray:
    """Which groups have no variance in their rewards: bool `[B]`, on the host."""
    return np.asarray(grpo.flat_groups(found.scores.reward_BxK))


def refill(run: Job, found: Experience, more: Experience) -> tuple[Experience, int]:
    """Groups without variance make way for groups with some (DAPO's dynamic sampling, 2503.14476).

    Returns:
      The batch, of the same size, and how many groups were replaced.
    """
    free, good = np.flatnonzero(flat_groups(found)), np.flatnonzero(~flat_groups(more))
    replaced = min(len(free), len(good))
    size = len(found.batch)
    row_B = np.arange(size)
    row_B[free[:replaced]] = size + good[:replaced]
    choose = lambda one, other: [(one + other)[row] for row in row_B]
    length = max(one.prompts.tokens_BxS.shape[1] for one in (found, more))
    arrays_of = lambda one: (_widened(one.prompts, length), one.rollout, one.scores)
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
    emb_QxE = run.retriever.embed_texts([query.text for query in queries])
    return sharding.batch(run.mesh, ranks_of(run, emb_QxE, queries, "train"))


def read_rewrites(run: Job, rollout) -> tuple[list, Rewrites]:
    """The one host hop: completions to texts, texts to the retriever's tokens."""
    tokens, mask = jax.device_get((rollout.tokens_BxKxT, rollout.mask_BxKxT))
    answers = read_answers(run, tokens, mask)
    words = [answer.text for group in answers for answer in group]
    tokens_QxL, mask_QxL = retriever.tokenize(
        run.retriever, words, run.config.retriever.text_length
    )
    B, K = tokens.shape[:2]
    rewrites = Rewrites(
        tokens_BxKxL=tokens_QxL.reshape(B, K, -1),
        mask_BxKxL=mask_QxL.reshape(B, K, -1),
        well_formed_BxK=np.asarray([[one.well_formed for one in group] for group in answers]),
        has_text_BxK=np.asarray([[bool(one.text) for one in group] for group in answers]),
    )
    return answers, sharding.batch(run.mesh, rewrites)


def evaluate_policy(run: Job, workdir: Path, variables, method: str, stop: StopSignal) -> None:
    """Has one policy answer the test queries, with progress; nothing is done twice."""
    writings = evaluation.still_to_write(run, workdir, method)
    if not writings:
        return
    total = sum(len(writing.queries) for writing in writings)
    with tqdm(total=total, desc=f"test, {method}", unit="rewrite", leave=False) as bar:

        def after_batch(done: int) -> None:
            bar.update(done)
            stop.raise_if_asked()

        evaluation.write_answers(run, variables, writings, after_batch)


def sample_table(step: int, table: list[dict]) -> str:
    """For the terminal: the queries of widest spread, each with its best, middle and worst rewrite.

    Texts stand last: those of other scripts are of any width.
    """
    by_rank = lambda row: sorted(row["rewrites"], key=lambda rewrite: rewrite["rank"])
    spread = lambda row: by_rank(row)[-1]["rank"] - by_rank(row)[0]["rank"]
    lines = [f"step {step + 1}" + f"{'rank':>9}{'reward':>9}  rewrite"]
    for row in sorted(table, key=spread, reverse=True)[:SHOWN_QUERIES]:
        lines.append(f"  {row['query']!r}, which is {row['reference']!r}")
        ranked = by_rank(row)
        for i in sorted({0, len(ranked) // 2, len(ranked) - 1}):
            one = ranked[i]
            said = repr(one["text"])
            if not one["well_formed"]:
                said = f"malformed: {one['completion']!r}"
            lines.append(f"{one['rank']:15d}{one['reward']:9.3f}  {said}")
    return "\n".join(lines)


class Log:
    """metrics.jsonl, rewrites.jsonl and TensorBoard events; a resumed run drops what it redoes."""

    def __init__(self, workdir: Path, first: int):
        self.workdir = workdir
        _drop_lines(workdir / "metrics.jsonl", lambda line: line["step"] > first)
        _drop_lines(workdir / "rewrites.jsonl", lambda line: line["step"] > first)
        self.events = SummaryWriter(str(workdir / "tensorboard"), purge_step=first + 1)
        self.compiled = 0
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event: str, *_, **__) -> None:
        self.compiled += event == COMPILED

    def write(self, step: int, phase: str, metrics: dict) -> None:
        # Since the line before: a step that goes on compiling is a step of ever new shapes.
        metrics = metrics | {"compilations": self.compiled}
        self.compiled = 0
        line = {"step": step, "phase": phase} | metrics
        with (self.workdir / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in metrics.items():
            self.events.add_scalar(f"{phase}/{name}", value, step)

    def keep_rewrites(self, step: int, table: list[dict]) -> None:
        with (self.workdir / "rewrites.jsonl").open("a", encoding="utf-8") as file:
            for row in table:
                file.write(json.dumps({"step": step + 1} | row, ensure_ascii=False) + "\n")

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._count)
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
    command_line.parse()
    if flags.FLAGS.workdir is None:
        raise UserError(f"no workdir is given: add --workdir={example}.")
    with interruptible():
        start(flags.FLAGS.config, Path(flags.FLAGS.workdir))


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Quiet work that can be stopped: exit code 130 and a line on how to go on."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every file it touches
    # The run says at its end how many there were.
    warnings.filterwarnings("ignore", message="a text is longer than")
    warnings.formatwarning = lambda message, *_: f"note: {message}\n"
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        print("stopped; the same command goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    exit_with_sentence(main)
