"""A service manager's end of the socket that services notify."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.waiting import LIMIT


class Manager:
    """Listens at `address`, as NOTIFY_SOCKET has it."""

    def __init__(self, listening: socket.socket, address: str) -> None:
        self._listening = listening
        self.address = address

    def told(self) -> list[str]:
        """The lines of the next notification; waits for it."""
        return self._listening.recv(4096).decode(errors="surrogateescape").splitlines()

    def given(self) -> tuple[list[str], list[int]]:
        """The same with the descriptors that come with it, which are the caller's."""
        text, fds, _flags, _sender = socket.recv_fds(self._listening, 4096, 4)
        return text.decode(errors="surrogateescape").splitlines(), fds


@contextmanager
def manager(folder: Path, *, abstract: bool = False) -> Iterator[Manager]:
    """A service manager that listens in `folder`, or at an abstract name made from that."""
    path = str(folder / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.settimeout(LIMIT)
        listening.bind(f"\0{path}" if abstract else path)
        yield Manager(listening, f"@{path}" if abstract else path)
