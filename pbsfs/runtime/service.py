"""Reports the state of this process to the service manager (systemd), as a unit of `Type=notify` does.

The protocol is that of sd_notify(3): lines `NAME=value` in one datagram, to the socket that the variable
NOTIFY_SOCKET names. A process may leave descriptors with the manager (FDSTORE=1), which passes them to the
process of the service that it starts next, as sd_listen_fds(3) describes. Used by `pbsfs mount` in the
foreground, from one thread.
"""

from __future__ import annotations

import logging
import os
import select
import socket
from collections.abc import Mapping

from pbsfs.base.errors import MountError

log = logging.getLogger(__name__)

NOTIFY_SOCKET = "NOTIFY_SOCKET"

KEPT_WITHIN = 30.0
"""Seconds within which the manager takes a descriptor."""


def inherited(environment: Mapping[str, str], name: str) -> int | None:
    """The descriptor called `name` that the service manager passed to this process; None without one.

    Processes that this one starts do not inherit it.
    """
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    if environment.get("LISTEN_PID") != str(os.getpid()) or name not in names:
        return None
    fd = 3 + names.index(name)
    try:
        os.set_inheritable(fd, False)
    except OSError as error:
        raise MountError(
            f"descriptor {fd} of the {name}: {error.strerror}; start pbsfs by a unit of systemd"
        ) from None
    return fd


class ServiceManager:
    """The service manager that started this process. Does nothing where there is none."""

    def __init__(self, address: str | None) -> None:
        """`address`: the value of NOTIFY_SOCKET; with `@` in front, an abstract name (unix(7))."""
        self._address = address

    def ready(self, status: str) -> None:
        """The service has started. `status`: what it does, in a line, as `systemctl status` shows it."""
        self._send(f"READY=1\nSTATUS={' '.join(status.split())}")

    def stopping(self) -> None:
        """The service is about to end."""
        self._send("STOPPING=1")

    def keep(self, fd: int, name: str) -> None:
        """Leaves `fd` with the manager, which passes it to the service's next process; see `inherited`.

        Replaces what the manager keeps by that name. Returns when the manager has it: this process may then
        end. Raises MountError.
        """
        if not self._address:
            raise MountError(
                f"there is no service manager to keep the {name}; start pbsfs by a unit of systemd"
            )
        reading, writing = os.pipe()
        try:
            try:
                self._send_with(f"FDSTOREREMOVE=1\nFDNAME={name}")
                self._send_with(f"FDSTORE=1\nFDNAME={name}", fd)
                self._send_with("BARRIER=1", writing)  # the manager closes it after what was sent before
            finally:
                os.close(writing)
            closed = select.poll()
            closed.register(reading, 0)
            if not closed.poll(KEPT_WITHIN * 1000):
                raise MountError(
                    f"the service manager did not take the {name}; look at its log with journalctl"
                )
        except OSError as error:
            raise MountError(
                f"the service manager did not take the {name}: {error.strerror or error}; "
                "start pbsfs by a unit of systemd"
            ) from None
        finally:
            os.close(reading)

    def drop(self, name: str) -> None:
        """The manager no longer keeps what it has by that name."""
        self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        try:
            self._send_with(text)
        except OSError as error:
            log.warning("cannot notify the service manager at %s: %s", self._address, error.strerror or error)

    def _send_with(self, text: str, *fds: int) -> None:
        assert self._address is not None
        address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sending:
            sending.setblocking(False)  # a manager that hangs must not hang what it manages
            sending.connect(address)
            socket.send_fds(sending, [text.encode(errors="surrogateescape")], fds)
