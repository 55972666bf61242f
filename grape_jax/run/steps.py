"""The two training steps: supervised warm-up, and GRPO on ranked rollouts.

Every process holds the same batch of queries; arrays are placed by the rows that its devices hold,
and completions are read by the process that holds them.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grape_jax.data.benchmark import Query, excluded_of
from grape_jax.retrieval.encoder import Retriever, tokenize
from grape_jax.rl import grpo
from grape_jax.rl import prompts as prompting
from grape_jax.rl.learner import TrainState, grpo_train_step, warm_up_train_step
from grape_jax.rl.rollout import filtered_mass, sample
from grape_jax.rl.scoring import score_rewrites
from grape_jax.run.context import Context
from grape_jax.run.data_checks import reference_texts
from grape_jax.run.galleries import QueryPictures
from grape_jax.run.policy import (
    Answer,
    RewritePolicy,
    encode,
    place,
    read_answers,
    sampling_variables,
    untrained_variables,
)
from grape_jax.run.search import best_ranks
from grape_jax.runtime import sharding
from grape_jax.types import Prompts, Rewrites, Rollout, Scores

Batch = list[tuple[str, Query]]  # shift and query


@dataclasses.dataclass(frozen=True)
class RankedRollout:
    """A batch of queries with the rewrites that the policy sampled, and their rewards."""

    batch: Batch  # the whole batch, on every process
    answers: list[list[Answer]]  # of the rows that this process holds
    prompts: Prompts
    rollout: Rollout
    scores: Scores


def warm_up(
    context: Context, state: TrainState, batch: Batch, step: int
) -> tuple[TrainState, dict[str, float]]:
    """One supervised step towards reference texts or towards the policy's own best rewrites."""
    config, policy = context.config, context.policy
    shifts, queries = zip(*batch, strict=True)
    prompts = _place_prompts(
        policy,
        context.captions.prompt_texts(queries, "train"),
        shifts,
        context.pictures(queries, "train"),
    )
    if config.warm_up.towards == "references":
        goals = reference_texts(config, queries)
    else:
        goals = own_best_rewrites(context, prompts, queries, step)
    tokens, mask = prompting.encode_references(
        policy.tokenizer, goals, config.prompt.format, config.rollout.max_tokens
    )
    mask &= np.asarray([bool(goal) for goal in goals])[:, None, None]
    pairs = float(mask.any(axis=(1, 2)).sum())
    tokens, mask = place_rows(context.mesh, (tokens, mask))
    state, metrics = warm_up_train_step(
        context.learner("warm_up"), state, policy.base, prompts, tokens, mask
    )
    metrics = {
        name: float(x) for name, x in sharding.replicated_to_host(context.mesh, metrics).items()
    }
    return state, metrics | {"prompt_length": prompts.tokens_BxS.shape[1], "pairs": pairs}


def own_best_rewrites(
    context: Context, prompts: Prompts, queries: Sequence[Query], step: int
) -> list[str]:
    """The best of K rewrites by the untrained policy, as targets for the warm-up.

    Self-distillation (ConvSearch-R1): needs targets, but no reference texts.

    Returns:
      A text for each query; "" if none of the K ranks better than the query itself. A rewrite
      counts only if it ends within `rollout.max_tokens`: a truncated one would teach not to end.
    """
    config, policy = context.config, context.policy
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    # The budget of evaluation: an untrained policy rarely ends within a trained one's.
    sampling = context.sampling(
        config.grpo.group_size, config.rollout.temperature, config.evaluation.max_tokens
    )
    variables = untrained_variables(policy)
    rollout = sample(policy.model, sampling, variables, prompts, key, policy.lora)
    tokens, mask = sharding.local_to_host(context.mesh, (rollout.tokens_BxKxT, rollout.mask_BxKxT))
    rewrites = [[answer.text for answer in row] for row in read_answers(policy, tokens, mask)]
    rewrites = sharding.gather_rows(context.mesh, rewrites)
    # The query comes first: a rewrite that only ties with it teaches nothing.
    candidates = [[query.text, *row] for query, row in zip(queries, rewrites, strict=True)]
    texts = [text for row in candidates for text in row]
    repeated = [query for query, row in zip(queries, candidates, strict=True) for _ in row]
    emb_QxE = context.retriever.embed_texts(texts)
    targets_QxP = context.queries.targets(repeated)
    ranks = best_ranks(context.galleries.open("train"), emb_QxE, repeated, targets_QxP)
    _, mask = prompting.encode_references(
        policy.tokenizer, texts, config.prompt.format, config.rollout.max_tokens
    )
    usable = mask.any(axis=(1, 2)) & np.asarray([bool(text) for text in texts])
    shape = len(queries), config.grpo.group_size + 1
    ranks, usable = ranks.reshape(shape), usable.reshape(shape)
    usable[:, 0] = True
    best = np.where(usable, ranks, np.iinfo(ranks.dtype).max).argmin(axis=1)
    return [row[i] if i else "" for row, i in zip(candidates, best, strict=True)]


def grpo_update(
    context: Context, state: TrainState, batches: Iterator[Batch], step: int
) -> tuple[TrainState, dict[str, float], list[dict]]:
    """One GRPO step: sample, rank, update.

    Returns:
      The state, the metrics, and a log entry for each query whose row this process holds.
    """
    config = context.config
    key = jax.random.key(config.seed)
    variables = sampling_variables(context.policy, state.trained)
    ranked = rollout_and_score(context, variables, next(batches), jax.random.fold_in(key, step))
    rollouts, refilled = 1, 0
    while rollouts <= config.grpo.refills and flat_groups(context.mesh, ranked).any():
        # Numbers beyond the last step: no two rollouts of a training share a key.
        steps = config.warm_up.steps + config.grpo.steps
        again = jax.random.fold_in(key, step + rollouts * steps)
        more = rollout_and_score(context, variables, next(batches), again)
        ranked, replaced = refill(context.mesh, ranked, more)
        rollouts, refilled = rollouts + 1, refilled + replaced
    del variables  # the update needs the memory of a gathered copy
    state, metrics = grpo_train_step(  # jit, state donated
        context.learner("grpo"),
        state,
        context.policy.base,
        ranked.prompts,
        ranked.rollout,
        ranked.scores,
    )
    if ranked.rollout.filtered_logprobs_BxKxT is not None:
        metrics["sampler_filtered_mass"] = filtered_mass(ranked.rollout)
    metrics, scores = sharding.replicated_to_host(context.mesh, (metrics, ranked.scores))
    metrics |= {"rollouts": rollouts, "groups_refilled": refilled}
    metrics["prompt_length"] = ranked.prompts.tokens_BxS.shape[1]
    metrics = {name: float(value) for name, value in metrics.items()}
    return state, metrics, _log_entries(context.mesh, ranked, scores)


def rollout_and_score(
    context: Context, variables: dict[str, Any], batch: Batch, key: jax.Array
) -> RankedRollout:
    """Samples rewrites of a batch of queries, parses them, and ranks their targets."""
    config, policy, mesh = context.config, context.policy, context.mesh
    shifts, queries = zip(*batch, strict=True)
    prompts = _place_prompts(
        policy,
        context.captions.prompt_texts(queries, "train"),
        shifts,
        context.pictures(queries, "train"),
    )
    targets, excluded, gains = place_rows(
        mesh,
        (
            context.queries.targets(queries),
            excluded_of(queries),
            context.queries.gains(queries),
        ),
    )
    sampling = context.sampling(
        config.grpo.group_size, config.rollout.temperature, config.rollout.max_tokens
    )
    rollout = sample(policy.model, sampling, variables, prompts, key, policy.lora)  # jit
    # The host hop: completions to texts, texts to the retriever's tokens.
    tokens, mask = sharding.local_to_host(mesh, (rollout.tokens_BxKxT, rollout.mask_BxKxT))
    answers = read_answers(policy, tokens, mask)
    rewrites = retriever_tokens(context.retriever, answers)
    gallery, raw = context.galleries.open("train"), None
    if config.grpo.reward_shape == "improvement":
        emb_BxE = context.retriever.embed_texts([query.text for query in queries])
        raw = best_ranks(gallery, emb_BxE, queries, context.queries.targets(queries))
    scores = score_rewrites(  # jit
        context.scorer(),
        context.retriever.params,
        gallery.index,
        targets,
        rollout,
        sharding.batch(mesh, rewrites),
        excluded,
        None if raw is None else place_rows(mesh, raw),
        gains,
    )
    return RankedRollout(batch, answers, prompts, rollout, scores)


def retriever_tokens(retriever: Retriever, answers: list[list[Answer]]) -> Rewrites:
    """The rewrites in parsed answers, as token ids of the retriever (numpy)."""
    texts = [answer.text for group in answers for answer in group]
    tokens_QxL, mask_QxL = tokenize(retriever, texts)
    B, K = len(answers), len(answers[0])
    flag = lambda read: np.asarray([[read(answer) for answer in group] for group in answers])
    arrays: Any = (  # NumPy: placed on the mesh by the caller
        tokens_QxL.reshape(B, K, -1),
        mask_QxL.reshape(B, K, -1),
        flag(lambda answer: answer.well_formed),
        flag(lambda answer: bool(answer.text)),
    )
    return Rewrites(*arrays)


def flat_groups(mesh: Mesh, ranked: RankedRollout) -> np.ndarray:
    """Which groups have no variance in their rewards: bool `[B]`, on the host."""
    return np.asarray(grpo.flat_groups(sharding.replicated_to_host(mesh, ranked.scores.compared)))


def refill(mesh: Mesh, ranked: RankedRollout, more: RankedRollout) -> tuple[RankedRollout, int]:
    """Replaces flat groups by groups with variance (dynamic sampling of DAPO, 2503.14476).

    Returns:
      The batch, of the same size, and the number of replaced groups.
    """
    free, good = np.flatnonzero(flat_groups(mesh, ranked)), np.flatnonzero(~flat_groups(mesh, more))
    replaced = min(len(free), len(good))
    size = len(ranked.batch)
    row_B = np.arange(size)
    row_B[free[:replaced]] = size + good[:replaced]
    arrays_of = lambda one: (one.prompts, one.rollout, one.scores)
    prompts, rollout, scores = _choose_rows(mesh, arrays_of(ranked), arrays_of(more), row_B)
    batch = [(ranked.batch + more.batch)[row] for row in row_B]
    # A chosen row may come from another process.
    answers = [
        answer for one in (ranked, more) for answer in sharding.gather_rows(mesh, one.answers)
    ]
    chosen = [[Answer(*one) for one in answers[row_B[i]]] for i in sharding.local_rows(mesh, size)]
    return RankedRollout(batch, chosen, prompts, rollout, scores), replaced


def place_rows(mesh: Mesh, tree):
    """Places numpy arrays of a whole batch, known to every process, by the rows of its devices."""
    rows = sharding.local_rows(mesh, len(jax.tree.leaves(tree)[0]))
    return sharding.batch(mesh, jax.tree.map(lambda x: x[rows], tree))


def _place_prompts(
    policy: RewritePolicy,
    texts: Sequence[str],
    shifts: Sequence[str],
    pictures: QueryPictures | None,
) -> Prompts:
    """Prompts of a whole batch with their pictures, padded to its bucket and placed."""
    encoded = prompting.to_bucket(encode(policy, texts, shifts, pictures), policy.buckets)
    return place(policy, encoded, sharding.local_rows(policy.mesh, len(texts)), pictures)


def _widened(prompts: Prompts, length: int) -> Prompts:
    """Prompts of one bucket, padded on the left to the length of another."""
    more = ((0, 0), (length - prompts.tokens_BxS.shape[1], 0))
    widen = lambda x: jnp.pad(x, (*more, *[(0, 0)] * (x.ndim - 2)))
    widened = jax.tree.map(widen, prompts.replace(features_BxIxD=None))
    return widened.replace(features_BxIxD=prompts.features_BxIxD)


@functools.partial(jax.jit, static_argnums=0)
def _choose_rows(mesh: Mesh, one, other, row_B):
    """Rows of two concatenated batches, placed as a batch."""
    length = max(prompts.tokens_BxS.shape[1] for prompts, *_ in (one, other))
    one, other = ((_widened(prompts, length), *rest) for prompts, *rest in (one, other))
    chosen = jax.tree.map(lambda a, b: jnp.concatenate([a, b])[row_B], one, other)
    return jax.lax.with_sharding_constraint(chosen, sharding.logical(mesh, "batch"))


def _log_entries(mesh: Mesh, ranked: RankedRollout, scores: Scores) -> list[dict]:
    """A log entry for each query whose row this process holds; scores on the host."""
    entries = []
    for row, answers in zip(
        sharding.local_rows(mesh, len(ranked.batch)), ranked.answers, strict=True
    ):
        shift, query = ranked.batch[row]
        group = zip(answers, scores.rank_BxK[row], scores.reward_BxK[row], strict=True)
        entries.append(
            {
                "shift": shift,
                "id": query.id,
                "query": query.text,
                "reference": query.reference,
                "targets": list(query.targets),
                "rewrites": [_log_entry(*one) for one in group],
            }
        )
    return entries


def _log_entry(answer: Answer, rank, reward) -> dict:
    """One rewrite; a malformed one with its whole completion."""
    entry = {
        "text": answer.text,
        "rank": int(rank),
        "reward": float(reward),
        "well_formed": answer.well_formed,
        "length": answer.length,
    }
    return entry if answer.well_formed else entry | {"completion": answer.completion}
