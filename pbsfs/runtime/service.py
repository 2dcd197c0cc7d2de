"""Reports the state of this process to the service manager (systemd), as a unit of `Type=notify` does.

The protocol is that of sd_notify(3): lines `NAME=value` in one datagram, to the socket that the variable
NOTIFY_SOCKET names. Used by `pbsfs mount` in the foreground, from one thread.
"""

from __future__ import annotations

import logging
import socket

log = logging.getLogger(__name__)

NOTIFY_SOCKET = "NOTIFY_SOCKET"


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

    def _send(self, text: str) -> None:
        if not self._address:
            return
        address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sending:
                sending.setblocking(False)  # a manager that hangs must not hang what it manages
                sending.sendto(text.encode(errors="surrogateescape"), address)
        except OSError as error:
            log.warning("cannot notify the service manager at %s: %s", self._address, error.strerror or error)
