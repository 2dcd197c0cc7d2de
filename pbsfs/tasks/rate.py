"""A limit of bytes a second for what a command reads. Used by `verify` and `export`, in the trio loop."""

from __future__ import annotations

import trio


class Rate:
    """Spreads reads over time. Several tasks may share one."""

    def __init__(self, rate: int | None) -> None:
        """`rate`: bytes a second at most; None for no limit."""
        self.rate = rate
        self._next_start = 0.0

    async def wait(self, length: int) -> None:
        """Waits until the next `length` bytes may be read."""
        if self.rate is None:
            return
        now = trio.current_time()
        start = max(now, self._next_start)
        self._next_start = start + length / self.rate
        await trio.sleep_until(start)


UNLIMITED = Rate(None)
