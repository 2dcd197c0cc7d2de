"""Tasks that run side by side, of which the first failure counts. Used by tasks of one trio loop."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence, Sized
from typing import TypeVar

import trio

T = TypeVar("T")


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


async def run_for_each(items: Iterable[T], work: Callable[[T], Awaitable[None]], *, at_once: int) -> None:
    """Calls `work` for each of `items`, for `at_once` side by side. Raises like `run_together`."""
    left = iter(items)

    async def take() -> None:
        for item in left:
            await work(item)

    await run_together([take] * (min(at_once, len(items)) if isinstance(items, Sized) else at_once))
