"""A gate in the server's loop, opened from any thread."""

from __future__ import annotations

import threading

import trio


class Gate:
    """Something that waits in the server's loop until any thread says go."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._released = False
        self._waiting: list[tuple[trio.lowlevel.TrioToken, trio.Event]] = []

    def release(self) -> None:
        with self._guard:
            self._released = True
            waiting, self._waiting = self._waiting, []
        for token, event in waiting:
            try:
                token.run_sync_soon(event.set)
            except trio.RunFinishedError:
                continue

    async def released(self) -> None:
        event = trio.Event()
        with self._guard:
            if self._released:
                return
            self._waiting.append((trio.lowlevel.current_trio_token(), event))
        await event.wait()
