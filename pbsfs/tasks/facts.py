"""What is known about a node, for `pbsfs info`. Used from tasks of one trio loop.

Of images, snapshots and groups that includes what takes reading indexes: amounts of data.
"""

from __future__ import annotations

import os
from collections import Counter
from itertools import pairwise
from statistics import median

from pbsfs.base.errors import PbsfsError
from pbsfs.base.names import format_time
from pbsfs.base.text import SHOWN_NAMES, excerpt, first_of
from pbsfs.sources.base import SnapshotInfo, Source
from pbsfs.tasks.amounts import MOST_CHUNKS, Amounts, amounts_of, image_before, snapshot_before
from pbsfs.tasks.attributes import device_text, mode_text, time_text, type_text
from pbsfs.tasks.totals import MOST_NAMESPACES, totals_of
from pbsfs.tree import (
    ContentsNode,
    File,
    GroupDirectory,
    ImageFile,
    NamespaceDirectory,
    NamespacesDirectory,
    Node,
    SnapshotDirectory,
    TypeDirectory,
)

Facts = dict[str, str | list[str]]

VERIFIED = {
    "ok": "the last verification on the server found no damage",
    "failed": "the last verification on the server found damage; list it with pbsfs verify",
    "none": "never verified on the server",
}
"""What a verify state means."""

RECENT = 10
"""The newest backups of a group, from whose times is said how often it is backed up."""


async def facts_of(node: Node, *, states: bool = False) -> Facts:
    """The facts about `node` by name; those that are not known are missing.

    `states`: counts the verify states of all snapshots of a store, namespace or type too. Raises DamageError,
    KeyRequiredError and SourceError if what is asked for can't be read.
    """
    facts: Facts = {"path": os.fsdecode(node.path)}
    if isinstance(node, ContentsNode):
        return facts | await _entry_facts(node)
    is_store = isinstance(node, NamespaceDirectory) and node.parent is None
    if is_store:
        facts["source"] = str(node.tree.reader.source)
    facts |= await node.facts()
    if isinstance(node, File):
        facts["data_size"] = str((await node.stat()).data_size)
        if isinstance(node, ImageFile) and isinstance(node.parent, SnapshotDirectory):
            facts |= await _amount_facts([node], node.parent)
    elif isinstance(node, SnapshotDirectory):
        facts["files"] = [file.archive.filename for file in node.info.files]
        facts |= await _snapshot_facts(node)
    elif isinstance(node, GroupDirectory):
        facts |= await _group_facts(node)
    elif isinstance(node, NamespaceDirectory | NamespacesDirectory | TypeDirectory):
        facts |= await _total_facts(node, states=states)
        if is_store:
            facts |= await _store_facts(node.tree.reader.source)
    return facts


async def _total_facts(
    node: NamespaceDirectory | NamespacesDirectory | TypeDirectory, *, states: bool
) -> Facts:
    """How many namespaces, groups and snapshots it has, and when the last one was made."""
    total = await totals_of(
        node.tree.reader.source,
        node.namespace if isinstance(node, NamespaceDirectory) else node.namespace.namespace,
        backup_type=node.type if isinstance(node, TypeDirectory) else None,
        own=not isinstance(node, NamespacesDirectory),
        below=not isinstance(node, TypeDirectory),
        states=states,
    )
    facts: Facts = {}
    if not isinstance(node, TypeDirectory):
        facts["namespaces"] = str(total.namespaces)
        if total.is_cut:
            facts["counted"] = str(MOST_NAMESPACES)
        if total.hidden:
            facts["hidden"] = str(total.hidden)
    facts["groups"] = str(total.groups.total())
    if not isinstance(node, TypeDirectory):
        facts["groups_by_type"] = [f"{kind}: {count}" for kind, count in sorted(total.groups.items())]
    facts["snapshots"] = str(total.snapshots)
    if total.last_backup is not None:
        facts["last_backup"] = format_time(total.last_backup)
    if total.states is not None:
        facts["verify_states"] = _states(total.states)
    if total.problems:
        facts["error"] = first_of(total.problems)
    return facts


async def _store_facts(source: Source) -> Facts:
    """The space of the store, and its last garbage collection."""
    facts: Facts = {}
    try:
        usage, collection = await source.usage(), await source.collection()
    except PbsfsError as error:
        return {"error": str(error)}
    if usage is not None:
        facts |= {
            "total_space": str(usage.total),
            "used_space": str(usage.used),
            "available_space": str(usage.available),
        }
    if collection is not None and collection.time is None:
        facts["gc_time"] = "never"
    elif collection is not None and collection.time is not None:
        facts |= {
            "gc_time": format_time(collection.time),
            "gc_indexed_size": str(collection.indexed_size),
            "gc_stored_size": str(collection.stored_size),
            "gc_pending_size": str(collection.pending_size),
            "gc_bad_chunks": str(collection.bad_chunks),
        }
        if collection.state is not None:
            facts["gc_state"] = collection.state
    return facts


def _states(states: Counter[str]) -> list[str]:
    return [f"{excerpt(state)}: {count}" for state, count in states.most_common(SHOWN_NAMES)]


async def _group_facts(group: GroupDirectory) -> Facts:
    """When and how often it was backed up, how its snapshots were verified, the newest one's data."""
    listing = await group.children()
    found = [info for info in listing.values_by_name.values() if isinstance(info, SnapshotInfo)]
    facts: Facts = {}
    if not found:
        return facts
    times = [info.snapshot.time for info in found]
    facts["first_backup"] = format_time(times[0])
    gaps = [later - earlier for earlier, later in pairwise(times[-RECENT - 1 :])]
    if gaps:
        facts["backup_interval"] = str(int(median(gaps)))
    states = Counter(info.verify_state or "none" for info in found)
    facts["verify_states"] = _states(states)
    readable = [info for info in found if info.error is None]
    if readable:
        newest = await group.child(os.fsencode(readable[-1].snapshot.time_text))
        if isinstance(newest, SnapshotDirectory):
            facts |= {"newest": readable[-1].snapshot.time_text} | await _snapshot_facts(newest)
    return facts


async def _snapshot_facts(snapshot: SnapshotDirectory) -> Facts:
    if snapshot.info.error is not None:
        return {}
    children = (await snapshot.children()).values()
    return await _amount_facts([node for node in children if isinstance(node, ImageFile)], snapshot)


async def _amount_facts(files: list[ImageFile], snapshot: SnapshotDirectory) -> Facts:
    """The amounts of all `files` of `snapshot`; or why one of them is not known."""
    before = await snapshot_before(snapshot)
    total = Amounts()
    for file in files:
        try:
            amounts = await amounts_of(await file.open(), await image_before(file, before))
        except PbsfsError as error:  # also a user who may list, and not read
            return {"error": str(error)}
        if amounts is None:
            return {"error": f"{file}: amounts are not counted of more than {MOST_CHUNKS} chunks"}
        total += amounts
    if not files:
        return {}
    facts: Facts = {"data_size": str(total.data_size), "restore_size": str(total.restore_size)}
    if before is not None and total.shared_size is not None:
        facts |= {"shared_size": str(total.shared_size), "shared_with": os.fsdecode(before.name)}
    return facts


async def _entry_facts(node: ContentsNode) -> Facts:
    entry = await node.learn()
    await node.inside.learn_link_counts(entry)
    stat = node.known()
    facts: Facts = {"type": type_text(entry.mode)}
    if entry.is_file:
        facts |= {"size": str(stat.size), "data_size": str(stat.data_size)}
    if entry.target is not None:
        facts["target"] = os.fsdecode(entry.target)
    if (device := device_text(entry.mode, entry.rdev)) is not None:
        facts["device"] = device
    facts |= {
        "mode": mode_text(entry.mode),
        "uid": str(entry.uid),
        "gid": str(entry.gid),
        "links": str(stat.nlink),
        "mtime": time_text(entry.mtime_ns),
        "xattrs": [os.fsdecode(name) for name in sorted(await node.xattrs())],
    }
    archive = await node.facts()
    if "size" in archive:
        archive["archive_size"] = archive.pop("size")
    return facts | archive
