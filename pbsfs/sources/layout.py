"""The names in a datastore: which file or directory holds what.

Every form of a datastore shares them: the directory of a server, a copy of that directory, and a bucket in an
object store, where the names are parts of a key. The directory source, the writer of test data and the tests'
server use this module. Pure functions, for any thread.

Source of the names: proxmox-backup 3.2.4, pbs-datastore/src/datastore.rs and chunk_store.rs; for object
stores, proxmox-backup 4.2.3, pbs-datastore/src/s3.rs.
"""

from __future__ import annotations

import re

from pbsfs.base.names import Archive, Group, Namespace, Snapshot

Steps = tuple[str, ...]
"""Names that lead from a root to a file or directory; none: the root itself."""

CHUNKS = ".chunks"
"""The directory of the chunk store, directly in a datastore."""

METADATA = ".cnt"
"""The directory of everything but the chunks, where a datastore is in an object store."""

IN_USE = ".in-use"
"""The object beside those two that names the server which uses a datastore in an object store."""

NAMESPACES = "ns"
"""The directory of the namespaces in a namespace."""

GC_STATUS = ".gc-status"
"""The file in a datastore about the last garbage collection: JSON."""

OWNER = "owner"
NOTES = "notes"
"""Files of a group: text."""

PROTECTED = ".protected"
"""An empty file in a snapshot that must not be removed."""

TRASHED = ".trashed"
"""A file in a group or snapshot that the server is about to remove."""

UNCACHED = ".using"
"""End of the name of an empty file beside the chunks, for a chunk that is only in the object store."""

_CHUNK_NAME = re.compile(r"[0-9a-f]{64}", re.ASCII)
_BAD_COPY = re.compile(r"[0-9a-f]{64}\.\d\.bad", re.ASCII)


def namespace_steps(namespace: Namespace) -> Steps:
    """From the root of the metadata to a namespace."""
    return tuple(step for part in namespace.parts for step in (NAMESPACES, part))


def group_steps(group: Group) -> Steps:
    """From the root of the metadata to a group."""
    return (*namespace_steps(group.namespace), group.type, group.id)


def snapshot_steps(snapshot: Snapshot) -> Steps:
    """From the root of the metadata to a snapshot."""
    return (*group_steps(snapshot.group), snapshot.time_text)


def file_steps(snapshot: Snapshot, archive: Archive) -> Steps:
    """From the root of the metadata to a file of a snapshot."""
    return (*snapshot_steps(snapshot), archive.filename)


def chunk_steps(digest: bytes) -> Steps:
    """From the chunk store to the file of a chunk."""
    name = digest.hex()
    return (name[:4], name)


def is_chunk_name(name: str) -> bool:
    """Whether a file of the chunk store with that name holds a chunk."""
    return _CHUNK_NAME.fullmatch(name) is not None


def is_bad_copy(name: str, digest: bytes) -> bool:
    """Whether a file of the chunk store with that name is what a verification found damaged of a chunk."""
    return _BAD_COPY.fullmatch(name) is not None and name.startswith(digest.hex())
