"""What is known about a node, for `pbsfs info`. Used from tasks of one trio loop."""

from __future__ import annotations

import os

from pbsfs.tasks.attributes import device_text, mode_text, time_text, type_text
from pbsfs.tree import ContentsNode, File, Node, SnapshotDirectory


async def facts_of(node: Node) -> dict[str, str | list[str]]:
    """The facts about `node` by name; those that are not known are missing.

    Raises DamageError, KeyRequiredError and SourceError if an entry of an archive can't be read.
    """
    facts: dict[str, str | list[str]] = {"path": os.fsdecode(node.path)}
    if isinstance(node, ContentsNode):
        return facts | await _entry_facts(node)
    facts |= await node.facts()
    if isinstance(node, File):
        facts["data_size"] = str((await node.stat()).data_size)
    elif isinstance(node, SnapshotDirectory):
        facts["files"] = [file.archive.filename for file in node.info.files]
    return facts


async def _entry_facts(node: ContentsNode) -> dict[str, str | list[str]]:
    entry = await node.learn()
    await node.inside.learn_link_counts(entry)
    stat = node.known()
    facts: dict[str, str | list[str]] = {"type": type_text(entry.mode)}
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
