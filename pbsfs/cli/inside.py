"""A path inside a mount of pbsfs: the mount tells its source, and the path which place in its tree is meant.

So commands work on paths that users see in a file manager or shell, without naming the source again. The
mount passes on no secrets: pbsfs finds the password, or asks for it, as always. Synchronous, except `find`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import trio

from pbsfs.access.options import SOURCE_ATTRIBUTE, SourceOptions, named_by, names_source
from pbsfs.base.errors import NotFoundError, SourceError, UsageError
from pbsfs.cli.options import environment
from pbsfs.fuse.mountpoint import DEAD, FS_TYPE, Mount, mount_of, mounts
from pbsfs.tree import Node, Tree

_NAME_IT = "name the source with --repository or --datastore-dir"


def from_mounts(source: SourceOptions, paths: Sequence[str]) -> tuple[SourceOptions, list[str]]:
    """The source, and the places in its tree, that `paths` lead to, where they lead into a mount of pbsfs.

    Otherwise both as they are: where options name a source; and where the environment does, for paths that
    start neither with `/` nor with `.`, since these are places in that source wherever the user is. An empty
    path is the current directory. Raises UsageError, SourceError.
    """
    unchanged = source, list(paths)
    if source.names_source() or not any(mount.type == FS_TYPE for mount in mounts()):
        return unchanged
    always = not names_source(environment())
    found = [_find(path) if always or path.startswith(("/", ".")) else None for path in paths]
    inside = [place for place in found if place is not None]
    if not inside:
        return unchanged
    if source.namespace is not None:
        raise UsageError(f"--ns {source.namespace}: a path inside a mount says it already; leave out --ns")
    mounted = inside[0][0]
    if any(options != mounted for options, _place in inside) or len(inside) < len(paths):
        raise UsageError(
            f"{', '.join(paths)}: not all of them are in one mount; {_NAME_IT}, or one at a time"
        )
    merged = replace(
        source,
        repository=mounted.repository,
        datastore_dir=mounted.datastore_dir,
        namespace=mounted.namespace,
        fingerprint=mounted.fingerprint if source.fingerprint is None else source.fingerprint,
    )
    return merged, [place for _options, place in inside]


async def find(tree: Tree, path: str, source: SourceOptions, *, follow: bool = True) -> Node:
    """What is at `path` in `tree`; `follow` and what it raises: see `Tree.find`.

    Where only the environment names the source (`source`: what `from_mounts` returned), a path that is not
    there may be meant for a mount that the user is in: then the error says how to write it.
    """
    try:
        return await tree.find(path, follow=follow)
    except NotFoundError as error:
        if source.names_source() or path.startswith(("/", ".")):
            raise
        if not await trio.to_thread.run_sync(_is_in_mount, path):
            raise
        raise NotFoundError(f"{error}; for the path in a mount, write ./{path}") from None


def _is_in_mount(path: str) -> bool:
    real = Path(os.path.realpath(path))
    mount = mount_of(real)
    return mount is not None and mount.type == FS_TYPE and os.path.lexists(real)


def _find(path: str) -> tuple[SourceOptions, str] | None:
    """What the mount says that `path` is in, and the place in its tree; None for any other path."""
    try:
        real = Path(os.path.realpath(path or "."))
    except OSError:  # there is no current directory any more
        return None
    mount = mount_of(real)
    if mount is None or mount.type != FS_TYPE:
        return None
    place = mount.root / real.relative_to(mount.path)
    return _source_of(mount, path or "."), str(place).strip("/")


def _source_of(mount: Mount, path: str) -> SourceOptions:
    if mount.owner not in (0, os.geteuid()):  # who could have the password sent to a server of theirs
        raise SourceError(f"{path}: the mount at {mount.path} is that of another user; {_NAME_IT}")
    try:
        return named_by(os.getxattr(mount.path, SOURCE_ATTRIBUTE))
    except OSError as error:
        if error.errno in DEAD:
            raise SourceError(
                f"{path}: the process of the mount at {mount.path} has died; "
                f"clear it with: pbsfs umount {mount.path}"
            ) from None
        reason = "" if error.errno in (errno.ENODATA, errno.EOPNOTSUPP) else f" ({error.strerror})"
        raise SourceError(
            f"{path}: the mount at {mount.path} does not tell its source{reason}; {_NAME_IT}"
        ) from None
