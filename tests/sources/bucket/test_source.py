"""The source that is a bucket: what all sources promise."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pbsfs.sources.base import Source
from pbsfs.testing.writer import DatastoreWriter
from tests.sources.bucket.serving import opened, source_of, use
from tests.sources.conformance import FIRST, VM, SourceConformance, add
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


@pytest.mark.parametrize("store", ["", "a/b/store", "with space+and%40"])
def test_a_datastore_may_be_anywhere_in_its_bucket(
    store: str, writer: DatastoreWriter, certificate: Certificate
) -> None:
    add(writer)
    with S3Server(writer.path, store=store, certificate=certificate) as server:
        infos = use(source_of(server, certificate), lambda s: s.snapshots(VM))
    assert [info.snapshot for info in infos] == [FIRST]
