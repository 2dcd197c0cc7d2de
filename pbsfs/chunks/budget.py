"""A budget of bytes that tasks of one trio loop share: whoever wants more than is left waits."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class Budget:
    """Bytes that may be taken at once; first come, first served. One that is too large goes alone."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.taken = 0
        self._waiting: deque[tuple[int, trio.Event]] = deque()

    @asynccontextmanager
    async def take(self, amount: int) -> AsyncIterator[None]:
        if self._waiting or not self._fits(amount):
            turn = trio.Event()
            self._waiting.append((amount, turn))
            try:
                await turn.wait()
            except trio.Cancelled:
                if not turn.is_set():
                    self._waiting.remove((amount, turn))
                    amount = 0
                self._give_back(amount)  # those behind may have waited for this one only
                raise
        else:
            self.taken += amount
        try:
            yield
        finally:
            self._give_back(amount)

    def _fits(self, amount: int) -> bool:
        return self.taken == 0 or self.taken + amount <= self.capacity

    def _give_back(self, amount: int) -> None:
        self.taken -= amount
        while self._waiting and self._fits(self._waiting[0][0]):
            next_amount, turn = self._waiting.popleft()
            self.taken += next_amount
            turn.set()
