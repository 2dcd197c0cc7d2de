"""A server that is not what is measured: serves a datastore directory over TLS, from a process of its own.

What it answers on the HTTP API is the reference server's; chunks and indexes it sends by itself (`http2`), a
thread a connection, TLS in OpenSSL without the interpreter's lock. It does not look whether an index that was
downloaded names a chunk. It counts the chunks that are asked for.

    python -m bench.server DIR [--round-trip SECONDS --bandwidth BYTES]

prints one line of JSON that says where it is, then answers commands on standard input, a line each: `counts`
(what was asked for since the last time) with a line of JSON. At the end of the input it ends. With a round
trip or a bandwidth, `slow_port` is the same server behind a simulated link. `GET /firehose?BYTES` on either
port is answered with so many bytes and nothing else: what TLS can do at most.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import socket
import ssl
import sys
import threading
from collections import Counter
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import h11

from bench.http2 import HEADER_SIZE, ClosedError, Http2
from bench.link import Link
from pbsfs.base.names import Snapshot
from tests.support.server import certificate
from tests.support.server.accounts import READER, Accounts
from tests.support.server.answers import Answer, RefusedError, Request, reason
from tests.support.server.api import READER_PATH, Api
from tests.support.server.clock import Clock
from tests.support.server.datastore import Datastore
from tests.support.server.releases import PBS_3

STORE = "bench"
USER = "reader@pbs"
TOKEN = "reader@pbs!bench"

PROTOCOL = "proxmox-backup-reader-protocol-v1"

FIREHOSE_PIECE = 1 << 20


class Server:
    """Listens on the loopback address, any free port, and serves each connection in a thread."""

    def __init__(self, path: Path) -> None:
        self._store = Datastore(STORE, path, str(path))
        self._accounts = Accounts(Clock())
        grants = {f"/datastore/{STORE}": READER}
        self.password = self._accounts.add(USER, None, grants)
        self.secret = self._accounts.add(TOKEN, None, grants)
        self._api = Api(self._accounts, {STORE: self._store}, release=PBS_3)
        made = certificate.make()
        self.fingerprint = made.fingerprint
        self._context = made.context()
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listening.getsockname()[1]
        self._guard = threading.Lock()
        self._chunks: Counter[str] = Counter()
        self._sessions = 0

    def start(self) -> None:
        threading.Thread(target=self._accept, daemon=True).start()

    def counts(self) -> dict[str, int]:
        """What was asked for since the last call."""
        with self._guard:
            chunks, self._chunks = self._chunks, Counter()
            sessions, self._sessions = self._sessions, 0
        return {
            "requests": sum(chunks.values()),
            "chunks": len(chunks),
            "most": max(chunks.values(), default=0),
            "sessions": sessions,
        }

    def _accept(self) -> None:
        while True:
            connection, _address = self._listening.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with (
            contextlib.suppress(OSError, ClosedError, h11.RemoteProtocolError),
            self._context.wrap_socket(connection, server_side=True) as tls,
        ):
            self._http(tls)

    # --- HTTP/1.1

    def _http(self, tls: ssl.SSLSocket) -> None:
        rest = b""
        while True:
            received = _receive(tls, rest)
            if received is None:
                return
            request, keep_alive, rest = received
            if request.path == "/firehose":
                _firehose(tls, int(urlsplit(request.target).query))
                return
            try:
                user = self._accounts.authenticate(request) if self._api.needs_login(request) else None
                if request.path == READER_PATH:
                    assert user is not None
                    _store, snapshot = self._api.reader_snapshot(request, user, PROTOCOL)
                    fields = f"connection: upgrade\r\nupgrade: {PROTOCOL}\r\n"
                    tls.sendall(f"HTTP/1.1 101 Switching Protocols\r\n{fields}\r\n".encode())
                    self._session(tls, snapshot, rest)
                    return
                answer = self._api.answer(request, user)
            except RefusedError as refusal:
                answer = refusal.answer
            _send(tls, answer)
            if not keep_alive:
                return

    # --- the reader protocol

    def _session(self, tls: ssl.SSLSocket, snapshot: Snapshot, received: bytes) -> None:
        with self._guard:
            self._sessions += 1
        http2 = Http2()
        directory = self._store.snapshot_path(snapshot)
        poll = select.poll()
        poll.register(tls, select.POLLIN)
        while True:
            for stream, target in http2.received(received):
                status, buffer = self._body(directory, target)
                http2.answer(stream, status, buffer)
            received = b""
            frame = http2.outgoing()
            if frame is not None:
                tls.sendall(frame)
                # Requests and windows that came in meanwhile; without waiting for more.
                if not tls.pending() and not poll.poll(0):
                    continue
            received = tls.recv(64 << 10)
            if not received:
                return

    def _body(self, directory: Path, target: str) -> tuple[int, bytearray]:
        url = urlsplit(target)
        query = dict(parse_qsl(url.query))
        if url.path == "/chunk":
            digest = query["digest"]
            with self._guard:
                self._chunks[digest] += 1
            path = f"{self._store.path}/.chunks/{digest[:4]}/{digest}"
        elif url.path == "/download":
            path = f"{directory}/{query['file-name']}"
        elif url.path == "/speedtest":
            return 200, bytearray(HEADER_SIZE) + b"A" * (1 << 20)
        else:
            return 404, bytearray(HEADER_SIZE) + f"Path '{url.path}' not found.".encode()
        try:
            return 200, _read(path)
        except OSError as error:
            return 400, bytearray(HEADER_SIZE) + f"reading file {path!r} failed: {error.strerror}".encode()


def _read(path: str) -> bytearray:
    """A file behind room for a frame header."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        buffer = bytearray(HEADER_SIZE + os.fstat(fd).st_size)
        view = memoryview(buffer)[HEADER_SIZE:]
        done = 0
        while done < len(view):
            count = os.preadv(fd, [view[done:]], done)
            if not count:
                raise OSError(0, "cut short")
            done += count
        return buffer
    finally:
        os.close(fd)


def _receive(tls: ssl.SSLSocket, rest: bytes) -> tuple[Request, bool, bytes] | None:
    """The next request, whether the connection goes on after it, and what came behind it."""
    connection = h11.Connection(h11.SERVER)
    if rest:
        connection.receive_data(rest)
    head: h11.Request | None = None
    body = b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(tls.recv(64 << 10))
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage) and head is not None:
            headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
            request = Request(head.method.decode(), head.target.decode(), headers, body)
            keep_alive = connection.their_state is not h11.MUST_CLOSE
            return request, keep_alive, bytes(connection.trailing_data[0])
        else:
            return None


def _send(tls: ssl.SSLSocket, answer: Answer) -> None:
    body = b"".join(answer.pieces())
    fields = [field for field in answer.fields() if field[0] != "content-length"]
    fields.append(("content-length", str(len(body))))
    head = f"HTTP/1.1 {answer.status} {reason(answer.status)}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in fields)
    tls.sendall(f"{head}\r\n".encode() + body)


def _firehose(tls: ssl.SSLSocket, size: int) -> None:
    piece = memoryview(os.urandom(FIREHOSE_PIECE))
    while size > 0:
        tls.sendall(piece[:size])
        size -= len(piece)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.server")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--round-trip", type=float, default=0.0)
    parser.add_argument("--bandwidth", type=float)
    options = parser.parse_args()
    server = Server(options.directory)
    server.start()
    told: dict[str, object] = {
        "port": server.port,
        "fingerprint": server.fingerprint,
        "password": server.password,
        "secret": server.secret,
    }
    if options.round_trip or options.bandwidth:
        link = Link(server.port, options.round_trip, options.bandwidth)
        link.start()
        told["slow_port"] = link.port
    print(json.dumps(told), flush=True)
    for line in sys.stdin:
        if line.strip() == "counts":
            print(json.dumps(server.counts()), flush=True)
    os._exit(0)  # connections and all


if __name__ == "__main__":
    main()
