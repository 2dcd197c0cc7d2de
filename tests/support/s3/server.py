"""The object store: one thread for each connection, HTTP/1.1 with or without TLS.

It serves one bucket with one datastore, checks signatures, and answers what `faults` say first. Objects are
read from disk for each request, so tests may change them.
"""

from __future__ import annotations

import calendar
import contextlib
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from email.utils import formatdate
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, unquote

from pbsfs.base.names import MANIFEST
from pbsfs.sources.bucket.address import BucketAddress
from tests.support.s3 import signature
from tests.support.s3.faults import Body, Cut, Fault, Reset, Stall, Status
from tests.support.s3.objects import objects_of, page
from tests.support.server.certificate import Certificate

BUCKET = "backups"
STORE = "store"
ACCESS_KEY = "AKIDEXAMPLE"
SECRET_KEY = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"

LIMIT = 20.0
"""Seconds after which a connection is given up; only when something is broken."""


class S3Server:
    """`requests`: what was asked for, `GET key` or `LIST prefix`, in order. `delay`: seconds before each
    answer. `clock_ahead`: of the server's clock, in seconds. `connections`: how many came."""

    def __init__(
        self,
        datastore: Path,
        *,
        store: str = STORE,
        certificate: Certificate | None = None,
        region: str = "us-east-1",
        page_size: int = 1000,
        delay: float = 0.0,
        public: bool = False,
        encodes: bool = True,
    ) -> None:
        self._datastore = datastore
        self._store = store
        self._certificate = certificate
        self._context = None if certificate is None else certificate.context()
        self._region = region
        self._page_size = page_size
        self._public = public
        self._encodes = encodes
        self.delay = delay
        self.clock_ahead = 0.0
        self.access_key = ACCESS_KEY
        self.requests: list[str] = []
        self.connections = 0
        self.frozen: dict[str, Path] | None = None
        self._faults: list[tuple[str, Fault]] = []
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]

    @property
    def address(self) -> BucketAddress:
        """How pbsfs names the datastore."""
        scheme = "http" if self._context is None else "https"
        return BucketAddress(BUCKET, self._store, f"{scheme}://127.0.0.1:{self.port}", self._region)

    def fail(self, match: str, *faults: Fault) -> None:
        """The next requests that contain `match` get these answers, one after the other."""
        with self._lock:
            self._faults += [(match, fault) for fault in faults]

    def freeze(self, more: Sequence[str] = ()) -> None:
        """The objects stay as they are now: lists cost no look at the disk. `more`: names of further files in
        each snapshot."""
        found = objects_of(self._datastore, self._store)
        for key, path in list(found.items()):
            above, _slash, name = key.rpartition("/")
            if name == MANIFEST.filename:
                found.update((f"{above}/{other}", path) for other in more)
        self.frozen = dict(sorted(found.items()))
        self._frozen_keys = list(self.frozen)

    @property
    def open_connections(self) -> int:
        with self._lock:
            return sum(connection.fileno() >= 0 for connection in self._open)

    def drop_connections(self) -> None:
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        self._accepting = threading.Thread(target=self._accept, name="s3", daemon=True)
        self._accepting.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join(LIMIT)
        self._listener.close()
        self.drop_connections()
        for thread in self._threads:
            thread.join(LIMIT)
            assert not thread.is_alive()

    def _accept(self) -> None:
        while True:
            try:
                connection, _address = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            connection.settimeout(LIMIT)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            thread = threading.Thread(target=self._serve, args=(connection,), name="s3-client", daemon=True)
            self._threads.append(thread)
            with self._lock:
                self._open.add(connection)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(OSError, ssl.SSLError, ValueError):
                if self._context is None:
                    self._talk(connection)
                    return
                with self._context.wrap_socket(connection, server_side=True) as wrapped:
                    with self._lock:
                        self._open.discard(connection)
                        self._open.add(wrapped)
                    self._talk(wrapped)
        finally:
            with self._lock:
                self._open = {known for known in self._open if known.fileno() >= 0}

    def _talk(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as stream:
            while line := stream.readline(1 << 16):
                method, target, _version = line.decode("latin-1").split()
                headers: dict[str, str] = {}
                while (header := stream.readline(1 << 16)) not in (b"\r\n", b""):
                    name, _colon, value = header.decode("latin-1").partition(":")
                    headers[name.strip().lower()] = value.strip()
                if not self._answer(connection, method, target, headers):
                    return

    def _answer(
        self, connection: socket.socket, method: str, target: str, headers: Mapping[str, str]
    ) -> bool:
        """Answers one request; whether the connection goes on."""
        path, _question, query = target.partition("?")
        values = {name: found[0] for name, found in parse_qs(query, keep_blank_values=True).items()}
        in_path = re.fullmatch(f"/{BUCKET}(?:/(.*))?", path)
        key = unquote((in_path[1] or "") if in_path else path[1:])
        what = f"LIST {values.get('prefix', '')}" if "list-type" in values else f"{method} {key}"
        fault: Fault | None = None
        with self._lock:
            self.requests.append(what)
            for number, (match, found) in enumerate(self._faults):
                if match in what:
                    fault = found
                    del self._faults[number]
                    break
        if self.delay:
            time.sleep(self.delay)
        if isinstance(fault, Reset):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        status, body, more = self._true_answer(method, target, headers, key, values)
        if isinstance(fault, Status):
            status, body, more = fault.status, fault.body, dict(fault.headers)
        elif isinstance(fault, Body):
            status, body = 200, fault.body
        head = (
            f"HTTP/1.1 {status} Made\r\nDate: {formatdate(time.time() + self.clock_ahead, usegmt=True)}\r\n"
        )
        head += "".join(f"{name}: {value}\r\n" for name, value in more.items())
        if isinstance(fault, Cut) and not fault.announced:
            head += "Connection: close\r\n\r\n"
        else:
            head += f"Content-Length: {len(body)}\r\n\r\n"
        if isinstance(fault, Stall):
            if fault.after is not None:
                connection.sendall(head.encode() + body[: fault.after])
            connection.recv(1)  # the end
            return False
        if isinstance(fault, Cut):
            connection.sendall(head.encode() + body[: fault.size])
            return False
        connection.sendall(head.encode() + (b"" if method == "HEAD" else body))
        return True

    def _true_answer(
        self, method: str, target: str, headers: Mapping[str, str], key: str, values: Mapping[str, str]
    ) -> tuple[int, bytes, dict[str, str]]:
        if not self._public or "authorization" in headers:
            code = signature.refused(method, target, headers, self.access_key, SECRET_KEY, self._region)
            sent = headers.get("x-amz-date", "")
            if code is None and abs(_seconds(sent) - time.time() - self.clock_ahead) > 900:
                code = "RequestTimeTooSkewed"
            if code is not None:
                extra = f"<Region>{self._region}</Region>" if code == "AuthorizationHeaderMalformed" else ""
                return (400 if extra else 403), Status(0, code, extra=extra).body, {}
        objects = self.frozen if self.frozen is not None else objects_of(self._datastore, self._store)
        if "list-type" in values:
            keys = self._frozen_keys if self.frozen is not None else list(objects)
            text = page(
                objects,
                keys,
                bucket=BUCKET,
                prefix=values.get("prefix", ""),
                delimiter=values.get("delimiter", ""),
                after=values.get("continuation-token", ""),
                most=min(int(values.get("max-keys", "1000")), self._page_size),
                encoded=self._encodes and values.get("encoding-type") == "url",
            )
            return 200, text.encode(), {"Content-Type": "application/xml"}
        path = objects.get(key)
        try:
            if path is None:
                raise FileNotFoundError
            tag = {"ETag": '"00000000000000000000000000000000"'}
            if headers.get("range") == "bytes=0-0":
                return 206, path.read_bytes()[:1], tag
            return 200, path.read_bytes(), tag
        except FileNotFoundError:
            return 404, Status(404, "NoSuchKey").body, {}


def _seconds(text: str) -> float:
    """The time in `x-amz-date`."""

    return calendar.timegm(time.strptime(text, "%Y%m%dT%H%M%SZ"))
