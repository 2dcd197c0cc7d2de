"""How long pbsfs retries, and how fast. Values without code, so that importing them costs nothing."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_LIMIT = 120.0
"""Seconds for which a read is retried while the server is unreachable: a restart or an update takes less."""


@dataclass(frozen=True, slots=True)
class Pacing:
    """The seconds between tries, and of the last one."""

    first_pause: float = 0.25
    """Short: often the server has only dropped the connection. Each pause is twice the one before it."""

    longest_pause: float = 10.0
    """With this pause, pbsfs finds a server that starts again soon and does not flood it."""

    least_try: float = 5.0
    """How long a try may be without a sign of life even if the limit ends earlier: the last try begins when
    the limit ends."""


DEFAULT_PACING = Pacing()
