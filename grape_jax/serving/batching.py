"""Batches of concurrent requests: a bounded queue, and one thread that computes."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, Generic, NamedTuple, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
log = logging.getLogger(__name__)


class BusyError(Exception):
    """The queue is full."""


class _Job(NamedTuple):
    item: Any
    answer: asyncio.Future


class Batcher(Generic[Item, Result]):
    """Computes the items of concurrent calls together.

    A call waits in a bounded queue. When the thread is free, it takes what is waiting, at most
    `size` items; if that is less, it waits once for more.

    Args:
      compute: returns one result for each item, in their order; runs in the thread.
      thread: an executor of one thread, which several batchers may share.
      size: items in a batch.
      wait: seconds to wait for a batch to fill.
      queue: calls that may wait.
      observe: called with the number of items of each batch.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Item]], Sequence[Result]],
        thread: Executor,
        *,
        size: int,
        wait: float,
        queue: int,
        observe: Callable[[int], None],
    ):
        self._compute, self._thread = compute, thread
        self._size, self._wait, self._observe = size, wait, observe
        self._queue: asyncio.Queue[_Job] = asyncio.Queue(queue)
        self._started: set[asyncio.Future] = set()
        self._task: asyncio.Task | None = None

    def __len__(self) -> int:
        """Calls that are waiting."""
        return self._queue.qsize()

    async def __aenter__(self) -> "Batcher":
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def submit(self, item: Item) -> "asyncio.Future[Result]":
        """Queues an item; the future holds its result.

        Raises:
          BusyError: the queue is full.
        """
        job = _Job(item, asyncio.get_running_loop().create_future())
        try:
            self._queue.put_nowait(job)
        except asyncio.QueueFull:
            raise BusyError from None
        return job.answer

    def abandon(self, answer: asyncio.Future) -> None:
        """Withdraws an item that nobody waits for, unless its batch has started."""
        if answer not in self._started:
            answer.cancel()

    async def _run(self) -> None:
        while True:
            jobs = [await self._queue.get()]
            if self._queue.qsize() < self._size - 1:
                await asyncio.sleep(self._wait)
            while len(jobs) < self._size and not self._queue.empty():
                jobs.append(self._queue.get_nowait())
            jobs = [job for job in jobs if not job.answer.done()]
            if jobs:
                self._started = {job.answer for job in jobs}
                await self._answer(jobs)
                self._started = set()

    async def _answer(self, jobs: list[_Job]) -> None:
        self._observe(len(jobs))
        items = [job.item for job in jobs]
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._thread, self._compute, items)
        except Exception as error:
            log.exception("a batch of %d failed", len(jobs))
            for job in jobs:
                if not job.answer.done():
                    job.answer.set_exception(error)
            return
        for job, result in zip(jobs, results, strict=True):
            if not job.answer.done():
                job.answer.set_result(result)
