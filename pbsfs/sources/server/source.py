"""A running server as a source: lists and small files through its HTTP API, images through sessions.

Everything that may succeed later is tried again up to a limit. Listing opens no session.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import trio

from pbsfs.credentials import Secret
from pbsfs.errors import (
    DamageError,
    ForbiddenError,
    NotFoundError,
    PbsfsError,
    SourceError,
    UnknownDatastoreError,
)
from pbsfs.names import BACKUP_TYPES, Archive, ArchiveKind, Group, Namespace, Snapshot
from pbsfs.sources.base import GroupInfo, SnapshotInfo, Source, Usage
from pbsfs.sources.server import listing
from pbsfs.sources.server.api import Api
from pbsfs.sources.server.pool import SessionPool, snapshot_query
from pbsfs.sources.server.proxy import Proxy
from pbsfs.sources.server.repository import Repository
from pbsfs.sources.server.retry import DEFAULT_LIMIT, Outage, retried
from pbsfs.sources.server.tls import Trust

log = logging.getLogger(__name__)

R = TypeVar("R")

NAMESPACES_KEPT = 2.0
"""Seconds for which the list of namespaces is kept: listing a tree of them asks once, not once for each."""

STALL_TIMEOUT = 30.0
"""Seconds without a sign of life after which a session counts as lost: a byte of an answer, or an answered
PING."""

ANSWER_TIMEOUT = 1800.0
"""Seconds without a byte of it after which an answer is given up although the server lives: a server with an
object store gives that the same time."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How to deal with the server.

    `retry_timeout`: seconds for which a read is tried again. `connections`: to one snapshot; None to go by
    the round trip. `stall_timeout`: seconds without a sign of life after which a session is given up.
    `answer_timeout`: seconds after which an answer that does not grow is given up.
    """

    retry_timeout: float = DEFAULT_LIMIT
    connections: int | None = None
    stall_timeout: float = STALL_TIMEOUT
    answer_timeout: float = ANSWER_TIMEOUT


class ServerSource(Source):
    """The datastore that `repository` names."""

    cheap_files = False

    def __init__(
        self,
        repository: Repository,
        secret: Secret,
        trust: Trust,
        settings: ServerSettings | None = None,
        proxy: Proxy | None = None,
    ) -> None:
        self.repository = repository
        self.settings = settings or ServerSettings()
        self.api = Api(repository, secret, trust, proxy)
        self.pool = SessionPool(
            self.api,
            connections=self.settings.connections,
            stall_timeout=self.settings.stall_timeout,
            answer_timeout=self.settings.answer_timeout,
        )
        self._namespaces: tuple[float, list[Namespace]] = (float("-inf"), [])
        self._asking = trio.Lock()
        self._outage = Outage()
        self._reported: set[str] = set()

    def __str__(self) -> str:
        return str(self.repository)

    async def open(self, nursery: trio.Nursery) -> None:
        # Not tried again: who starts wants to know now.
        await self.api.greet()
        try:
            self._keep_namespaces(await self._ask("namespace", {}))
        except (ForbiddenError, NotFoundError) as error:
            await self._check_store(error)
            raise
        self.pool.start(nursery)
        nursery.start_soon(self.api.tidy)

    async def aclose(self) -> None:
        await self.pool.aclose()
        self.api.close()

    async def namespaces(self, parent: Namespace) -> list[Namespace]:
        visible = await self._all_namespaces()
        depth = len(parent.parts)
        below = {
            Namespace(namespace.parts[: depth + 1])
            for namespace in visible
            if len(namespace.parts) > depth and namespace.parts[:depth] == parent.parts
        }
        # The list has what this user may see. A namespace above one of those is there too.
        if parent.parts and parent not in visible and not below:
            raise NotFoundError(f"{self}: there is no namespace '{parent}'")
        return sorted(below)

    async def _all_namespaces(self) -> list[Namespace]:
        async with self._asking:
            since, found = self._namespaces
            if trio.current_time() - since >= NAMESPACES_KEPT:
                data = await self._retried("listing namespaces", lambda: self._ask("namespace", {}))
                found = self._keep_namespaces(data)
            return found

    def _keep_namespaces(self, data: Any) -> list[Namespace]:
        found = self._take(listing.parse_list(data, listing.parse_namespace))
        self._namespaces = (trio.current_time(), found)
        return found

    async def groups(self, namespace: Namespace) -> list[GroupInfo]:
        query = {"ns": str(namespace)} if namespace.parts else {}
        data = await self._retried(f"listing groups of '{namespace}'", lambda: self._ask("groups", query))
        found = self._take(listing.parse_list(data, functools.partial(listing.parse_group, namespace)))
        return sorted(found, key=lambda info: (BACKUP_TYPES.index(info.group.type), info.group.id))

    async def snapshots(self, group: Group) -> list[SnapshotInfo]:
        query = {"backup-type": group.type, "backup-id": group.id}
        if group.namespace.parts:
            query["ns"] = str(group.namespace)
        data = await self._retried(f"listing {group}", lambda: self._ask("snapshots", query))
        if data == []:  # that is how a server says so: it knows no group without snapshots
            raise NotFoundError(f"{self}: there is no group {group}")
        found = self._take(listing.parse_list(data, functools.partial(listing.parse_snapshot, group)))
        finished = [info for info in found if info is not None]
        for info in finished:
            if info.error is not None:
                self._report(f"{info.snapshot}: {info.error}")
        return sorted(finished, key=lambda info: info.snapshot)

    async def fetch_file(self, snapshot: Snapshot, archive: Archive, limit: int) -> bytes:
        if archive.kind is ArchiveKind.BLOB:
            # Without a session: who reads a configuration leaves no task and no lock on the server.
            query = snapshot_query(self.repository.store, snapshot)
            del query["store"]
            query["file-name"] = archive.filename
            path = f"/admin/datastore/{self.repository.store}/download"
            return await self._retried(f"{snapshot}/{archive}", lambda: self.api.download(path, query, limit))
        return await self._retried(f"{snapshot}/{archive}", lambda: self.pool.index(snapshot, archive, limit))

    async def fetch_chunk(self, snapshot: Snapshot, archive: Archive, digest: bytes, limit: int) -> bytes:
        return await self._retried(
            f"{snapshot}/{archive.name}", lambda: self.pool.chunk(snapshot, archive, digest, limit)
        )

    async def usage(self) -> Usage | None:
        # Not tried again: it is asked in the background, and a later one will do.
        return listing.parse_usage(await self._ask("status", {}))

    async def _ask(self, what: str, query: dict[str, str]) -> Any:
        return await self.api.get(f"/admin/datastore/{self.repository.store}/{what}", query)

    async def _retried(self, what: str, work: Callable[[], Awaitable[R]]) -> R:
        return await retried(work, self.settings.retry_timeout, what, self._outage)

    async def _check_store(self, refusal: PbsfsError) -> None:
        """Says so where the datastore is one that this user can't see: the server words that otherwise."""
        try:
            data = await self.api.get("/admin/datastore", {})
            stores = self._take(listing.parse_list(data, listing.parse_store))
        except (SourceError, DamageError, NotFoundError):
            return
        if self.repository.store not in stores:
            shown = ", ".join(sorted(stores)[:8]) or "none"
            raise UnknownDatastoreError(
                f"{self.repository.address} has no datastore '{self.repository.store}' that "
                f"{self.repository.auth_id} may see; there is: {shown} ({refusal})"
            )

    def _take(self, parsed: tuple[list[R], list[str]]) -> list[R]:
        entries, refused = parsed
        for text in refused:
            self._report(text)
        return entries

    def _report(self, text: str) -> None:
        """Logs a warning about what the server lists, once however often the same is met."""
        if text not in self._reported:
            self._reported.add(text)
            log.warning("%s: %s", self.repository.address, text)
