"""Tasks that run side by side, of which the first failure counts. Used by tasks of one trio loop."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio


async def run_together(tasks: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Runs `tasks` side by side. Raises the error of the first that fails, and cancels the others."""
    failure: Exception | None = None

    async def guarded(task: Callable[[], Awaitable[None]]) -> None:
        nonlocal failure
        try:
            await task()
        except Exception as error:  # raised outside, so that the nursery does not wrap it in a group
            failure = failure or error
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for task in tasks:
            nursery.start_soon(guarded, task)
    if failure is not None:
        raise failure
