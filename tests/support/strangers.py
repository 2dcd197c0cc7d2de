"""Servers that are no Proxmox Backup Server: what answers when a port or a name is mistaken."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.server.certificate import Certificate

_LIMIT = 20.0  # seconds; nothing here takes long


@contextmanager
def stranger(answer: bytes, certificate: Certificate | None = None) -> Iterator[int]:
    """Answers every request with the same bytes, over TLS where there is a certificate; gives its port."""
    context = None if certificate is None else certificate.context()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=_serve, args=(listening, context, answer), daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            listening.shutdown(socket.SHUT_RDWR)  # wakes the thread
            thread.join(_LIMIT)
            assert not thread.is_alive()


def _serve(listening: socket.socket, context: ssl.SSLContext | None, answer: bytes) -> None:
    while True:
        try:
            plain, _address = listening.accept()
        except OSError:
            return
        plain.settimeout(_LIMIT)
        try:
            connection = plain if context is None else context.wrap_socket(plain, server_side=True)
        except OSError:  # who looks at the certificate only goes again
            plain.close()
            continue
        with connection:
            try:
                connection.recv(1 << 16)
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):  # or closing would take the answer back
                    pass
            except OSError:
                continue


@contextmanager
def closed_port() -> Iterator[int]:
    """A port that nobody listens on, and that nobody else gets meanwhile."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]
