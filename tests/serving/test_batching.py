"""The queue in front of a thread: what is computed together, refused, or left out."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from grape_jax.serving.batching import Batcher, BusyError


def run(test, compute, **bounds):
    """Runs an asynchronous test with a batcher; returns the sizes of its batches."""
    sizes: list[int] = []
    bounds = {"size": 4, "wait": 0.01, "queue": 8} | bounds

    async def main():
        with ThreadPoolExecutor(1) as thread:
            async with Batcher(compute, thread, observe=sizes.append, **bounds) as batcher:
                await asyncio.wait_for(test(batcher), 20)

    asyncio.run(main())
    return sizes


def test_what_waits_is_computed_together_in_order():
    async def test(batcher):
        answers = [batcher.submit(i) for i in range(7)]
        assert len(batcher) == 7
        assert await asyncio.gather(*answers) == [10 * i for i in range(7)]

    assert run(test, lambda items: [10 * item for item in items]) == [4, 3]


def test_a_batch_waits_for_late_items_once():
    async def test(batcher):
        first = batcher.submit("a")
        await asyncio.sleep(0.1)
        assert await asyncio.gather(first, batcher.submit("b")) == ["a", "b"]

    assert run(test, list, wait=1.0) == [2]


def test_a_full_queue_refuses_and_goes_on():
    release = threading.Event()

    def compute(items):
        release.wait()
        return items

    async def test(batcher):
        running = batcher.submit(0)
        while len(batcher):
            await asyncio.sleep(0.01)
        waiting = [batcher.submit(i) for i in (1, 2)]
        with pytest.raises(BusyError):
            batcher.submit(3)
        release.set()
        assert await asyncio.gather(running, *waiting) == [0, 1, 2]
        assert await batcher.submit(4) == 4

    assert sum(run(test, compute, size=1, wait=0.0, queue=2)) == 4


def test_an_abandoned_item_is_left_out_unless_it_has_started():
    release, embedded = threading.Event(), []

    def compute(items):
        release.wait()
        embedded.extend(items)
        return items

    async def test(batcher):
        started = batcher.submit("started")
        while len(batcher):
            await asyncio.sleep(0.01)
        gone, kept = batcher.submit("gone"), batcher.submit("kept")
        batcher.abandon(started)
        batcher.abandon(gone)
        release.set()
        assert await asyncio.gather(started, kept) == ["started", "kept"]
        assert gone.cancelled()

    run(test, compute, wait=0.0)
    assert embedded == ["started", "kept"]


def test_an_error_reaches_every_call_of_its_batch_and_no_other():
    def compute(items):
        return [1 / item for item in items]

    async def test(batcher):
        answers = [batcher.submit(0), batcher.submit(1)]
        for error in await asyncio.gather(*answers, return_exceptions=True):
            assert isinstance(error, ZeroDivisionError)
        assert await batcher.submit(2) == 0.5

    run(test, compute)
