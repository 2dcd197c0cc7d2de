"""The requests that the server got, for tests that count what something costs it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Record:
    """A request that was answered. `protocol`: `http/1.1` or `h2` (a reader session); `target`: path and
    query; `user`: None where nobody was authenticated."""

    protocol: str
    method: str
    target: str
    user: str | None
    status: int

    @property
    def path(self) -> str:
        return urlsplit(self.target).path


class Requests:
    """All requests since the start, or since `clear`. Any thread may ask."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._all: list[Record] = []

    def add(self, record: Record) -> None:
        with self._guard:
            self._all.append(record)

    def all(self) -> list[Record]:
        with self._guard:
            return list(self._all)

    def matching(self, part: str) -> list[Record]:
        """Those whose target contains `part`."""
        return [record for record in self.all() if part in record.target]

    def count(self, part: str = "") -> int:
        return len(self.matching(part))

    def clear(self) -> None:
        with self._guard:
            self._all.clear()
