"""The source that is a bucket: what all sources promise."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pbsfs.sources.base import Source
from pbsfs.testing.writer import DatastoreWriter
from tests.sources.bucket.serving import opened, source_of
from tests.sources.conformance import SourceConformance
from tests.support.s3 import S3Server
from tests.support.server.certificate import Certificate


class TestBucketSource(SourceConformance):
    """What every source promises."""

    @pytest.fixture(autouse=True)
    def _certificate(self, certificate: Certificate) -> None:
        self.certificate = certificate

    @asynccontextmanager
    async def open(self, datastore: Path) -> AsyncIterator[Source]:
        with S3Server(datastore, certificate=self.certificate) as server:
            async with opened(source_of(server, self.certificate)) as source:
                yield source

    def test_the_space_is_that_of_the_file_system_below(self, writer: DatastoreWriter) -> None:
        assert self.use(writer, lambda s: s.usage()) is None  # an object store has no end
