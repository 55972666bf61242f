"""Rewrites of any number of queries, in batches of one static shape."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from grape_jax.data.pictures import Picture
from grape_jax.rl import prompts
from grape_jax.rl.rollout import SamplingConfig, sample
from grape_jax.run.policy import RewritePolicy, encode, place, read_answers
from grape_jax.runtime import sharding


def rewrite(
    policy: RewritePolicy,
    variables: dict[str, Any],
    texts: Sequence[str],
    shifts: Sequence[str],
    sampling: SamplingConfig,
    batch_size: int,
    seed: int = 0,
    after_batch: Callable[[int], None] = lambda done: None,
    pictures: Sequence[Picture | None] | None = None,
) -> list[str]:
    """One rewrite of each user turn. A collective: all processes rewrite the same texts.

    Args:
      variables: from `policy.sampling_variables`.
      sampling: with a group size of 1.
      after_batch: called with the number of rewrites of each finished batch.
      pictures: of each turn, for a vision-language policy.
    """
    if not texts:
        return []
    rewrites = [""] * len(texts)
    buckets = policy.buckets
    encoded = encode(policy, texts, shifts, pictures)
    # Texts of one bucket stand together, so that few batches are padded to the longest.
    order = np.argsort(np.searchsorted(buckets, encoded.mask_BxS.sum(axis=1)), kind="stable")
    for start in range(0, len(texts), batch_size):
        chunk = order[start : start + batch_size]
        short = prompts.to_bucket(jax.tree.map(lambda x, rows=chunk: x[rows], encoded), buckets)
        # The last text is repeated up to a whole batch; each process takes its devices' rows.
        rows = np.minimum(sharding.local_rows(policy.mesh, batch_size), len(chunk) - 1)
        given = pictures and [pictures[i] for i in chunk]
        placed = place(policy, short, rows, given)
        key = jax.random.fold_in(jax.random.key(seed), start)
        rollout = sample(policy.model, sampling, variables, placed, key, policy.lora)
        answers = read_answers(
            policy, *sharding.local_to_host(policy.mesh, (rollout.tokens_BxKxT, rollout.mask_BxKxT))
        )
        found = sharding.gather_rows(policy.mesh, [answer.text for [answer] in answers])
        for i, text in zip(chunk, found[: len(chunk)], strict=True):
            rewrites[i] = text
        after_batch(len(chunk))
    return rewrites
