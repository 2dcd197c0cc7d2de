"""What every source promises, with a cache on disk in front of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pbsfs.sources.base import Source
from pbsfs.sources.cached.source import CachedSource
from pbsfs.sources.cached.store import DiskCache
from pbsfs.sources.directory.source import DirectorySource
from pbsfs.sources.server.limits import ServerLimits
from tests.sources.conformance import SourceConformance
from tests.sources.server import serving
from tests.sources.server.serving import TOKEN, opened, source_of


class Behind(SourceConformance):
    @pytest.fixture(autouse=True)
    def _cache(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        self.cache = tmp_path_factory.mktemp("cache")

    def behind(self, source: Source) -> CachedSource:
        return CachedSource(source, DiskCache(self.cache, 64 << 20), "conformance")


class TestCachedDirectory(Behind):
    """What every source promises."""

    @asynccontextmanager
    async def open(self, datastore: Path) -> AsyncIterator[Source]:
        async with opened(self.behind(DirectorySource(datastore))) as source:
            yield source


class TestCachedServer(Behind):
    """What every source promises."""

    @asynccontextmanager
    async def open(self, datastore: Path) -> AsyncIterator[Source]:
        with serving.served(datastore) as server:
            real = source_of(server, TOKEN, limits=ServerLimits(namespaces_kept=0))
            async with opened(self.behind(real)) as source:
                yield source
