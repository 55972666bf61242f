"""One validation query that is rewritten again and again, to see a policy learn."""

import dataclasses
import random
from typing import Any

from grape_jax.data.benchmark import Query
from grape_jax.reporting.step_line import watched_line
from grape_jax.run.context import Context
from grape_jax.run.evaluation import validation_queries
from grape_jax.run.rewriting import rewrite
from grape_jax.run.search import best_ranks
from grape_jax.runtime import sharding


@dataclasses.dataclass(frozen=True)
class Watched:
    """The query that is shown during a training."""

    shift: str
    query: Query


def choose(run: Context) -> Watched | None:
    """One validation query, chosen by the run's seed; None if there is none with a target."""
    found = validation_queries(run.config, run.queries)
    candidates = [Watched(shift, query) for shift, query in found if query.targets]
    if not candidates:
        return None
    return random.Random(run.config.seed).choice(candidates)


def show(run: Context, variables: dict[str, Any], watched: Watched) -> str:
    """Rewrites the query greedily and ranks its target. A collective.

    Args:
      variables: from `policy.sampling_variables`.

    Returns:
      The line for the terminal.
    """
    query, config = watched.query, run.config
    [text] = rewrite(
        run.policy,
        variables,
        run.captions.prompt_texts([query], "validation"),
        [watched.shift],
        run.sampling(1, 0.0, config.evaluation.max_tokens),
        sharding.batch_parts(run.mesh),
    )
    gallery = run.galleries.open("validation")
    emb_1xE = run.retriever.embed_texts([text])
    [rank] = best_ranks(gallery, emb_1xE, [query], run.queries.targets([query]))
    picture = gallery.corpus.names[query.image] if query.image >= 0 else ""
    return watched_line(query.text, picture, text, int(rank), len(gallery))
