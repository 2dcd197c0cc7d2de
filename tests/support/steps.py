"""How long tasks keep the trio loop from its other tasks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import trio

LIMIT = 0.05
"""Seconds of the processor's time that one step of a task may take."""


class _Steps(trio.abc.Instrument):
    """Measures the processor's time of each step of a task: what else the machine does is not counted."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._since = time.thread_time()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._since = time.thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.longest = max(self.longest, time.thread_time() - self._since)


@contextmanager
def measured_steps() -> Iterator[_Steps]:
    steps = _Steps()
    trio.lowlevel.add_instrument(steps)
    try:
        yield steps
    finally:
        trio.lowlevel.remove_instrument(steps)
