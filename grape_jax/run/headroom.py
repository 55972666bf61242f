"""Measures, before any training, what the untrained policy's samples find."""

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from grape_jax.data import catalogue
from grape_jax.reporting.results import RAW, REFERENCE
from grape_jax.reporting.verdict import GREEDY, SAMPLED, Headroom
from grape_jax.retrieval.encoder import Retriever
from grape_jax.rl.learner import Learner, TrainState, grpo_train_step
from grape_jax.run import composed, steps
from grape_jax.run.answers import QuerySet, progress_bar
from grape_jax.run.context import Context
from grape_jax.run.galleries import Galleries
from grape_jax.run.picture_captions import PictureCaptions
from grape_jax.run.policy import untrained_variables
from grape_jax.run.queries import Queries
from grape_jax.run.rewriting import rewrite
from grape_jax.run.search import best_ranks
from grape_jax.run.steps import RankedRollout
from grape_jax.run.word_baselines import word_baselines
from grape_jax.runtime import sharding

DEPTH = 10  # of the ranked lists of baselines, of which only the ranks are read


def measure(run: Context, shift: str, most: int) -> Headroom:
    """Samples K rewrites of training queries, as the first GRPO steps would, and ranks them.

    Nothing is measured on test queries.

    Args:
      most: the largest number of queries; a whole number of batches is taken.
    """
    config = run.config
    size = config.grpo.batch_size
    found = run.queries.split(shift, "train", most)
    queries = found[: max(1, len(found) // size) * size]
    variables = untrained_variables(run.policy)
    key = jax.random.key(config.seed)
    batches, ranked = [], None
    with progress_bar(total=len(queries), desc=f"headroom, {shift}", unit="query") as bar:
        for start in range(0, len(queries), size):
            chunk = queries[start : start + size]
            # A training set smaller than a batch fills it up with its last query.
            batch = [(shift, query) for query in [*chunk, *[chunk[-1]] * (size - len(chunk))]]
            ranked = steps.rollout_and_score(run, variables, batch, jax.random.fold_in(key, start))
            scores = sharding.replicated_to_host(run.mesh, ranked.scores)
            flat_B = steps.flat_groups(run.mesh, ranked)
            kept = (scores.rank_BxK, scores.well_formed_BxK, scores.ended_BxK, flat_B)
            batches.append([array[: len(chunk)] for array in kept])
            bar.update(len(chunk))
    assert ranked is not None
    rank_QxK, formed_QxK, ended_QxK, flat_Q = map(np.concatenate, zip(*batches, strict=True))
    texts = rewrite(
        run.policy,
        variables,
        run.captions.prompt_texts(queries, "train"),
        [shift] * len(queries),
        run.sampling(1, 0.0, config.evaluation.max_tokens),
        config.evaluation.batch_size,
        pictures=run.pictures(queries, "train"),
    )
    gallery, emb_QxE = run.galleries.open("train"), run.retriever.embed_texts(texts)
    greedy_Q = best_ranks(gallery, emb_QxE, queries, run.queries.targets(queries))
    without = _without_policy(
        config,
        run.queries,
        run.galleries,
        run.retriever,
        run.captions,
        QuerySet(shift, "train", queries),
    )
    return Headroom(
        shift=shift,
        ranks=without | {GREEDY: greedy_Q, SAMPLED: rank_QxK},
        clusters=np.asarray([query.group for query in queries]),
        varied=float(1 - flat_Q.mean()),
        malformed=float(1 - formed_QxK.mean()),
        truncated=float(1 - ended_QxK.mean()),
        prompt_lengths=(*run.policy.buckets, run.policy.prompts[shift].max_tokens),
        completion_length=config.rollout.max_tokens,
        update_bytes=_update_bytes(
            run.learner("grpo"), run.state_shapes(), run.policy.base, ranked
        ),
    )


def _without_policy(
    config: ConfigDict,
    queries: Queries,
    galleries: Galleries,
    retriever: Retriever,
    captions: PictureCaptions,
    one: QuerySet,
) -> dict[str, np.ndarray]:
    """The best ranks of every method that needs no policy, int `[Q]`, by its name."""
    gallery, targets_QxP = galleries.open(one.split), queries.targets(one.queries)
    ranks = lambda emb_QxE: best_ranks(gallery, emb_QxE, one.queries, targets_QxP)
    raw = [query.text for query in one.queries]
    raw_QxE = retriever.embed_texts(raw)
    found = {RAW: ranks(raw_QxE)}
    if one.shift in catalogue.composed_shifts(config):
        settings = composed.tune(config, queries, galleries, retriever, captions, one.shift)
        for baseline in composed.searches(gallery, retriever, captions, one, settings):
            found[baseline.method] = ranks(baseline.emb_QxE)
    if gallery.corpus.texts is not None:
        for method, _, by_words in word_baselines(gallery, one, {RAW: (raw, raw_QxE)}, DEPTH):
            found[method] = by_words.ranks_QxP.min(axis=1)
    if all(query.reference for query in one.queries):
        references = [query.reference for query in one.queries]
        found[REFERENCE] = ranks(retriever.embed_texts(references))
    return found


def _update_bytes(
    learner: Learner, state: TrainState, base: dict[str, Any], ranked: RankedRollout
) -> int:
    """Memory in use on a device during an update, as compiled for this batch.

    Args:
      state: its shapes.
    """
    lowered = grpo_train_step.lower(
        learner, state, base, ranked.prompts, ranked.rollout, ranked.scores
    )
    memory: Any = lowered.compile().memory_analysis()
    # The new state takes the place of the donated one.
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + new
