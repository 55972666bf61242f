"""The order in which training sees its queries: shuffled by epoch, endless, resumable.

The iterator is grain's own. Its state is one number (how many batches it gave), so it is saved with
the checkpoint by `get_state()` / `set_state()` and a resumed run sees exactly the batches that the
uninterrupted one would have seen. Queries are short texts in memory: there are no workers and no
threads, and the order depends on the seed alone, not on the machine.
"""

from collections.abc import Sequence
from typing import Any

import grain

from grape_jax.runtime.errors import UserError


def train_iterator(
    sets: Sequence[Sequence[Any]],
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
) -> grain.DatasetIterator:
    """Endless batches of queries, in a new order every epoch.

    A batch is of one set, and the sets take turns: queries of one kind have prompts of one length,
    and a small set is heard as often as a large one. Epochs of a set follow each other without a
    gap: a batch at the boundary holds the last queries of one epoch and the first of the next, so
    every query of a set is seen equally often whatever the batch size.

    Args:
      sets: any objects; never copied or changed.
      batch_size: B, queries in a global batch, over all processes.
      seed: 0 <= seed < 2**32, decides the order of all epochs.
      rows: which rows of each global batch this process takes; None: all.

    Returns:
      A grain iterator over lists of queries. `get_state()` gives a small dictionary that JSON can
      hold; `set_state()` takes it back, in an iterator made with the same arguments but for the
      rows. The state counts global batches, so it is the same on every process.

    Raises:
      UserError: the batch is larger than the data.
    """
    smallest = min(len(queries) for queries in sets)
    _refuse_impossible(smallest, batch_size, seed)
    rows = range(batch_size) if rows is None else rows

    def batches(queries: Sequence[Any]) -> grain.MapDataset:
        return (
            grain.MapDataset.source(queries)
            .shuffle(seed=seed)
            .repeat()
            # Nothing is ever dropped; without this, grain's length overflows for a batch of one.
            .batch(batch_size, drop_remainder=True, batch_fn=list)
            .map(lambda batch: [batch[row] for row in rows])
        )

    in_turn = grain.MapDataset.mix([batches(queries) for queries in sets])
    in_this_thread = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(in_turn.to_iter_dataset(in_this_thread))


def _refuse_impossible(size: int, batch_size: int, seed: int) -> None:
    if batch_size < 1:
        raise UserError(f"The batch size is {batch_size}: set it to 1 or more.")
    if batch_size > size:
        raise UserError(
            f"A batch of {batch_size} queries is asked for and the data holds {size}: "
            f"set the batch size to {size} or less."
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"The seed {seed} is out of range: choose one from 0 to {2**32 - 1}.")
