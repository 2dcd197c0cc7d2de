"""How long a server may be silent: when to ask for a sign of life, and when to give the connection up.

Used by `session`; belongs to one thread. Times are seconds on any clock of the caller's.
"""

from __future__ import annotations

PINGS = 3
"""pbsfs asks for a sign of life after one part in so many of the limit: the server has the rest to answer."""


class Patience:
    """The silence of one connection, which may last `stall` seconds."""

    def __init__(self, stall: float, now: float) -> None:
        self._stall = stall
        self._since = now
        self._asked = False

    def restart(self, now: float) -> None:
        """There was a sign of life, or the waiting begins."""
        self._since = now
        self._asked = False

    def over(self, now: float) -> bool:
        """Whether the server was silent for too long."""
        return now - self._since > self._stall

    def to_ask(self, now: float) -> bool:
        """Whether to ask for a sign of life now: once for each silence."""
        if self._asked or now - self._since < self._stall / PINGS:
            return False
        self._asked = True
        return True

    def left(self, now: float) -> float:
        """Seconds until there is something to do, if no sign of life comes."""
        return max(0.0, self._since + (self._stall if self._asked else self._stall / PINGS) - now)
