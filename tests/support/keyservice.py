"""A small HTTP service on a loopback port, in place of the services that give out keys.

It answers as it was said to, and records what was asked.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.support.server.certificate import Certificate

KEY_JSON = b"""{
  "Code": "Success", "Version": 1, "AccessKeyId": "ASIAEXAMPLE", "SecretAccessKey": "secret/of+it",
  "Token": "token==", "SessionToken": "token==", "Expiration": "2199-01-01T00:00:00Z"
}"""

STS_XML = b"""<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
  <AssumeRoleWithWebIdentityResult><Credentials>
    <AccessKeyId>ASIAEXAMPLE</AccessKeyId><SecretAccessKey>secret/of+it</SecretAccessKey>
    <SessionToken>token==</SessionToken><Expiration>2199-01-01T00:00:00Z</Expiration>
  </Credentials></AssumeRoleWithWebIdentityResult>
</AssumeRoleWithWebIdentityResponse>"""


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    headers: dict[str, str]
    body: str


@dataclass
class KeyService:
    """`answers`: status and body by method and path; those of other paths have status 404."""

    url: str
    answers: dict[tuple[str, str], tuple[int, bytes]]
    asked: list[Asked] = field(default_factory=list)


@contextlib.contextmanager
def key_service(
    answers: dict[tuple[str, str], tuple[int, bytes]], certificate: Certificate | None = None
) -> Iterator[KeyService]:
    """`certificate`: for a service with TLS, at `localhost`."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            headers = {name.lower(): value for name, value in self.headers.items()}
            service.asked.append(Asked(self.command, self.path, headers, body))
            status, content = service.answers.get((self.command, self.path), (404, b""))
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_POST = answer  # noqa: N815 - the names that the library looks for

        def log_message(self, *_given: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        service = KeyService(f"http://127.0.0.1:{server.server_port}", answers)
        if certificate is not None:
            server.socket = certificate.context().wrap_socket(server.socket, server_side=True)
            service.url = f"https://localhost:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield service
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def raw_service(answer: bytes, *, closes: bool = True) -> Iterator[str]:
    """The URL of a service that sends these bytes to whatever is asked, and closes or is silent then."""
    ended = threading.Event()

    def serve() -> None:
        while True:
            try:
                connection, _address = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.recv(1 << 16)
                connection.sendall(answer)
                if not closes:
                    ended.wait(20)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            ended.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
