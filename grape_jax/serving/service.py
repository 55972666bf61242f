"""Rewrites and searches for concurrent requests: queues, cache, and answers without a rewrite."""

import asyncio
import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

from cachetools import LRUCache
from PIL import Image

from grape_jax.run.policy import Answer
from grape_jax.serving.batching import Batcher
from grape_jax.serving.engine import EmbeddedPicture, Engine, Match, Search, Turn
from grape_jax.serving.limits import Limits
from grape_jax.serving.metrics import Metrics

Mode = Literal["raw", "rewrite", "fused"]
Fallback = Literal["malformed", "slow", "too_long", "failed"]


class Picture(NamedTuple):
    """The picture of a query."""

    key: str  # identifies it in the cache
    embedded: EmbeddedPicture


class Query(NamedTuple):
    text: str
    shift: str
    picture: Picture | None = None


class Written(NamedTuple):
    text: str  # the rewrite, or the query in its place
    fallback: Fallback | None = None  # why the query stands in its place
    cached: bool = False


class Service:
    """Answers concurrent requests with an engine.

    An asynchronous context manager: calls are answered inside. Rewrites are computed in one thread
    and searches in another, so that a query can be searched while others are rewritten.
    """

    def __init__(self, engine: Engine, limits: Limits, metrics: Metrics):
        self.engine, self.limits, self.metrics = engine, limits, metrics
        self._cache: LRUCache[tuple, Answer | None] = LRUCache(limits.cache)
        self._exit = contextlib.AsyncExitStack()

    async def __aenter__(self) -> "Service":
        policy, retriever = (
            self._exit.enter_context(ThreadPoolExecutor(1, name)) for name in ("policy", "search")
        )
        limits, engine = self.limits, self.engine
        self._writing: Batcher[Turn, Answer | None] = await self._start(
            "rewrite", engine.write, policy, engine.sizes[-1], limits.rewrite_wait
        )
        self._embedding: Batcher[Image.Image, EmbeddedPicture] = await self._start(
            "picture", engine.embed_pictures, retriever, limits.batch, limits.search_wait
        )
        self._searching: Batcher[Search, list[Match]] = await self._start(
            "search", engine.search, retriever, limits.batch, limits.search_wait
        )
        return self

    async def __aexit__(self, *_) -> None:
        await self._exit.aclose()

    async def _start(self, stage, compute, thread, size, wait) -> Batcher:
        observe = self.metrics.batches.labels(stage).observe
        batcher: Batcher = Batcher(
            compute, thread, size=size, wait=wait, queue=self.limits.queue, observe=observe
        )
        self.metrics.watch_queue(stage, batcher.__len__)
        return await self._exit.enter_async_context(batcher)

    @property
    def waiting(self) -> int:
        """Queries that wait to be rewritten."""
        return len(self._writing)

    async def rewrite(self, query: Query) -> Written:
        """The rewrite of a query; the query itself if the rewrite is malformed or takes too long.

        Raises:
          BusyError: a queue is full.
        """
        key = (query.text, query.shift, query.picture and query.picture.key)
        cached = key in self._cache
        if cached:
            self.metrics.cached.inc()
            written = _judge(query.text, self._cache[key])
        else:
            written = await self._write(query, key)
        if written.fallback:
            self.metrics.fallbacks.labels(written.fallback).inc()
        return written._replace(cached=cached)

    async def _write(self, query: Query, key: tuple) -> Written:
        turn = Turn(query.text, query.shift)
        if query.picture:
            emb_E, _, image = query.picture.embedded
            text = await asyncio.to_thread(self.engine.user_turn, query.text, emb_E)
            turn = Turn(text, query.shift, image)
        answer = self._writing.submit(turn)
        # A rewrite that comes too late is kept for the next request.
        answer.add_done_callback(lambda done: self._keep(key, done))
        try:
            await asyncio.wait([answer], timeout=self.limits.rewrite_timeout)
        finally:
            self._writing.abandon(answer)
        if not answer.done() or answer.cancelled():
            return Written(query.text, "slow")
        if answer.exception() is not None:  # logged by the batcher
            return Written(query.text, "failed")
        return _judge(query.text, answer.result())

    def _keep(self, key: tuple, answer: "asyncio.Future[Answer | None]") -> None:
        if not answer.cancelled() and answer.exception() is None:
            self._cache[key] = answer.result()

    async def search(
        self, query: Query, rewrite: str | None, mode: Mode, top: int
    ) -> Sequence[Match]:
        """The best matches of a query, of its rewrite, or of both together.

        Args:
          rewrite: needed unless the mode is "raw".

        Raises:
          BusyError: a queue is full.
        """
        assert rewrite is not None or mode == "raw"
        texts = {"raw": (query.text,), "rewrite": (rewrite,), "fused": (query.text, rewrite)}[mode]
        excluded = query.picture.embedded.row if query.picture else -1
        return await self._searching.submit(Search(texts, top, excluded))  # type: ignore[arg-type]

    async def embed_picture(self, image: Image.Image, key: str) -> Picture:
        """A picture that was uploaded.

        Args:
          key: identifies the picture.

        Raises:
          BusyError: a queue is full.
        """
        return Picture(key, await self._embedding.submit(image))

    def picture(self, row: int) -> Picture:
        """A picture of the gallery."""
        return Picture(f"row {row}", self.engine.picture(row))


def _judge(query: str, answer: Answer | None) -> Written:
    """What to search with, given the policy's answer; None is a query that is too long."""
    if answer is None:
        return Written(query, "too_long")
    return Written(answer.text) if answer.well_formed else Written(query, "malformed")
