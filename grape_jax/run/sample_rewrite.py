"""The rewrite of one validation query, printed in the course of a training."""

import random
from collections.abc import Callable

from grape_jax.reporting.step_line import sample_line
from grape_jax.rl.learner import TrainState
from grape_jax.run.context import Context
from grape_jax.run.evaluation import validation_queries
from grape_jax.run.policy import sampling_variables
from grape_jax.run.rewriting import rewrite
from grape_jax.run.search import best_ranks
from grape_jax.runtime import processes, sharding


def sample_printer(run: Context) -> Callable[[TrainState], None]:
    """Returns a function that prints the greedy rewrite of one query, and the rank of its target.

    The query is a validation query with a target, chosen by the run's seed; without any, nothing is
    printed. A call is a collective; the first one compiles.
    """
    found = validation_queries(run.config, run.queries)
    candidates = [(shift, query) for shift, query in found if query.targets]
    if not candidates:
        return lambda state: None
    shift, query = random.Random(run.config.seed).choice(candidates)
    sampling = run.sampling(1, 0.0, run.config.evaluation.max_tokens)
    rows = sharding.batch_parts(run.mesh)

    def print_sample(state: TrainState) -> None:
        prompts = run.captions.prompt_texts([query], "validation")
        variables = sampling_variables(run.policy, state.trained)
        seen = run.pictures([query], "validation")
        [text] = rewrite(run.policy, variables, prompts, [shift], sampling, rows, pictures=seen)
        gallery = run.galleries.open("validation")
        emb_1xE = run.retriever.embed_texts([text])
        [rank] = best_ranks(gallery, emb_1xE, [query], run.queries.targets([query]))
        picture = gallery.corpus.names[query.image] if query.image >= 0 else ""
        processes.announce(sample_line(query.text, picture, text, int(rank), len(gallery)))

    return print_sample
