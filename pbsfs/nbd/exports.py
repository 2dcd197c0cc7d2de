"""The exports of an nbdkit process: their list, and the images that are open.

Connections to an export share its open image, so that all connections of one client see the same bytes, even
if `latest` becomes another snapshot meanwhile. Everything here runs in the loop.
"""

from __future__ import annotations

import builtins
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from pbsfs.base.errors import NotFoundError
from pbsfs.base.text import first_of, printable
from pbsfs.nbd.limits import Limits
from pbsfs.nbd.naming import description_of, image_in, images_below, what_there_is
from pbsfs.reader.handle import Handle
from pbsfs.reader.image import Image
from pbsfs.sources.retry import SharedTry
from pbsfs.tree import LATEST, ImageFile, SnapshotDirectory, Tree

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Open:
    """An export that at least one connection has open."""

    image: Image
    description: str
    handles: list[Handle] = field(default_factory=list)


class Exports:
    """The image at `path`, or all images below the directory at `path`."""

    def __init__(self, tree: Tree, path: str, limits: Limits) -> None:
        self._tree = tree
        self._path = path
        self._limits = limits
        self._open: dict[str, _Open] = {}
        self._listing = SharedTry[builtins.list[tuple[str, str]]]()
        self._listed: builtins.list[tuple[str, str]] = []
        self._listed_until = -math.inf
        self._locked: tuple[str, ...] = ()  # the exports that were logged as not listed

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    async def list(self) -> list[tuple[str, str]]:
        """Names and descriptions of the exports, at most `Limits.refresh` seconds old.

        Clients that ask at the same time share one walk. Raises PbsfsError.
        """
        return await self._listing.run(
            lambda: self._listed if trio.current_time() < self._listed_until else None, self._list
        )

    async def default(self) -> str:
        """The name of the default export; empty, a name that opens nothing, if there is none."""
        node = await self._tree.find(self._path)
        if isinstance(node, SnapshotDirectory):
            images = await images_below(node)
            if len(images) == 1:
                return images[0][0]
        return ""

    async def open(self, name: str) -> tuple[Handle, str]:
        """A new handle on the export `name`, and the export's description. Raises PbsfsError."""
        if name not in self._open:
            node = await self._image(name)
            self._open.setdefault(name, _Open(await node.open(), description_of(node)))
        known = self._open[name]
        handle = known.image.handle()
        known.handles.append(handle)
        return handle, known.description

    def close(self, name: str, handle: Handle) -> None:
        handle.close()
        known = self._open[name]
        known.handles.remove(handle)
        if not known.handles:
            del self._open[name]

    async def _list(self) -> builtins.list[tuple[str, str]]:
        self._listed = await self._find_all()
        self._listed_until = trio.current_time() + self._limits.refresh
        return self._listed

    async def _find_all(self) -> builtins.list[tuple[str, str]]:
        node = await self._tree.find(self._path)
        if isinstance(node, ImageFile):
            return [("", description_of(node))]
        # The newest of each group come first, so that a list which is cut has them.
        found = sorted(await images_below(node), key=lambda named: LATEST not in named[0].split("/"))
        images = self._with_key(found)
        most = self._limits.exports
        if len(images) > most:
            log.warning("%d of %d images are listed; all can be opened", most, len(images))
        return [(name, description_of(image)) for name, image in images[:most]]

    def _with_key(self, images: Sequence[tuple[str, ImageFile]]) -> Sequence[tuple[str, ImageFile]]:
        """`images` without those whose key is missing.

        A client that lists asks about each export in turn, and nbdkit logs every export that does not open.
        So one line of the log names what is left out, and again only when that has changed.
        """
        lacks_key = self._tree.reader.manifests.lacks_key
        locked = [(name, image) for name, image in images if lacks_key(image.info, image.file)]
        names = tuple(name for name, _image in locked)
        if names != self._locked:
            self._locked = names
            if names:
                keys = sorted({_short(image.info.key_fingerprint) for _name, image in locked})
                log.warning(
                    "exports that are not listed, as their keys were not given: %s, with the keys %s; "
                    "give the key files with --keyfile (keyfile= of nbdkit)",
                    first_of(names, 3),
                    first_of(keys, 3),
                )
        return [(name, image) for name, image in images if name not in set(names)] if names else images

    async def _image(self, name: str) -> ImageFile:
        node = await self._tree.find(self._path)
        if isinstance(node, ImageFile):
            if name not in ("", *map(os.fsdecode, (node.name, node.path)), node.file.archive.filename):
                raise NotFoundError(f"there is no export '{name}'; the only export has no name")
            return node
        # A client may give the path from there, or the whole path.
        inside = name.strip("/").removeprefix(f"{self._path}/")
        if not inside:
            raise NotFoundError(f"name an export, as in nbd://localhost/NAME; {await what_there_is(node)}")
        return await image_in(await self._tree.find(f"{self._path}/{inside}"), name)


def _short(fingerprint: str | None) -> str:
    """The first bytes of a key's fingerprint in a manifest, printable."""
    if fingerprint is None:
        return "without a fingerprint"
    return printable(fingerprint[:23])
