"""Training steps: how rollouts are scored."""

import dataclasses

import numpy as np
import pytest

from grape_jax.rl.scoring import score_rewrites
from grape_jax.run import context, steps
from grape_jax.run.policy import Answer
from grape_jax.run.search import best_ranks
from grape_jax.runtime import command_line, sharding
from grape_jax.types import Rollout


@pytest.fixture(scope="module")
def loaded(folder):
    """A run whose retriever reads fewer tokens than many queries have."""
    config = command_line.load("configs/emoji_noisy.py")
    config.data_dir, config.policy.path = str(folder / "data"), str(folder / "tiny.gguf")
    config.retriever.text_length, config.prompt.max_tokens = 5, 0
    config.prompt.buckets = ()
    config.grpo.reward_shape = "improvement"
    return context.build(config)


def test_a_verbatim_copy_of_a_long_query_gains_nothing(loaded):
    """Training, the raw query's rank and evaluation read the same number of tokens."""
    whole = dataclasses.replace(loaded.retriever, text_length=None)
    queries = [
        query
        for query in loaded.queries.split("noisy", "train")
        if len(whole.tokenizer(query.text)["input_ids"]) > 8
    ][:8]
    texts = [query.text for query in queries]
    assert len(queries) == 8
    targets = loaded.queries.targets(queries)
    answers = [[Answer(text, True, text, 1)] for text in texts]
    ones = np.ones((8, 1, 1))
    rollout = Rollout(ones.astype(np.int32), ones > 0, ones.astype(np.float32))
    gallery = loaded.galleries.open("train")
    placed = sharding.batch(
        loaded.mesh, (targets, rollout, steps.retriever_tokens(loaded.retriever, answers))
    )
    embedded = loaded.retriever.embed_texts(texts)
    raw = best_ranks(gallery, embedded, queries, targets)
    scores = score_rewrites(
        loaded.scorer(),
        loaded.retriever.params,
        gallery.index,
        *placed,
        None,
        sharding.batch(loaded.mesh, raw),
    )
    np.testing.assert_array_equal(scores.rank_BxK[:, 0], raw)
    np.testing.assert_array_equal(scores.shaped_BxK, 0)
    # With the whole context the same texts rank elsewhere: the limit is real.
    assert (best_ranks(gallery, whole.embed_texts(texts), queries, targets) != raw).any()
