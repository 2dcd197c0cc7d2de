"""Fixtures for the server source: a server over made data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sources.server import serving
from tests.support.server import ReferenceServer, certificate
from tests.support.server.certificate import Certificate


@pytest.fixture(scope="module")
def datastore(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made data. Not to be written to: all tests of a module share it."""
    return serving.fill(tmp_path_factory.mktemp("made") / "datastore")


@pytest.fixture(scope="module")
def peer_certificate() -> Certificate:
    """Of peers that are not the reference server."""
    return certificate.make()


@pytest.fixture
def server(datastore: Path) -> Iterator[ReferenceServer]:
    """A server over made data, with a user and a token who may read all of it."""
    with serving.served(datastore) as server:
        yield server
