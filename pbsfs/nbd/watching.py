"""How an NBD server is watched: its numbers for `pbsfs stats`, for OpenMetrics, and in the log after SIGUSR1.

nbdkit has no request for them, so each server listens on a socket in Linux's abstract namespace (unix(7)), by
the number of its process. Nothing of it is in the file system, so no server leaves anything behind. Only the
server's user and root get answers. The server's part runs in its trio loop; `ask` is synchronous, for
commands.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from pbsfs.base.errors import HelperError
from pbsfs.tasks.metrics import AT_ONCE, peer, request
from pbsfs.tasks.numbers import Numbers

log = logging.getLogger(__name__)
stats_log = logging.getLogger("pbsfs.stats")
stats_log.setLevel(logging.INFO)  # whatever the level of the log: a person asked for these lines


def _name(pid: int) -> str:
    return f"\0pbsfs-nbd-{pid}"


@contextmanager
def own_socket() -> Iterator[socket.socket | None]:
    """A socket that listens under the number of this process; None where another program has taken that."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        try:
            sock.bind(_name(os.getpid()))
            sock.listen(AT_ONCE)
        except OSError as error:
            log.warning("pbsfs stats cannot ask this server: %s; all else works", error.strerror)
            yield None
            return
        yield sock


def ask(pid: int) -> str:
    """The numbers of the server with this number of the process, as lines. Raises HelperError."""
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(_name(pid))
            if peer(sock)[0] != pid:  # any program may take a name
                raise OSError(errno.ECONNREFUSED, "another process answers in its name")
            return request(sock, "/stats")
    except OSError as error:
        raise HelperError(
            f"NBD server {pid}: does not give its numbers: {error.strerror or error}; run this as its user, "
            "or look at its log"
        ) from None


class Wake:
    """SIGUSR1, as a loop that does not run in the main thread gets it.

    nbdkit keeps the main thread, in which no Python code runs that could handle a signal. So Python's handler
    in C writes the signal's number to a socket that the loop reads.
    """

    def __init__(self) -> None:
        """Call in the main thread."""
        self._reading, self._writing = socket.socketpair()
        self._reading.setblocking(False)
        self._writing.setblocking(False)
        signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGUSR1, lambda _number, _frame: None)
        signal.siginterrupt(signal.SIGUSR1, False)  # nbdkit's own calls continue

    async def log_numbers(self, numbers: Numbers, what: str) -> None:
        """Logs `numbers` at each signal, until it is cancelled. `what`: names the server in the log."""
        while True:
            await trio.lowlevel.wait_readable(self._reading)
            if signal.SIGUSR1 in self._reading.recv(4096):
                stats_log.info("%s: %s", what, numbers.line())
