"""How long a server may be silent: when to ask for a sign of life, and when to give the connection up.

Used by `session`; belongs to one thread. Times are seconds of one clock, which the caller reads.
"""

from __future__ import annotations

import math

PINGS = 3
"""pbsfs asks for a sign of life after one part in so many of the limit: the server has the rest to answer."""


class Patience:
    """The silence of one connection, which may last `stall` seconds.

    `until`: when the limit of the first waiting request ends. From then on, the silence may last `least`
    seconds only.
    """

    def __init__(self, stall: float, least: float, now: float) -> None:
        self._stall = stall
        self._least = min(least, stall)
        self._since = now
        self._asked = False
        self.until = math.inf

    def restart(self, now: float) -> None:
        """There was a sign of life, or the waiting begins."""
        self._since = now
        self._asked = False

    def silence(self, now: float) -> float:
        """Seconds without a sign of life."""
        return now - self._since

    def over(self, now: float) -> bool:
        """Whether the server was silent for too long."""
        return now > self._end

    def to_ask(self, now: float) -> bool:
        """Whether to ask for a sign of life now: once for each silence."""
        if self._asked or now < self._ask_at:
            return False
        self._asked = True
        return True

    def left(self, now: float) -> float:
        """Seconds until there is something to do, if no sign of life comes."""
        return max(0.0, (self._end if self._asked else self._ask_at) - now)

    @property
    def _end(self) -> float:
        return min(self._since + self._stall, max(self.until, self._since + self._least))

    @property
    def _ask_at(self) -> float:
        # Not later than leaves the server its part of `least` to answer.
        return min(self._since + self._stall / PINGS, self._end - self._least * (PINGS - 1) / PINGS)
