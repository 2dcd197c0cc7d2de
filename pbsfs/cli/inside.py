"""Paths that name their source: in a mount of pbsfs, or after a profile (`NAME:PATH`).

The mount or the profile names the source, and the rest of the path the place in its tree. So commands accept
paths that users see in a file manager or shell, without options for the source. The mount reveals no secrets:
pbsfs finds the password or asks for it, as always. Synchronous, except `find`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pbsfs.access.config import check_no_profile, split_profiles, with_secrets
from pbsfs.access.options import (
    PROFILE_VARIABLE,
    SOURCE_ATTRIBUTE,
    SourceOptions,
    named_by,
    names_other_server,
    names_source,
)
from pbsfs.base.errors import NotFoundError, SourceError, UsageError
from pbsfs.cli.running import environment, ignore_source
from pbsfs.fuse.mountpoint import DEAD, FS_TYPE, Mount, mount_of, mounts
from pbsfs.runtime.threads import in_thread
from pbsfs.sources.server.repository import Repository
from pbsfs.tree import Node, Tree

_NAME_IT = "name the source with --repository, --datastore-dir, --bucket or --profile"


def from_mounts(source: SourceOptions, paths: Sequence[str]) -> tuple[SourceOptions, list[str]]:
    """The source and the places in its tree of `paths` that are inside a mount of pbsfs or name a profile.

    Returns both unchanged if options name a source. `NAME:PATH` is a place in the source of the profile NAME
    if there is one; otherwise a path in a mount keeps its colon. If the environment names a source, a path is
    looked for in a mount only if it starts with `/` or `.`; any other is a place in that source, regardless
    of the current directory. An empty path is the current directory. Raises UsageError, SourceError.
    """
    unchanged = source, list(paths)
    if source.names_source():
        return unchanged
    split = split_profiles(paths, environment())
    profiles = {None if found is None else found[0] for found in split}
    if profiles != {None}:
        if len(profiles) > 1:
            raise UsageError(f"{', '.join(paths)}: not all of them are in one profile; read one at a time")
        places = [found[1].lstrip("/") for found in split if found is not None]
        return replace(source, profile=profiles.pop()), places
    if not any(mount.type == FS_TYPE for mount in mounts()):
        check_no_profile(paths, environment())
        return unchanged
    always = not (names_source(environment()) or environment().get(PROFILE_VARIABLE))
    found = [_find(path) if always or path.startswith(("/", ".")) else None for path in paths]
    inside = [place for place in found if place is not None]
    if not inside:
        check_no_profile([path for path in paths if not _is_in_mount(path)], environment())
        return unchanged
    if source.namespace is not None:
        raise UsageError(f"--ns {source.namespace}: the mount has a namespace already; leave out --ns")
    mounted = inside[0][0]
    if any(options != mounted for options, _place in inside) or len(inside) < len(paths):
        raise UsageError(
            f"{', '.join(paths)}: not all of them are in one mount; {_NAME_IT}, or one at a time"
        )
    merged = replace(
        source,
        repository=mounted.repository,
        datastore_dir=mounted.datastore_dir,
        bucket=mounted.bucket,
        endpoint=mounted.endpoint if source.endpoint is None else source.endpoint,
        region=mounted.region if source.region is None else source.region,
        path_style=mounted.path_style if source.path_style is None else source.path_style,
        anonymous=mounted.anonymous if source.anonymous is None else source.anonymous,
        namespace=mounted.namespace,
        fingerprint=mounted.fingerprint if source.fingerprint is None else source.fingerprint,
    )
    if mounted.repository is not None and names_other_server(
        Repository.parse(mounted.repository), environment()
    ):
        ignore_source()
    return with_secrets(merged, environment()), [place for _options, place in inside]


async def find(tree: Tree, path: str, source: SourceOptions, *, follow: bool = True) -> Node:
    """What is at `path` in `tree`; `follow` and what it raises: see `Tree.find`.

    `source`: as `from_mounts` returned it.
    """
    try:
        return await tree.find(path, follow=follow)
    except NotFoundError as error:
        raise await explained(error, path, source) from None


async def explained(error: NotFoundError, path: str, source: SourceOptions) -> NotFoundError:
    """`error`, that there is no `path`; if it may be one in a mount, the error says how to write it.

    `source`: as `from_mounts` returned it. If an option names it, `path` was never one in a mount.
    """
    if source.names_source() or path.startswith(("/", ".")):
        return error
    if not await in_thread(_is_in_mount, path):
        return error
    return NotFoundError(f"{error}; for the path in the mount, write ./{path}")


def _is_in_mount(path: str) -> bool:
    real = Path(os.path.realpath(path))
    mount = mount_of(real)
    return mount is not None and mount.type == FS_TYPE and os.path.lexists(real)


def _find(path: str) -> tuple[SourceOptions, str] | None:
    """The source of the mount that `path` is in, and the place in its tree; None for any other path."""
    try:
        real = Path(os.path.realpath(path or "."))
    except OSError:  # the current directory was removed
        return None
    mount = mount_of(real)
    if mount is None or mount.type != FS_TYPE:
        return None
    options, subtree = _source_of(mount, path or ".")
    place = mount.root / real.relative_to(mount.path)
    return options, f"{subtree}{place}".strip("/")


def _source_of(mount: Mount, path: str) -> tuple[SourceOptions, str]:
    """The source that the mount names, and the place in its tree that the mount shows at its root."""
    if mount.owner not in (0, os.geteuid()):  # they could name their own server, which would get the password
        raise SourceError(f"{path}: the mount at {mount.path} belongs to another user; {_NAME_IT}")
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
            f"{path}: the mount at {mount.path} does not name its source{reason}; {_NAME_IT}"
        ) from None
