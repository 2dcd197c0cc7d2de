"""Runs async tests: plain pytest, on a clock that jumps ahead when all tasks wait."""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

import trio
import trio.testing

P = ParamSpec("P")
T = TypeVar("T")


def run(function: Callable[[], Awaitable[T]]) -> T:
    """What `function` returns. The clock knows nothing of threads: where one works, set no timeout."""
    return trio.run(function, clock=trio.testing.MockClock(autojump_threshold=0))


async def until(condition: Callable[[], bool], limit: float = 30) -> None:
    """Waits for what a thread brings about; `limit` is in seconds of the true clock."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        await trio.lowlevel.checkpoint()


def in_trio(test: Callable[P, Awaitable[T]]) -> Callable[P, T]:
    """A decorator that makes an async test a plain one, with the same fixtures."""

    @functools.wraps(test)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        return run(lambda: test(*args, **kwargs))

    return wrapper
