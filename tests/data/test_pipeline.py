"""The order of training: resumable anywhere, every query equally often."""

import itertools
import json

import pytest

from grape_jax.data.pipeline import train_iterator
from grape_jax.runtime.errors import UserError

QUERIES = [f"query {number}" for number in range(10)]


def _take(iterator, count):
    return list(itertools.islice(iterator, count))


@pytest.mark.parametrize("cut", [0, 1, 3, 4, 10, 17])
@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_a_resumed_run_sees_what_the_uninterrupted_one_sees(cut, batch_size):
    whole = _take(train_iterator([QUERIES], batch_size, seed=7), 25)
    first = train_iterator([QUERIES], batch_size, seed=7)
    assert _take(first, cut) == whole[:cut]
    state = json.loads(json.dumps(first.get_state()))
    second = train_iterator([QUERIES], batch_size, seed=7)
    _take(second, 2)  # a state is taken back wherever the iterator stands
    second.set_state(state)
    assert _take(second, 25 - cut) == whole[cut:]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10])
def test_every_epoch_holds_every_query_once_in_another_order(batch_size):
    batches = _take(train_iterator([QUERIES], batch_size, seed=0), 40)
    assert all(len(batch) == batch_size for batch in batches)
    stream = list(itertools.chain(*batches))[:40]
    epochs = [stream[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == sorted(QUERIES) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_seed_decides_the_order():
    first, again, other = (_take(train_iterator([QUERIES], 5, seed), 4) for seed in (1, 1, 2))
    assert first == again != other


def test_sets_take_turns_and_each_batch_is_of_one():
    small, large = ["a", "b"], [str(number) for number in range(10)]
    batches = _take(train_iterator([small, large], 2, seed=0), 12)
    assert [set(batch) <= set(small) for batch in batches] == [True, False] * 6
    assert all(sorted(batch) == small for batch in batches[::2])
    assert sorted(itertools.chain(*batches[1:10:2])) == sorted(large)
    second = train_iterator([small, large], 2, seed=0)
    second.set_state(json.loads('{"next_index": 5}'))
    assert _take(second, 7) == batches[5:]


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ((11, 0), "10 or less"),
        ((0, 0), "1 or more"),
        ((4, -1), "choose one from 0"),
    ],
)
def test_impossible_arguments_are_refused(arguments, advice):
    with pytest.raises(UserError, match=advice):
        train_iterator([QUERIES], *arguments)
