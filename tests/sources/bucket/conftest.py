"""Fixtures for the bucket source: an object store over made data."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pbsfs.testing.writer import DatastoreWriter
from tests.support.s3 import S3Server
from tests.support.server import certificate as certificates
from tests.support.server.certificate import Certificate


@pytest.fixture(scope="session")
def certificate() -> Certificate:
    return certificates.make()


@pytest.fixture
def server(writer: DatastoreWriter, certificate: Certificate) -> Iterator[S3Server]:
    """An object store with what `writer` writes."""
    with S3Server(writer.path, certificate=certificate) as server:
        yield server
