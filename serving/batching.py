"""Micro-batching: requests that arrive while a batch is being scored share the next one.

Nothing ever waits for company: an idle scorer takes the first request at once, and concurrency alone makes
batches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from serving.online import Event
from serving.scorer import Answer

MAX_WAITING = 1024


@dataclass(frozen=True)
class _Request:
    events: Sequence[Event]
    answer: asyncio.Future[list[Answer]]


class MicroBatcher:
    """Feeds one scoring thread from many requests. Made, used and closed on one event loop.

    Args:
        score: called in the thread with the events of one or more requests; answers in their order.
        max_events: events after which a batch is full; one request is never split.
    """

    def __init__(self, score: Callable[[Sequence[Event]], list[Answer]], max_events: int = 512) -> None:
        self._score, self._max_events = score, max_events
        self._requests: asyncio.Queue[_Request | None] = asyncio.Queue(MAX_WAITING)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scorer")
        self._loop = asyncio.create_task(self._run(), name="micro-batcher")

    async def submit(self, events: Sequence[Event]) -> list[Answer]:
        """The answers to one request's events; raises what `score` raised."""
        request = _Request(events, asyncio.get_running_loop().create_future())
        await self._requests.put(request)
        return await request.answer

    async def close(self) -> None:
        """Answer what is queued, then stop."""
        await self._requests.put(None)
        await self._loop
        self._thread.shutdown()

    async def _run(self) -> None:
        open_ = True
        while open_:
            first = await self._requests.get()
            if first is None:
                return
            batch, size = [first], len(first.events)
            while size < self._max_events and not self._requests.empty():
                following = self._requests.get_nowait()
                if following is None:
                    open_ = False
                    break
                batch.append(following)
                size += len(following.events)
            await self._answer(batch)

    async def _answer(self, batch: list[_Request]) -> None:
        events = [event for request in batch for event in request.events]
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._score, events)
        except Exception as error:
            for request in batch:
                if not request.answer.done():
                    request.answer.set_exception(error)
            return
        start = 0
        for request in batch:
            end = start + len(request.events)
            if not request.answer.done():  # the client may have gone
                request.answer.set_result(answers[start:end])
            start = end
