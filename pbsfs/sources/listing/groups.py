"""The groups of a namespace, as the directories of a datastore have them.

Looking into each snapshot is what makes a listing slow, so it looks into the newest of each group, and into
more only up to a limit. Used by sources, from worker threads; everything blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from pbsfs.base.errors import DamageError, SourceError
from pbsfs.base.names import BACKUP_TYPES, MANIFEST, Group, Namespace, Snapshot
from pbsfs.runtime.report import Reporter
from pbsfs.sources import layout
from pbsfs.sources.base import GroupInfo
from pbsfs.sources.layout import Steps
from pbsfs.sources.listing.limits import ListingLimits
from pbsfs.sources.listing.names import Names
from pbsfs.sources.listing.store import Store

log = logging.getLogger(__name__)


class GroupListing:
    """Lists the groups of `store`; problems go to `reporter`."""

    def __init__(self, store: Store, names: Names, reporter: Reporter, limits: ListingLimits) -> None:
        self._store = store
        self._names = names
        self._reporter = reporter
        self._limits = limits

    def groups(self, namespace: Namespace) -> list[GroupInfo]:
        """The groups in `namespace`, in order. Raises NotFoundError, SourceError, OSError."""
        steps = self._store.enter_namespace(namespace)
        looks = iter(range(self._limits.looks))
        infos = [
            self._info(group, looks)
            for backup_type in BACKUP_TYPES
            for group in self._names.groups(namespace, backup_type, steps)
        ]
        return [info for info in infos if info is not None]

    def _info(self, group: Group, looks: Iterator[int]) -> GroupInfo | None:
        """What the group's directory says; None if it is in the trash.

        `looks`: one for each snapshot to look into after the newest is known; the others count as finished.
        """
        steps = layout.group_steps(group)
        if self._is_trashed(steps):
            log.info("%s: left out, it is in the trash", group)
            return None
        times: list[int] = []
        try:
            times = self._names.times(group)
        except DamageError:
            pass  # reported already
        except (OSError, SourceError) as error:
            # Listed all the same, as its neighbours are: looking into it fails.
            self._reporter.report(f"{group}: {self._store.metadata.problem(error, steps)}")
        newest: int | None = None
        unfinished = 0
        for time in reversed(times):
            if newest is not None and next(looks, None) is None:
                break
            if self._is_finished(group.snapshot(time)):
                newest = time if newest is None else newest
            else:
                unfinished += 1
        return GroupInfo(
            group=group,
            last_backup=newest,
            snapshot_count=len(times) - unfinished,
            owner=self._store.owner(group),
            notes=self._store.notes(group),
        )

    def _is_finished(self, snapshot: Snapshot) -> bool:
        """Whether the snapshot is listed: it has a manifest and is not in the trash.

        One that pbsfs can't look into is listed too, with an error.
        """
        try:
            has_manifest = self._store.metadata.exists(layout.file_steps(snapshot, MANIFEST))
        except (OSError, SourceError):
            has_manifest = True
        return has_manifest and not self._is_trashed(layout.snapshot_steps(snapshot))

    def _is_trashed(self, steps: Steps) -> bool:
        """Whether a group or snapshot is in the trash. One that pbsfs can't look into is not."""
        try:
            return self._store.metadata.exists((*steps, layout.TRASHED))
        except (OSError, SourceError):
            return False
