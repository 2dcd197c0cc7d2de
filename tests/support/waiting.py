"""The one way in which tests wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

LIMIT = 20.0
"""Seconds that a condition may take: what takes long only when something is broken."""

_PAUSE = 0.01


def wait_until(condition: Callable[[], T], what: str, *, limit: float = LIMIT) -> T:
    """Polls `condition` until it is true, and returns what it returned; fails after `limit` seconds."""
    end = time.monotonic() + limit
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {limit:.0f} s in vain: {what}"
        time.sleep(_PAUSE)
    return found
