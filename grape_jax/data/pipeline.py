"""The order of the training queries: shuffled by epoch, endless, resumable.

A grain iterator whose state is the number of batches so far. The state is saved with the
checkpoint (`get_state()`, `set_state()`), so that a resumed run gets the batches that an
uninterrupted one would have got. Queries are short texts in memory, so there are no workers or
threads. The order depends on the seed alone.
"""

from collections.abc import Sequence
from typing import Any

import grain

from grape_jax.runtime.errors import UserError


def train_iterator(
    sets: Sequence[Sequence[Any]], batch_size: int, seed: int
) -> grain.DatasetIterator:
    """Returns an endless iterator of batches of queries, in a new order every epoch.

    Each batch is from one set, and the sets alternate: prompts of one set have similar lengths, and
    a small set has as many batches as a large one. Epochs of a set are contiguous: a batch at the
    boundary has the last queries of one epoch and the first of the next, so that all queries of a
    set occur equally often for any batch size.

    Args:
      sets: sequences of any objects, which are neither copied nor changed.
      batch_size: B, queries of a global batch, over all processes.
      seed: 0 <= seed < 2**32, determines the order of all epochs.

    Returns:
      A grain iterator of lists of queries. `get_state()` returns a small dictionary that JSON can
      store; `set_state()` accepts it if all arguments are the same.

    Raises:
      UserError: `batch_size` is below 1 or larger than the smallest set; `seed` is out of range.
    """
    smallest = min(len(queries) for queries in sets)
    _check_arguments(smallest, batch_size, seed)

    def batches(queries: Sequence[Any]) -> grain.MapDataset:
        return (
            grain.MapDataset.source(queries)
            .shuffle(seed=seed)
            .repeat()
            # An endless dataset has no remainder. Without it, grain's length overflows for B = 1.
            .batch(batch_size, drop_remainder=True, batch_fn=list)
        )

    alternating = grain.MapDataset.mix([batches(queries) for queries in sets])
    read_options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(alternating.to_iter_dataset(read_options))


def _check_arguments(size: int, batch_size: int, seed: int) -> None:
    if batch_size < 1:
        raise UserError(f"The batch size is {batch_size}: set it to 1 or more.")
    if batch_size > size:
        raise UserError(
            f"A batch of {batch_size} queries is asked for and the data holds {size}: "
            f"set the batch size to {size} or less."
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"The seed {seed} is out of range: choose one from 0 to {2**32 - 1}.")
