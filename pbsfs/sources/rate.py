"""A limit of the bytes a second that pbsfs fetches from a source: a token bucket.

A `Source` has one if the user asked for it. What fetches from the source takes a turn for each request, so
all readers, sessions and files share the limit. The bucket holds what the rate brings in one second, as that
of proxmox-backup-client does unless it gets `--burst`. Requests that somebody waits for come before those
that are made ahead. Used by the chunk store and the reader, in the trio loop.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

BURST = 1.0
"""Seconds: after a pause, as many bytes as the rate brings in this time are fetched at once."""


@dataclass(slots=True, eq=False)
class Turn:
    """A request that may be sent. `size`: the bytes that are expected; then set to those that came."""

    size: int
    is_awaited: Callable[[], bool]
    came: trio.Event = field(default_factory=trio.Event)


class Rate:
    """`limit` bytes a second; `run` has to run meanwhile."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._free_at = -math.inf  # when the next turn comes, by the clock of the loop
        self._waiting: list[Turn] = []  # in the order in which they came
        self._wanted = trio.Event()
        self._pause = trio.CancelScope()

    @asynccontextmanager
    async def turn(self, size: int, is_awaited: Callable[[], bool] = lambda: True) -> AsyncIterator[Turn]:
        """Waits until a request may be sent.

        `size`: the bytes that are expected, which count until the context ends; then those count that the
        caller has set, or none if it fails. `is_awaited`: asked at each turn: whether somebody waits for the
        request.
        """
        turn = Turn(size, is_awaited)
        self._waiting.append(turn)
        self._wanted.set()
        expected, came = size, 0
        try:
            await turn.came.wait()
            yield turn
            came = turn.size
        finally:
            if turn.came.is_set():
                self._count(came - expected)
            else:
                self._waiting.remove(turn)

    async def run(self) -> None:
        """Gives the turns, until it is cancelled."""
        while True:
            while not self._waiting:
                self._wanted = trio.Event()
                await self._wanted.wait()
            if self._free_at > trio.current_time():
                with trio.CancelScope(deadline=self._free_at) as self._pause:
                    await trio.sleep_forever()
                continue  # all that waited may have been cancelled
            turn = next((turn for turn in self._waiting if turn.is_awaited()), self._waiting[0])
            self._waiting.remove(turn)
            self._count(turn.size)
            turn.came.set()

    def _count(self, size: int) -> None:
        """Takes `size` bytes from the bucket, or returns them if it is negative."""
        self._free_at = max(self._free_at, trio.current_time() - BURST) + size / self.limit
        self._pause.deadline = self._free_at
