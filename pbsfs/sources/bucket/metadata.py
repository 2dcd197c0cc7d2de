"""Lists what is below `.cnt` of a datastore in a bucket: namespaces, groups and snapshots.

Fetches the keys of the part that is wanted, and the small files that its listing reads, many at once; then
the code that all sources share makes lists of them. Nothing but small files and parsed manifests is kept: the
tree keeps lists, for as long as the user wants. Used by `source`, in tasks of one trio loop.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import trio

from pbsfs.base.errors import DamageError, NotFoundError, SourceError
from pbsfs.base.names import BACKUP_TYPES, MANIFEST, Group, Namespace
from pbsfs.formats import blob
from pbsfs.formats.manifest import MAX_MANIFEST_SIZE
from pbsfs.runtime.report import DAY, Reporter
from pbsfs.runtime.threads import in_thread
from pbsfs.runtime.together import run_for_each, run_together
from pbsfs.sources import layout
from pbsfs.sources.base import GroupInfo, SnapshotInfo, no_namespace
from pbsfs.sources.bucket.files import KeyFiles
from pbsfs.sources.bucket.limits import BucketLimits
from pbsfs.sources.bucket.objects import Objects
from pbsfs.sources.bucket.pages import StoredObject
from pbsfs.sources.layout import Steps
from pbsfs.sources.listing.groups import GroupListing
from pbsfs.sources.listing.names import Names
from pbsfs.sources.listing.snapshots import KeptManifests, SnapshotListing
from pbsfs.sources.listing.store import Store

log = logging.getLogger(__name__)

R = TypeVar("R")

_AT_ONCE = 1000
"""Names that the trio loop goes through before other tasks run: that takes 2 to 5 ms."""


class _Listed(Store):
    """The part of a datastore that was listed."""

    metadata: KeyFiles

    def __init__(self, root: str, name: str, limits: BucketLimits) -> None:
        super().__init__(limits.listing)
        self.metadata = KeyFiles(root, name, limits.max_keys)
        self._name = name

    def __str__(self) -> str:
        return self._name

    def check(self) -> None:
        """An object store that lists keys is there."""


class Metadata:
    """The metadata of the datastore in a bucket."""

    def __init__(self, objects: Objects, limits: BucketLimits) -> None:
        self._objects = objects
        self._limits = limits
        self._reporter = Reporter(log, repeat_after=DAY)
        self._kept = KeptManifests(limits.listing.parsed_manifests)
        self._small: OrderedDict[tuple[str, str], bytes] = (
            OrderedDict()
        )  # by key and version; latest use last
        self._small_size = 0
        self._root = f"{objects.root}{layout.METADATA}/"

    def forget(self) -> None:
        """Frees what is kept."""
        self._kept.forget()
        self._small.clear()
        self._small_size = 0

    def key(self, steps: Steps) -> str:
        """The key of a file."""
        return self._root + "/".join(steps)

    async def namespaces(self, parent: Namespace) -> list[Namespace]:
        """Like `Source.namespaces`."""
        listed, steps = self._listed(), layout.namespace_steps(parent)
        await self._list_below((*steps, layout.NAMESPACES), listed)
        if parent.parts and not listed.metadata.exists(steps) and not await self._is_there(steps):
            raise await self._no_namespace(parent)
        names = Names(listed.metadata, self._reporter)
        return await self._run(lambda: names.namespaces(parent, steps))

    async def groups(self, namespace: Namespace) -> list[GroupInfo]:
        """Like `Source.groups`: of each group, only whether the newest snapshot is finished."""
        listed, steps = self._listed(), layout.namespace_steps(namespace)
        names = Names(listed.metadata, self._reporter)
        there = True

        async def look() -> None:
            nonlocal there
            there = not steps or await self._is_there(steps)

        async def list_type(backup_type: str) -> None:
            count = await self._list_below((*steps, backup_type), listed)
            groups = await self._run(lambda: names.groups(namespace, backup_type, steps), count)
            await run_for_each(
                groups, lambda group: self._learn(group, names, listed), at_once=self._limits.requests
            )

        await run_together([look, *(partial(list_type, backup_type) for backup_type in BACKUP_TYPES)])
        if not there:
            raise await self._no_namespace(namespace)
        listed.metadata.add_directories([self.key(steps)])
        listing = GroupListing(listed, names, self._reporter, self._limits.listing)
        return await self._run(lambda: listing.groups(namespace))

    async def snapshots(self, group: Group) -> list[SnapshotInfo]:
        """Like `Source.snapshots`."""
        listed, steps = self._listed(), layout.group_steps(group)
        await self._list_all(steps, listed)
        if not listed.metadata.exists(steps):
            raise NotFoundError(f"{self._objects.address}: there is no group {group}")
        await self._fetch(listed, [(*steps, layout.OWNER)])
        names = Names(listed.metadata, self._reporter)
        listing = SnapshotListing(listed, names, self._reporter, self._kept)
        unread = await self._run(
            lambda: [layout.file_steps(snapshot, MANIFEST) for snapshot in listing.unread(group)]
        )
        await self._fetch(listed, unread)
        return await self._run(lambda: listing.snapshots(group))

    def _listed(self) -> _Listed:
        return _Listed(self._root, str(self._objects.address), self._limits)

    async def _no_namespace(self, namespace: Namespace) -> NotFoundError:
        return await no_namespace(str(self._objects.address), self.namespaces, namespace)

    async def _learn(self, group: Group, names: Names, listed: _Listed) -> None:
        """Lists a group without what is in its snapshots, and fetches what a list of groups reads of it."""
        steps = layout.group_steps(group)
        count = await self._list_below(steps, listed)
        await run_together(
            [
                partial(self._find_newest, group, count, names, listed),
                partial(self._fetch, listed, [(*steps, name) for name in (layout.OWNER, layout.NOTES)]),
            ]
        )

    async def _find_newest(self, group: Group, count: int, names: Names, listed: _Listed) -> None:
        """Looks for the manifest of the newest snapshot; lists all that is in the group if there is none.

        `count`: the names in the group.
        """
        try:
            times = await self._run(lambda: names.times(group), count)
        except DamageError:  # reported
            return
        if not times:
            return
        newest = layout.file_steps(group.snapshot(times[-1]), MANIFEST)
        if await self._objects.exists(self.key(newest), listed.metadata.joined(newest)):
            listed.metadata.add([StoredObject(self.key(newest), 0, "")])
        else:
            await self._list_all(layout.group_steps(group), listed)

    async def _list_below(self, steps: Steps, listed: _Listed) -> int:
        """Lists what is directly below a directory; returns how many names that are."""
        objects, prefixes = await self._objects.list(self.key((*steps, "")), delimited=True)
        for some in _parts(objects):
            listed.metadata.add(some)
            await trio.lowlevel.checkpoint()
        for below in _parts(prefixes):
            listed.metadata.add_directories(below)
            await trio.lowlevel.checkpoint()
        return len(objects) + len(prefixes)

    async def _list_all(self, steps: Steps, listed: _Listed) -> None:
        """Lists all that is below a directory."""
        objects, _prefixes = await self._objects.list(self.key((*steps, "")), delimited=False)
        for some in _parts(objects):
            listed.metadata.add(some)
            await trio.lowlevel.checkpoint()

    async def _is_there(self, steps: Steps) -> bool:
        """Whether anything is below a directory."""
        return await self._objects.any(self.key((*steps, "")))

    async def _fetch(self, listed: _Listed, files: Sequence[Steps]) -> None:
        """Fetches those of the files that were listed, for the listing to read."""
        new: list[Steps] = []
        for number, steps in enumerate(files, 1):
            if not number % _AT_ONCE:
                await trio.lowlevel.checkpoint()
            found = listed.metadata.object(steps)
            if found is None:
                continue
            known = self._small.get((found.key, found.version))
            if known is not None:
                self._small.move_to_end((found.key, found.version))
                listed.metadata.add_content(steps, known)
            else:
                new.append(steps)
        await run_for_each(new, lambda steps: self._fetch_one(steps, listed), at_once=self._limits.requests)

    async def _fetch_one(self, steps: Steps, listed: _Listed) -> None:
        found = listed.metadata.object(steps)
        assert found is not None
        is_manifest = steps[-1] == MANIFEST.filename
        limit = blob.stored_limit(MAX_MANIFEST_SIZE) if is_manifest else self._limits.listing.owner_and_notes
        try:
            content = await self._objects.get(found.key, limit, listed.metadata.joined(steps))
        except (NotFoundError, DamageError) as error:
            listed.metadata.add_content(steps, error)
            return
        except SourceError as error:
            if error.retryable:
                raise
            listed.metadata.add_content(steps, error)  # of this file alone, perhaps
            return
        listed.metadata.add_content(steps, content)
        if not is_manifest:  # what they say is kept
            self._keep(found.key, found.version, content)

    def _keep(self, key: str, version: str, content: bytes) -> None:
        if (key, version) in self._small:
            return
        self._small[key, version] = content
        self._small_size += len(content)
        while self._small_size > self._limits.small_files:
            _version, oldest = self._small.popitem(last=False)
            self._small_size -= len(oldest)

    async def _run(self, work: Callable[[], R], count: int = _AT_ONCE + 1) -> R:
        """Runs `work`, which takes the longer the more was listed, in a worker thread. `count`: of the names
        that it goes through; few take less time than a thread."""
        if count <= _AT_ONCE // 10:
            return work()
        try:
            return await in_thread(work, abandon_on_cancel=True)
        except FileNotFoundError as error:
            raise NotFoundError(f"{error.filename} does not exist") from None


def _parts(items: Sequence[R]) -> Iterator[Sequence[R]]:
    """`items`, `_AT_ONCE` at a time."""
    return (items[start : start + _AT_ONCE] for start in range(0, len(items), _AT_ONCE))
