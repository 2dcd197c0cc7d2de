"""What a store, a namespace or a type of backup holds, counted from the lists of its groups.

Used by `pbsfs info`, from tasks of one trio loop. The counts of snapshots come with the groups, so pbsfs
reads no manifests; unless it is asked to count the verify states, which each snapshot's manifest has.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from pbsfs.base.errors import DamageError, ForbiddenError
from pbsfs.base.names import Group, Namespace
from pbsfs.runtime.together import run_together
from pbsfs.sources.base import Source

MOST_NAMESPACES = 5000
"""Namespaces that are counted: each takes a request."""

AT_ONCE = 8
"""Lists that pbsfs asks for side by side."""


@dataclass(slots=True)
class Totals:
    """`namespaces`: those below. `groups`: by type. `last_backup`: of all, in seconds since the epoch.
    `hidden`: namespaces whose groups the user may not list. `is_cut`: whether there are more namespaces than
    were counted. `states`: snapshots by verify state, where these were counted. `problems`: why a part of
    them could not be."""

    namespaces: int = 0
    groups: Counter[str] = field(default_factory=Counter)
    snapshots: int = 0
    last_backup: int | None = None
    hidden: int = 0
    is_cut: bool = False
    states: Counter[str] | None = None
    problems: list[str] = field(default_factory=list)


async def totals_of(
    source: Source,
    namespace: Namespace,
    *,
    backup_type: str | None = None,
    own: bool = True,
    below: bool = True,
    states: bool = False,
) -> Totals:
    """The totals of `namespace`: of its `own` groups, of one type if that is given, and of all `below`.

    `states`: counts the verify states too. Raises SourceError, NotFoundError.
    """
    found = Totals(states=Counter() if states else None)
    inside = await _below(source, namespace, found) if below else []
    waiting = deque(([namespace] if own else []) + inside)
    groups: deque[Group] = deque()

    async def count() -> None:
        while waiting:
            here = waiting.popleft()
            try:
                listed = await source.groups(here)
            except ForbiddenError:
                found.hidden += 1
                continue
            for info in listed:
                if backup_type not in (None, info.group.type):
                    continue
                found.groups[info.group.type] += 1
                found.snapshots += info.snapshot_count
                if info.last_backup is not None:
                    found.last_backup = max(found.last_backup or 0, info.last_backup)
                if states:
                    groups.append(info.group)
            while groups:
                await _count_states(source, groups.popleft(), found)

    await run_together([count] * AT_ONCE)
    return found


async def _below(source: Source, namespace: Namespace, found: Totals) -> list[Namespace]:
    """The namespaces below `namespace`, level by level."""
    inside: list[Namespace] = []
    parents = deque([namespace])
    while parents:
        inside += (more := await source.namespaces(parents.popleft()))
        parents += more
        if len(inside) > MOST_NAMESPACES:
            found.is_cut = True
            break
    found.namespaces = len(inside)
    return inside[:MOST_NAMESPACES]


async def _count_states(source: Source, group: Group, found: Totals) -> None:
    assert found.states is not None
    try:
        for info in await source.snapshots(group):
            found.states["unreadable" if info.error else info.verify_state or "none"] += 1
    except DamageError as error:
        found.problems.append(str(error))
