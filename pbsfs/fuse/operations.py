"""What the kernel asks of the file system, answered from the tree.

pyfuse3 calls the handlers in the trio loop, each in a task. Before that, the shim asks `lacks_xattr` and the
methods called `…_at_once`, in the same thread, which answer what needs no waiting. `answers` wraps every
handler and turns errors into errnos.
"""

from __future__ import annotations

import pbsfs.fuse.shim  # noqa: F401 - before pyfuse3, see there
from pbsfs.fuse.shim import Attributes

import errno
import hashlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import pyfuse3

from pbsfs.base.errors import NotFoundError, SourceError
from pbsfs.base.names import safe_name
from pbsfs.fuse.attributes import Ownership, attributes_of, entry_of
from pbsfs.fuse.forgetting import Forgetting
from pbsfs.fuse.guards import answers, waits
from pbsfs.fuse.handles import OpenBlob, OpenContentsFile, OpenDirectory, OpenFile, OpenImage
from pbsfs.fuse.inodes import ROOT, Inode, InodeTable
from pbsfs.fuse.mountpoint import STATS_NAME, WATCH_NAME
from pbsfs.fuse.notices import Notices
from pbsfs.fuse.pages import Pages
from pbsfs.fuse.space import Space
from pbsfs.fuse.watching import WatchDirectory, WatchFile, version
from pbsfs.fuse.zeros import ZeroPages
from pbsfs.reader.buffers import Buffer
from pbsfs.reader.decode import SMALL
from pbsfs.reader.pieces import PiecesHandle
from pbsfs.runtime.recent import Recent
from pbsfs.runtime.report import HOUR, Reporter
from pbsfs.runtime.stats import COUNTS
from pbsfs.runtime.threads import in_thread
from pbsfs.tasks.numbers import Numbers
from pbsfs.tree import (
    BlobFile,
    ContentsDirectory,
    ContentsFile,
    ContentsNode,
    Directory,
    File,
    GroupDirectory,
    ImageFile,
    Latest,
    Link,
    Node,
    SnapshotDirectory,
    Stat,
    Tree,
)
from pbsfs.tree.node import XATTR_PREFIX
from pbsfs.tree.stat import DIRECTORY_MODE

log = logging.getLogger(__name__)

_WATCH_NAME = WATCH_NAME.encode()

SPACE_UNIT = 4096  # the unit in which the file system's size is given


class Operations(pyfuse3.Operations):
    """The file system that shows `tree`."""

    supports_dot_lookup = True  # for NFS servers, see `_look_up_number`

    def __init__(
        self,
        tree: Tree,
        ownership: Ownership,
        attributes: Mapping[str, bytes] | None = None,
        root: Directory | None = None,
        *,
        safe_names: bool = False,
        recent: Recent | None = None,
    ) -> None:
        """`attributes`: extended attributes of the mount as a whole. They are listed for its root only, but
        every inode has them, because a bind mount may show a part without the root. `root`: what the mount
        shows at its root; None for the root of the tree. `safe_names`: whether listings and `latest` have the
        names of snapshots without colons; look-ups find both forms. `recent`: the warnings and errors that
        are shown."""
        super().__init__()
        root = root or tree.root
        self._own_attributes = attributes or {}
        self.inodes = InodeTable(root)
        self.notices = Notices()
        self.forgetting = Forgetting(self.inodes, tree.reader.store.memory, self.notices)
        self.pages = Pages(self.notices)
        self.space = Space(tree.reader.source)
        self._tree = tree
        self._ownership = ownership
        self._safe_names = safe_names
        self.reporter = Reporter(log, repeat_after=HOUR)
        self._mounted_at = int(time.time()) * 1_000_000_000
        self._files: dict[int, OpenFile] = {}
        self._inode_of: dict[int, Inode] = {}  # of the files that are read through the page cache
        self.zeros = ZeroPages(tree.reader.zeroed, self._files, self.notices)
        self._listings: dict[int, OpenDirectory] = {}
        self._next_handle = 1
        more = {"open_files": self._files.__len__, "inodes": self.inodes.__len__}
        self.numbers = Numbers(tree.reader, more)
        errors = (recent or Recent()).text
        texts = {STATS_NAME.encode(): self.numbers.text, b"errors": errors, b"version": version}
        self._watch_directory = WatchDirectory(root, texts)

    # --- names and attributes

    @answers
    @waits
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if name in (b".", b".."):
            return await self._look_up_number(parent_inode, parent=name == b"..")
        directory = self._directory(parent_inode)
        if parent_inode == ROOT and name == _WATCH_NAME:
            node = await self._watched(directory, name)
        else:
            node = await directory.child(name)
        self.forgetting.used(directory)
        found = self._attributes(node, await node.stat(), directory.names_last())
        self.inodes.remember(node, found.size, found.inode)
        return entry_of(found)

    def lookup_at_once(self, parent: int, name: bytes) -> Attributes | None:
        """The same for an entry of an archive whose attributes are in memory."""
        directory = self.inodes[parent].node
        node = directory.cached_child(name) if isinstance(directory, ContentsDirectory) else None
        found = None if node is None else self._known_attributes(node)
        if node is not None and found is not None:
            self.forgetting.used(directory)
            self.inodes.remember(node, found.size, found.inode)
        return found

    async def _watched(self, root: Directory, name: bytes) -> Node:
        """`.pbsfs`, unless the mount shows an archive that has a file of this name."""
        if isinstance(root, ContentsDirectory):
            try:
                return await root.child(name)
            except NotFoundError:
                pass
        return self._watch_directory

    async def _at(self, path: bytes) -> Node:
        """The node whose `path` this is."""
        if not path:
            return self.inodes[ROOT].node
        if not path.startswith(b"/"):
            return await self._tree.at(path)
        above, _slash, name = path.rpartition(b"/")
        return await self._watch_directory.child(name) if above else self._watch_directory

    def forget_at_once(self, inode: int) -> None:
        self.inodes.forget(inode, 1)

    async def _look_up_number(self, number: int, *, parent: bool) -> pyfuse3.EntryAttributes:
        """`.` and `..` of a node, which need not be a directory, and which the kernel may have forgotten.

        The kernel looks them up to open a file handle (FUSE_EXPORT_SUPPORT; Linux:
        Documentation/filesystems/nfs/exporting.rst), and turns ENOENT into ESTALE.
        """
        path = self.inodes.path(number)
        node = await self._at(path.rpartition(b"/")[0] if parent and number != ROOT else path)
        found = self._attributes(node, await node.stat(), self._lasts(node))
        if not parent and found.inode != number:  # a file's that was made again while open
            raise NotFoundError(f"inode {number} is no longer {path!r}")
        self.inodes.remember(node, found.size, found.inode)
        return entry_of(found)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for number, lookups in inode_list:
            self.inodes.forget(number, lookups)

    @answers
    @waits
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        known, stat = self.inodes[inode], None
        if isinstance(known.node, File | ContentsNode) and known.node.known().exact:
            stat = known.node.known()  # without asking whether that changed: a look-up of the name does
        found = self._attributes(known.node, stat or await known.node.stat(), self._lasts(known.node))
        known.size = found.size
        return entry_of(found)

    def getattr_at_once(self, inode: int) -> Attributes | None:
        """The attributes of an entry of an archive that are in memory."""
        known = self.inodes[inode]
        found = self._known_attributes(known.node)
        if found is not None:
            known.size = found.size
        return found

    def _known_attributes(self, node: Node) -> Attributes | None:
        if not isinstance(node, ContentsNode):
            return None
        stat = node.known()
        return self._attributes(node, stat, node.directory.names_last()) if stat.exact else None

    def _lasts(self, node: Node) -> float:
        if isinstance(node, ContentsNode):
            return node.directory.names_last()
        return node.names_last() if isinstance(node, Directory) else self._tree.refresh

    @answers
    @waits
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        node = self.inodes[inode].node
        if not isinstance(node, Link):
            raise pyfuse3.FUSEError(errno.EINVAL)
        target = await node.target()
        return safe_name(target) if self._safe_names and isinstance(node, Latest) else target

    @answers
    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        # The kernel checks permissions (default_permissions) and that the mount is read-only.
        return True

    def _attributes(self, node: Node, stat: Stat, lasts: float) -> Attributes:
        """`lasts`: as for `attributes_of`."""
        number = self.inodes.number(node.key, node)
        return attributes_of(stat, number, self._ownership, default_mtime_ns=self._mounted_at, lasts=lasts)

    def _directory(self, inode: int) -> Directory:
        node = self.inodes[inode].node
        if not isinstance(node, Directory):
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        if isinstance(node, SnapshotDirectory) and node.info.error is not None:
            raise pyfuse3.FUSEError(errno.EIO)  # the source logged why, when it was listed
        return node

    # --- directories

    @answers
    @waits
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        directory = self._directory(inode)
        listing = await directory.children()
        self.forgetting.used(directory)
        return self._new_handle(self._listings, OpenDirectory(directory, listing))

    @answers
    @waits
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        opened = self._listings[fh]
        directory = opened.directory
        dots = [(b".", directory), (b"..", directory.parent or directory)]
        for position, (name, dot) in enumerate(dots[start_id:], start_id):
            # Not look-ups: the kernel takes only type and number of these two.
            found = self._attributes(dot, Stat(mode=DIRECTORY_MODE), 0)
            if not pyfuse3.readdir_reply(token, name, entry_of(found), position + 1):
                return
        first, replied = max(0, start_id - len(dots)), []
        safe = self._safe_names and isinstance(directory, GroupDirectory)
        for place in range(first, len(opened.names)):
            name, position = opened.names[place], place + len(dots)
            node = opened.listing[name]
            # A program that lists only names costs no request. The kernel may not keep what is not exact: it
            # asks again for a program that wants attributes, or opens the file.
            found = self._attributes(node, await node.glance(), directory.names_last())
            shown = safe_name(name) if safe else name
            if not pyfuse3.readdir_reply(token, shown, entry_of(found), position + 1):
                break
            replied.append((node, found))
        else:
            failure = directory.failure if isinstance(directory, ContentsDirectory) else None
            if failure is not None and not replied:
                raise failure  # after all that can be read, so that nobody takes the rest for all
        # At the end only: where one fails, or the program is killed, the kernel gets none of them.
        for node, found in replied:
            self.inodes.remember(node, found.size, found.inode)

    @answers
    async def releasedir(self, fh: int) -> None:
        del self._listings[fh]

    # --- files

    @answers
    @waits
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        if _writes(flags):
            raise pyfuse3.FUSEError(errno.EROFS)
        known = self.inodes[inode]
        node = known.node
        opened: OpenFile
        if isinstance(node, ContentsFile):
            # What an archive holds never changes, and its entries have numbers of their own.
            fh, keep_cache = self._opened(known, inode, await node.open())
            return pyfuse3.FileInfo(fh=fh, keep_cache=keep_cache)
        if isinstance(node, ImageFile):
            image = await node.open()
            opened, size, identity = OpenImage(image, inode), image.size, image.index.csum
        elif isinstance(node, WatchFile):
            text = node.content().encode(errors="replace")
            return pyfuse3.FileInfo(fh=self._new_handle(self._files, OpenBlob(text)), direct_io=True)
        elif isinstance(node, BlobFile):
            blob = await node.open()
            opened, size, identity = OpenBlob(blob.data, blob), len(blob.data), await _digest(blob.data)
        else:
            raise pyfuse3.FUSEError(errno.EISDIR)
        # The kernel knows the length, as it asks for attributes that it may not keep before it opens a file.
        # Where the length that it knows is wrong, it must not cut reads to that. While files with the former
        # content are open, the page cache is theirs: it belongs to the inode.
        fh, unchanged = self._new_handle(self._files, opened), known.opened in (None, identity)
        if known.size != size or (known.readers and not unchanged):
            return pyfuse3.FileInfo(fh=fh, direct_io=True)
        known.opened = identity
        known.readers += 1
        self._inode_of[fh] = known
        # Zeros instead of damaged data must not outlive the repair.
        return pyfuse3.FileInfo(fh=fh, keep_cache=unchanged and self._tree.reader.zeroed is None)

    def open_at_once(self, inode: int, flags: int) -> tuple[int, bool] | None:
        """A handle for a file of an archive that is found without waiting, and whether the kernel may keep
        its pages. Raises like `open`."""
        known = self.inodes[inode]
        if _writes(flags) or not isinstance(known.node, ContentsFile):
            return None
        file = known.node.open_cached()
        return None if file is None else self._opened(known, inode, file)

    def _opened(self, known: Inode, inode: int, file: PiecesHandle) -> tuple[int, bool]:
        """The handle of an open file of an archive, and whether the kernel may keep its pages."""
        known.size = file.size
        handle = self._new_handle(self._files, OpenContentsFile(file, inode))
        return handle, self._tree.reader.zeroed is None

    def read_at_once(self, fh: int, offset: int, size: int) -> Buffer | None:
        """The bytes, where all of them are in memory. Raises like `read`."""
        opened = self._files[fh]
        data = opened.read_cached(offset, size)
        if data is None:
            return None
        COUNTS.reads += 1
        COUNTS.bytes_served += len(data)
        if not isinstance(opened, OpenBlob):
            self.pages.was_read(opened.hole_reads, offset, data)
        return data

    @answers
    @waits
    async def read(self, fh: int, off: int, size: int) -> Buffer:  # type: ignore[override]  # any buffer does
        """For what `read_at_once` has no answer to."""
        try:
            data = await self._files[fh].read(off, size)
        except NotFoundError as error:
            # An open file needs no name: its data is missing, because the snapshot was forgotten.
            raise SourceError(str(error)) from None
        COUNTS.reads += 1
        COUNTS.bytes_served += len(data)
        return data

    @answers
    async def release(self, fh: int) -> None:
        self.release_at_once(fh)

    def release_at_once(self, fh: int) -> None:
        self._files.pop(fh).close()
        if (inode := self._inode_of.pop(fh, None)) is not None:
            inode.readers -= 1

    def seek(self, inode: int, offset: int, whence: int, fh: int) -> int:
        """SEEK_DATA and SEEK_HOLE, called by the shim; raises OSError."""
        return self._files[fh].seek(offset, whence)

    def _new_handle(self, table: dict[int, Any], value: object) -> int:
        handle = self._next_handle
        self._next_handle += 1
        table[handle] = value
        return handle

    # --- extended attributes and the file system as a whole

    @answers
    @waits
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        wanted = os.fsdecode(name)
        if wanted in self._own_attributes:
            return self._own_attributes[wanted]
        if (value := await self.inodes[inode].node.xattr(name)) is not None:
            return value
        raise pyfuse3.FUSEError(pyfuse3.ENOATTR)

    def lacks_xattr(self, inode: int, name: bytes) -> bool:
        """Whether it is known that there is none of that name: programs ask each entry for an ACL."""
        node = self.inodes[inode].node
        return (
            isinstance(node, ContentsNode)
            and node.known_to_have_no_xattrs
            and not name.startswith(XATTR_PREFIX)
            and os.fsdecode(name) not in self._own_attributes
        )

    @answers
    @waits
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        own = list(self._own_attributes) if inode == pyfuse3.ROOT_INODE else []
        return [*map(os.fsencode, own), *await self.inodes[inode].node.xattrs()]

    @answers
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = SPACE_UNIT
        answer.f_namemax = 255
        usage = self.space.last()
        if usage is not None:
            answer.f_blocks = usage.total // SPACE_UNIT
            answer.f_bfree = max(0, usage.total - usage.used) // SPACE_UNIT
            answer.f_bavail = usage.available // SPACE_UNIT
        # pbsfs does not count inodes: 0 of 0, which df(1) and others show as "-".
        return answer

    # --- writing: the kernel refuses most of it before it gets here, as the mount is read-only

    async def _refuse(self, *_args: object, **_kwargs: object) -> NoReturn:
        raise pyfuse3.FUSEError(errno.EROFS)

    setattr = mknod = mkdir = unlink = rmdir = symlink = rename = link = create = write = _refuse
    setxattr = removexattr = _refuse


def _writes(flags: int) -> bool:
    return flags & os.O_ACCMODE != os.O_RDONLY or bool(flags & os.O_TRUNC)


async def _digest(data: bytes) -> bytes:
    """SHA-256; in a thread where it takes longer than going there."""
    if len(data) <= SMALL:
        return hashlib.sha256(data).digest()
    return (await in_thread(hashlib.sha256, data)).digest()
