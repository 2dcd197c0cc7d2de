"""A number of bytes that tasks of one trio loop may use at the same time.

The chunk store and the open files bound their fetches with it: a task that wants more bytes than are left
waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class Budget:
    """At most `capacity` bytes are taken at the same time, first come, first served.

    An amount larger than `capacity` is taken when nothing else is.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.taken = 0
        self._waiting: deque[tuple[int, trio.Event]] = deque()

    @asynccontextmanager
    async def take(self, amount: int) -> AsyncIterator[None]:
        """Waits until `amount` bytes are available, and takes them as long as the context lasts."""
        if self._waiting or not self._fits(amount):
            turn = trio.Event()
            self._waiting.append((amount, turn))
            try:
                await turn.wait()
            except trio.Cancelled:
                if not turn.is_set():
                    self._waiting.remove((amount, turn))
                    amount = 0
                self._give_back(amount)  # the next may have waited for this one only
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
