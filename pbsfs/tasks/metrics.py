"""The numbers of a mount or NBD server as OpenMetrics text, over HTTP on a Unix socket or port of loopback.

For Prometheus and programs like it. The socket is made first, so that a wrong address is an error
of the command; `serve_metrics` answers in the trio loop, one request for each connection.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import trio

from pbsfs.base.errors import MountError, UsageError
from pbsfs.base.text import quoted
from pbsfs.runtime.stats import LIMITS
from pbsfs.tasks.numbers import Numbers

log = logging.getLogger(__name__)

MAX_REQUEST = 8 << 10
"""Bytes of a request's head."""

PATIENCE = 10.0
"""Seconds for one request and its answer."""

MAX_ANSWER = 64 << 10
"""Bytes of an answer that `request` takes; those of pbsfs have some KiB."""

AT_ONCE = 16
"""Connections that are answered side by side; pbsfs closes more at once."""

_GAUGES = frozenset(
    (
        *("uptime_seconds", "sessions", "parsers", "open_files", "inodes", "connections", "open_exports"),
        *("cache_bytes", "cache_limit_bytes", "charged_bytes", "resident_bytes"),
    )
)

_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"


@dataclass(frozen=True, slots=True)
class MetricsAddress:
    """Where the numbers are served: `path` of a Unix socket, or `port` of `host`, an address of loopback."""

    path: str = ""
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> MetricsAddress:
        """A path with a slash, `127.0.0.1:PORT`, `[::1]:PORT` or `:PORT`. Raises UsageError."""
        if "/" in text:
            return cls(path=os.path.abspath(text))
        host, colon, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]") or "127.0.0.1"
        try:
            loopback = ipaddress.ip_address(host).is_loopback
        except ValueError:
            loopback = False
        if not colon or not loopback or not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
            raise UsageError(
                f"--metrics {quoted(text)}: not a place to serve numbers; give the path of a socket with a "
                "slash, or 127.0.0.1:PORT"
            )
        return cls(host=host, port=int(port))

    def __str__(self) -> str:
        if self.path:
            return self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def text_of(numbers: Numbers) -> str:
    """The numbers in the form that is named OpenMetrics 1.0 (https://prometheus.io/docs/specs/om/)."""
    values = numbers.all()
    lines = ["# TYPE pbsfs_chunk_fetch_seconds histogram"]
    within = [value for name, value in values.items() if name.startswith("fetches_within_")]
    lines += [
        f'pbsfs_chunk_fetch_seconds_bucket{{le="{limit}"}} {count}'
        for limit, count in zip(LIMITS, within, strict=True)
    ]
    lines += [
        f'pbsfs_chunk_fetch_seconds_bucket{{le="+Inf"}} {values["fetches"]}',
        f"pbsfs_chunk_fetch_seconds_count {values['fetches']}",
        f"pbsfs_chunk_fetch_seconds_sum {values['fetch_seconds']:.6f}",
    ]
    for name, value in values.items():
        if name.startswith("fetch"):
            continue
        if name in _GAUGES:
            lines += [f"# TYPE pbsfs_{name} gauge", f"pbsfs_{name} {value}"]
        else:
            lines += [f"# TYPE pbsfs_{name} counter", f"pbsfs_{name}_total {value}"]
    return "\n".join([*lines, "# EOF", ""])


@contextmanager
def listening(address: MetricsAddress) -> Iterator[socket.socket]:
    """A socket that listens there. A Unix socket has mode 0600, and is removed at the end.

    Raises MountError.
    """
    family = socket.AF_UNIX if address.path else socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.setblocking(False)
        try:
            if address.path:
                _remove_left(address.path)
                os.fchmod(sock.fileno(), 0o600)  # before it has a name (unix(7))
                sock.bind(address.path)
            else:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((address.host, address.port))
            sock.listen(AT_ONCE)
        except OSError as error:
            raise MountError(
                f"--metrics {address}: {error.strerror or error}; name another place, or end what uses it"
            ) from None
        made = os.stat(address.path) if address.path else None
        try:
            yield sock
        finally:
            with suppress(OSError):
                if made is not None and os.path.samestat(made, os.lstat(address.path)):
                    os.unlink(address.path)


def _remove_left(path: str) -> None:
    """Removes a socket on which nothing listens: that of a process that was killed."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(PATIENCE)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def peer(sock: socket.socket | trio.socket.SocketType) -> tuple[int, int]:
    """The process and user at the other end of a Unix socket (SO_PEERCRED, unix(7))."""
    pid, uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def request(sock: socket.socket, path: str) -> str:
    """What `serve_metrics` answers to a request for `path`. Raises OSError."""
    sock.settimeout(PATIENCE)
    sock.sendall(f"GET {path} HTTP/1.1\r\n\r\n".encode())
    answer = b""
    while (more := sock.recv(MAX_REQUEST)) and len(answer) <= MAX_ANSWER:
        answer += more
    head, _blank, body = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))
    return body.decode(errors="replace")


async def serve_metrics(numbers: Numbers, sock: socket.socket) -> None:
    """Answers requests on `sock` until it is cancelled; on a Unix socket, those of this user and root."""
    users = (0, os.geteuid())
    busy = trio.CapacityLimiter(AT_ONCE)

    async def answer(stream: trio.SocketStream) -> None:
        found = stream.socket
        if found.family == socket.AF_UNIX and peer(found)[1] not in users:
            return
        try:
            busy.acquire_nowait()
        except trio.WouldBlock:
            return
        try:
            with trio.move_on_after(PATIENCE):
                await _answer(stream, numbers)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client ended
        except Exception:
            log.exception("serving metrics failed")  # all else continues
        finally:
            busy.release()

    await trio.serve_listeners(answer, [trio.SocketListener(trio.socket.from_stdlib_socket(sock))])


async def _answer(stream: trio.SocketStream, numbers: Numbers) -> None:
    head = b""
    while b"\r\n\r\n" not in head:
        more = await stream.receive_some(MAX_REQUEST)
        head += more
        if not more or len(head) > MAX_REQUEST:
            return
    words = head.split(b"\r\n", 1)[0].split(b" ")
    status, body, kind = "200 OK", b"", _TYPE
    if len(words) != 3 or words[0] not in (b"GET", b"HEAD"):
        status = "405 Method Not Allowed"
    elif words[1] == b"/stats":
        body, kind = numbers.text().encode(), "text/plain; charset=utf-8"
    elif words[1].split(b"?")[0] not in (b"/", b"/metrics"):
        status = "404 Not Found"
    else:
        body = text_of(numbers).encode()
    fields = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    answer = f"{fields}Allow: GET, HEAD\r\nConnection: close\r\n\r\n".encode()
    await stream.send_all(answer if words[0] == b"HEAD" else answer + body)
