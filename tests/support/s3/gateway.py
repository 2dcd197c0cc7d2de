"""A real S3 server: MinIO's gateway, as the program `juicefs` has it, over a directory.

It keeps objects through JuiceFS, with its metadata in SQLite. Tests fill it through S3.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import pytest

from pbsfs.sources.bucket.address import BucketAddress
from tests.support.program import environment
from tests.support.s3 import signature
from tests.support.s3.objects import objects_of
from tests.support.s3.server import ACCESS_KEY, BUCKET, SECRET_KEY, STORE
from tests.support.server.certificate import Certificate
from tests.support.waiting import wait_until

JUICEFS = Path(sys.executable).with_name("juicefs")

REGION = "us-east-1"

AT_ONCE = 8
"""Requests at once that fill it."""


class Gateway:
    """A server with one empty bucket; `directory` is made. Started and stopped as often as one likes: what is
    in it stays."""

    def __init__(self, directory: Path, certificate: Certificate | None = None) -> None:
        if not JUICEFS.exists():
            pytest.fail(f"{JUICEFS} is missing; run scripts/setup dev")
        directory.mkdir()
        self.directory = directory
        self._is_secure = certificate is not None
        self._meta = f"sqlite3://{directory}/meta.db"
        self._process: subprocess.Popen[bytes] | None = None
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        if certificate is not None:
            certificates = directory / ".minio" / "certs"
            (certificates / "CAs").mkdir(parents=True)
            certificate.write(certificates / "public.crt", certificates / "private.key")
        self._run(
            "format", "--storage", "file", "--bucket", f"{directory}/data/", "--trash-days", "0", BUCKET
        )

    @property
    def address(self) -> BucketAddress:
        """How pbsfs names the datastore."""
        scheme = "https" if self._is_secure else "http"
        return BucketAddress(BUCKET, STORE, f"{scheme}://127.0.0.1:{self.port}", REGION)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when it answers."""
        command = [str(JUICEFS), "gateway", "--no-usage-report", "--no-bgjob", "--no-banner", "--keep-etag"]
        command += ["--log", f"{self.directory}/log", "--cache-dir", f"{self.directory}/cache"]
        # What tests change through S3 is seen at once, and nothing is answered from memory.
        command += ["--attr-cache", "0", "--entry-cache", "0", "--dir-entry-cache", "0"]
        command += ["--metrics", "127.0.0.1:0", self._meta, f"127.0.0.1:{self.port}"]
        with (self.directory / "out").open("ab") as out:
            self._process = subprocess.Popen(
                command, env=self._environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        try:
            wait_until(self._answers, "the S3 server answers")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends it; connections are cut."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def fill(self, datastore: Path) -> None:
        """Puts all objects that the datastore in a directory would have."""
        self.put(
            {key: path for key, path in objects_of(datastore, STORE).items() if path != Path(os.devnull)}
        )
        self.put({key: b"" for key, path in objects_of(datastore, STORE).items() if path == Path(os.devnull)})

    def put(self, objects: Mapping[str, Path | bytes]) -> None:
        self._ask([("PUT", key, content) for key, content in objects.items()])

    def delete(self, keys: Iterable[str]) -> None:
        """One after the other, in this order."""
        self._ask([("DELETE", key, b"") for key in keys], at_once=1)

    def _ask(self, requests: Sequence[tuple[str, str, Path | bytes]], at_once: int = AT_ONCE) -> None:
        """Sends requests, over so many connections."""

        def some(first: int) -> None:
            with contextlib.closing(self._connection()) as connection:
                for method, key, content in requests[first::at_once]:
                    self._ask_one(connection, method, key, content)

        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(some, range(at_once)))

    def _ask_one(
        self, connection: http.client.HTTPConnection, method: str, key: str, content: Path | bytes
    ) -> None:
        body = content if isinstance(content, bytes) else content.read_bytes()
        target = quote(f"/{BUCKET}/{key}", safe="/-._~")
        headers = {"host": f"127.0.0.1:{self.port}"}
        connection.request(
            method, target, body, signature.signed(method, target, headers, ACCESS_KEY, SECRET_KEY, REGION)
        )
        with connection.getresponse() as response:
            said = response.read()
        assert response.status in (200, 204), f"{method} {key}: {response.status} {said!r}"

    def _connection(self) -> http.client.HTTPConnection:
        if not self._is_secure:
            return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=20, context=context)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.directory / "out").read_text()[-2000:]
        connection = self._connection()
        try:
            connection.request("GET", "/minio/health/live")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def _run(self, *arguments: str) -> None:
        command = [str(JUICEFS), arguments[0], *arguments[1:-1], self._meta, arguments[-1]]
        done = subprocess.run(
            command, env=self._environment(), stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()[-2000:]

    def _environment(self) -> dict[str, str]:
        # It looks for certificates in the home directory.
        return environment(
            HOME=str(self.directory), MINIO_ROOT_USER=ACCESS_KEY, MINIO_ROOT_PASSWORD=SECRET_KEY
        )
