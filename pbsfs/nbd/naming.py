"""Names of exports: which images are exported below a path of the tree, and how clients see them.

The name of an export is its path below the directory that is served. Used in the loop by the exports,
and by the check of a path before nbdkit serves it. Nothing here keeps state.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection

from pbsfs.base.errors import NotFoundError, PbsfsError, UsageError
from pbsfs.base.names import ArchiveKind
from pbsfs.base.text import first_of, printable
from pbsfs.formats.manifest import CryptMode
from pbsfs.tree import (
    Directory,
    FilesDirectory,
    GroupDirectory,
    ImageFile,
    Latest,
    Node,
    SnapshotDirectory,
    Tree,
)

log = logging.getLogger(__name__)

ONE_FOR_ALL = frozenset(("cache", "cacheextents", "cow", "gzip", "tar"))
"""Filters of nbdkit that keep what they learned by its offset alone, and not by export too."""


async def choose(tree: Tree, path: str, *, missing: str | None = None, filters: Collection[str] = ()) -> Node:
    """The node at `path`, if it can be exported: an image that opens, or a directory to choose from.

    `missing` and `filters`: as in Settings. Raises NotFoundError and UsageError, which name what there is,
    and what opening the image raises.
    """
    await tree.reader.source.namespaces(tree.root.namespace)
    node = await tree.find(path)
    if missing is not None:
        raise UsageError(f"{missing}= is missing; {await what_there_is(node)}")
    if _is_in_files(node):
        raise NotFoundError(f"{node} is in 'files', which has no images; give the path without 'files'")
    if not isinstance(node, Directory):
        image = await image_in(node, path)
        await image.open()
        if image.file.archive.kind is not ArchiveKind.FIXED:
            log.warning(
                "%s is an archive of files, not a disk: clients get the bytes of the archive; "
                "use `pbsfs export` to copy it to a file",
                node,
            )
        return node
    await node.children()
    if isinstance(node, SnapshotDirectory) and not await images_below(node):
        raise NotFoundError(f"{node} has no disk image; name another snapshot, or see `pbsfs ls`")
    sharing = sorted(ONE_FOR_ALL.intersection(filters))
    if sharing:
        raise UsageError(
            f"nbdkit's filter {sharing[0]} does not support multiple exports; "
            f"name one image; {await what_there_is(node)}"
        )
    return node


def _is_in_files(node: Node | None) -> bool:
    while node is not None and not isinstance(node, FilesDirectory):
        node = node.parent
    return node is not None


async def image_in(node: Node, name: str) -> ImageFile:
    """`node` as an image. Raises NotFoundError for anything else, as `name` was taken for an image."""
    if isinstance(node, ImageFile):
        return node
    if isinstance(node, Directory):
        raise NotFoundError(f"'{name}' is not an image; {await what_there_is(node)}")
    raise NotFoundError(f"'{name}' is not an image, but a file; `pbsfs export` copies it")


async def what_there_is(node: Node) -> str:
    """For errors: the images or names in `node`."""
    if isinstance(node, SnapshotDirectory):
        names = [name for name, _image in await images_below(node)]
    else:
        names = [os.fsdecode(name) for name in await node.children()] if isinstance(node, Directory) else []
    return f"{node} has {first_of(names, 8) or 'nothing'}"


async def images_below(node: Node) -> list[tuple[str, ImageFile]]:
    """The disk images below `node`, by their paths from there; in a group, the newest first."""
    if not isinstance(node, Directory):
        return []
    try:
        children = await node.children()
    except PbsfsError as error:
        log.warning("%s: its images are left out: %s", node, error)
        return []
    if isinstance(node, SnapshotDirectory):
        return [
            (os.fsdecode(name), file)
            for name, file in children.items()
            if isinstance(file, ImageFile) and file.file.archive.kind is ArchiveKind.FIXED
        ]
    below = list(children.items())
    if isinstance(node, GroupDirectory):
        below.reverse()
    found: list[tuple[str, ImageFile]] = []
    for name, child in below:
        inside = await node.child(await child.target()) if isinstance(child, Latest) else child
        found += [(f"{os.fsdecode(name)}/{rest}", image) for rest, image in await images_below(inside)]
    return found


def description_of(image: ImageFile) -> str:
    """The description that people see: the snapshot, the size, and the first line of the notes."""
    info = image.info
    text = f"{info.snapshot}/{os.fsdecode(image.name)}, {_size(image.file.size)}"
    if image.file.crypt_mode is CryptMode.ENCRYPT:
        text += ", encrypted"
    if info.notes:
        text += f": {info.notes.splitlines()[0] if info.notes.strip() else ''}"
    return printable(text[:500])


def _size(count: int) -> str:
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >> shift:
            return f"{count / (1 << shift):.1f} {unit}"
    return f"{count} bytes"
