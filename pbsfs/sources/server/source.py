"""A running server as a source: lists and small files through its HTTP API, images through sessions.

Retries requests that may succeed later, up to a limit. Listing opens no session. Used by `pbsfs.access`;
methods run in tasks of one trio loop.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import trio

from pbsfs.base.errors import (
    AuthError,
    ConnectError,
    DamageError,
    ForbiddenError,
    NotFoundError,
    PbsfsError,
    ResolveError,
    SourceError,
    TrustError,
    UnavailableError,
    UnknownDatastoreError,
)
from pbsfs.base.names import Archive, ArchiveKind, Group, Namespace, Snapshot
from pbsfs.base.secret import Secret
from pbsfs.base.text import first_of
from pbsfs.formats.blob import Stored
from pbsfs.runtime.logs import STARTING
from pbsfs.runtime.report import DAY, Reporter
from pbsfs.sources.base import Expected, GroupInfo, SnapshotInfo, Source, Usage, no_namespace
from pbsfs.sources.collection import Collection, parse_collection
from pbsfs.sources.http.proxy import Proxy
from pbsfs.sources.http.tls import Trust
from pbsfs.sources.pacing import DEFAULT_LIMIT
from pbsfs.sources.retry import Outage, SharedTry, retried
from pbsfs.sources.server import listing
from pbsfs.sources.server.ahead import Ahead
from pbsfs.sources.server.api import Api
from pbsfs.sources.server.limits import DEFAULT, ServerLimits
from pbsfs.sources.server.opening import snapshot_query
from pbsfs.sources.server.pool import SessionPool
from pbsfs.sources.server.repository import Repository

log = logging.getLogger(__name__)

R = TypeVar("R")

STALL_TIMEOUT = 30.0
"""Seconds without a sign of life (a byte of an answer, or an answered PING) after which a session is lost."""

ANSWER_TIMEOUT = 1800.0
"""Seconds without a byte of an answer after which pbsfs gives it up although the server is reachable: a
server waits as long for its object store."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """The user's settings for the server.

    `retry_timeout`: seconds for which pbsfs retries a read. `connections`: to one snapshot; None to choose
    by the round trip. `stall_timeout`: seconds without a sign of life after which pbsfs gives up a session.
    `answer_timeout`: seconds after which it gives up an answer that does not grow.
    """

    retry_timeout: float = DEFAULT_LIMIT
    connections: int | None = None
    stall_timeout: float = STALL_TIMEOUT
    answer_timeout: float = ANSWER_TIMEOUT


class ServerSource(Source):
    """The datastore that `repository` names."""

    cheap_files = False

    doubts = (0.25, 1.0)
    # A bit may flip between an object store and the server, or in the server's memory. Two tries: the answer
    # to the first may come from what another request has fetched.

    def __init__(
        self,
        repository: Repository,
        secret: Secret,
        trust: Trust,
        settings: ServerSettings | None = None,
        proxy: Proxy | None = None,
        limits: ServerLimits = DEFAULT,
    ) -> None:
        self.repository = repository
        self.settings = settings or ServerSettings()
        self._limits = limits
        self.api = Api(repository, secret, trust, proxy, limits)
        self.pool = SessionPool(
            self.api,
            connections=self.settings.connections,
            stall_timeout=self.settings.stall_timeout,
            answer_timeout=self.settings.answer_timeout,
            limits=limits,
        )
        self._namespaces: tuple[float, list[Namespace]] = (float("-inf"), [])
        self._asking = SharedTry[list[Namespace]]()
        self._outage = Outage()
        self._expected = Expected()
        self._ahead = Ahead(self.api, self.pool, limits)
        self._empty: dict[Namespace, set[Group]] = {}  # groups without snapshots, as they were listed last
        self._reporter = Reporter(log, repeat_after=DAY)

    def __str__(self) -> str:
        return str(self.repository)

    def expect(self, expected: Expected) -> None:
        self._expected = expected

    def prepare(self, snapshot: Snapshot) -> None:
        self._ahead.prepare(snapshot)

    async def open(self, nursery: trio.Nursery) -> None:
        self.pool.start(nursery)
        nursery.start_soon(self.api.tidy)
        self._ahead.start(
            nursery,
            self._expected,
            groups=self._ask_groups,
            snapshots=self._ask_snapshots,
            file=self._fetch_file,
        )
        # An unreachable server is an error at once, for the user who starts a mount to see. A server that is
        # reachable and reports a temporary fault is retried.
        await retried(
            self._begin,
            self.settings.retry_timeout,
            f"opening {self}",
            self._outage,
            of=UnavailableError,
            log=STARTING,
            pacing=self._limits.pacing,
        )
        self._ahead.accepted.set()
        nursery.start_soon(self.api.login.keep)

    async def _begin(self) -> None:
        try:
            await self._ask_namespaces()
        except (AuthError, ConnectError, ResolveError, TrustError):
            raise
        except PbsfsError as error:
            await self.api.greet()  # another kind of server refuses this too
            if isinstance(error, ForbiddenError | NotFoundError | UnknownDatastoreError):
                await self._check_store(error)
            raise

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
        # The list has what this user may see. Every namespace above one of those exists too.
        if parent.parts and parent not in visible and not below:
            raise await no_namespace(str(self), self.namespaces, parent)
        return sorted(below)

    async def _all_namespaces(self) -> list[Namespace]:
        return await self._retried(
            "listing namespaces", lambda: self._asking.run(self._kept_namespaces, self._ask_namespaces)
        )

    def _kept_namespaces(self) -> list[Namespace] | None:
        since, found = self._namespaces
        return found if trio.current_time() - since < self._limits.namespaces_kept else None

    async def _ask_namespaces(self) -> list[Namespace]:
        parse = functools.partial(listing.parse_list, parse=listing.parse_namespace)
        found = self._take("the namespaces", await self._ask("namespace", {}, parse))
        self._namespaces = trio.current_time(), found
        return found

    async def groups(self, namespace: Namespace) -> list[GroupInfo]:
        found = await self._list_groups(namespace)
        for number, info in enumerate(found):
            if info.last_backup is None and info.snapshot_count > 1:  # the newest one is not finished
                snapshots = (await self._list_snapshots(info.group)).entries
                if snapshots:
                    found[number] = replace(info, last_backup=snapshots[-1].snapshot.time)
        return found

    async def _list_groups(self, namespace: Namespace) -> list[GroupInfo]:
        listed = await self._ahead.answer(namespace, lambda: self._ask_groups(namespace))
        found = self._take(f"the groups of '{namespace}'", listed)
        self._empty[namespace] = {info.group for info in found if not info.snapshot_count}
        return found

    async def _ask_groups(self, namespace: Namespace) -> listing.Listed[GroupInfo]:
        query = {"ns": str(namespace)} if namespace.parts else {}
        parse = functools.partial(listing.parse_groups, namespace)
        return await self._retried(
            f"listing the groups of '{namespace}'", lambda: self._ask("groups", query, parse)
        )

    async def snapshots(self, group: Group) -> list[SnapshotInfo]:
        listed = await self._list_snapshots(group)
        # A server answers the same for a group without snapshots and for one that does not exist.
        if not listed.count and group not in self._empty.get(group.namespace, ()):
            there = {info.group for info in await self._list_groups(group.namespace)}
            if group not in there:
                raise NotFoundError(f"{self}: there is no group {group}")
        found = self._take(str(group), listed)
        unreadable = [info for info in found if info.error is not None]
        for info in unreadable[: listing.MAX_DESCRIBED]:
            self._report(f"{info.snapshot}: {info.error}")
        if len(unreadable) > listing.MAX_DESCRIBED:
            self._report(
                f"{group}: {len(unreadable)} snapshots in all have manifests that the server can't read"
            )
        return found

    async def _list_snapshots(self, group: Group) -> listing.Listed[SnapshotInfo]:
        return await self._ahead.answer(group, lambda: self._ask_snapshots(group))

    async def _ask_snapshots(self, group: Group) -> listing.Listed[SnapshotInfo]:
        query = {"backup-type": group.type, "backup-id": group.id}
        if group.namespace.parts:
            query["ns"] = str(group.namespace)
        parse = functools.partial(listing.parse_snapshots, group)
        return await self._retried(f"listing {group}", lambda: self._ask("snapshots", query, parse))

    async def fetch_file(self, snapshot: Snapshot, archive: Archive, limit: int) -> bytes:
        fetch = functools.partial(self._fetch_file, snapshot, archive, limit)
        try:
            found = await self._ahead.answer((snapshot, archive), fetch)
        except DamageError:  # the limits of the two differ
            return await fetch()
        return found if len(found) <= limit else await fetch()

    async def _fetch_file(
        self, snapshot: Snapshot, archive: Archive, limit: int, *, session: bool = False
    ) -> bytes:
        """The same; `session`: whether there is a session to the snapshot in any case."""
        if archive.kind is ArchiveKind.BLOB and not session:
            # Without a session: reading a configuration leaves neither a task nor a lock on the server.
            query = snapshot_query(self.repository.store, snapshot)
            del query["store"]
            query["file-name"] = archive.filename
            path = f"/admin/datastore/{self.repository.store}/download"
            return await self._retried(f"{snapshot}/{archive}", lambda: self.api.download(path, query, limit))
        return await self._retried(f"{snapshot}/{archive}", lambda: self.pool.index(snapshot, archive, limit))

    async def fetch_chunk(self, snapshot: Snapshot, archive: Archive, digest: bytes, limit: int) -> Stored:
        return await self._retried(
            f"{snapshot}/{archive.name}", lambda: self.pool.chunk(snapshot, archive, digest, limit)
        )

    async def usage(self) -> Usage | None:
        # Not retried: it runs in the background, and pbsfs asks again later.
        return await self._ask("status", {}, listing.parse_usage)

    async def collection(self) -> Collection | None:
        try:
            return await self._retried(
                "the status of the garbage collection", lambda: self._ask("gc", {}, parse_collection)
            )
        except (ForbiddenError, NotFoundError):  # a user of some namespaces
            return None

    async def _ask(self, what: str, query: dict[str, str], parse: Callable[[Any], R]) -> R:
        found: R = await self.api.get(f"/admin/datastore/{self.repository.store}/{what}", query, parse)
        return found

    async def _retried(self, what: str, work: Callable[[], Awaitable[R]]) -> R:
        return await retried(
            work, self.settings.retry_timeout, what, self._outage, pacing=self._limits.pacing
        )

    async def _check_store(self, refusal: PbsfsError) -> None:
        """Raises UnknownDatastoreError, with the datastores that exist, if this user can't see the datastore.

        Servers report that in several ways.
        """
        try:
            parse = functools.partial(listing.parse_list, parse=listing.parse_store)
            stores = self._take("the datastores", await self.api.get("/admin/datastore", {}, parse))
        except (SourceError, DamageError, NotFoundError):
            return
        if self.repository.store not in stores:
            shown = first_of(sorted(stores)) or "none"
            raise UnknownDatastoreError(
                f"{self.repository.address} has no datastore '{self.repository.store}' that "
                f"{self.repository.auth_id} may see; there is: {shown} ({refusal}){self.repository.port_hint}"
            )

    def _take(self, what: str, listed: listing.Listed[R]) -> list[R]:
        if listed.refused:
            self._report(f"{what}: {listed.refused}")
        return listed.entries

    def _report(self, text: str) -> None:
        self._reporter.report(f"{self.repository.address}: {text}")
