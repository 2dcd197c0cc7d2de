"""Restores archives that lie in memory, and looks at what came of it."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pbsfs.base.errors import DamageError
from pbsfs.contents.archive import Archive
from pbsfs.reader.image import Extent
from pbsfs.tasks.extract.attributes import Attributes, Kept, Unset
from pbsfs.tasks.extract.destination import Destination
from pbsfs.tasks.extract.extract import OnDamage, Restore, Restored
from pbsfs.tasks.patterns import Selection
from pbsfs.testing.archives import Written
from tests.support.archives import Memory


class Chunked(Memory):
    """A stream of chunks of `chunk` bytes, some of which are `damaged`; those of zeros are holes."""

    def __init__(self, data: bytes, *, chunk: int = 4096, damaged: Sequence[int] = ()) -> None:
        super().__init__(data)
        self.chunk = chunk
        self.damaged = set(damaged)

    def pread(self, offset: int, size: int) -> bytes:
        for number in range(offset // self.chunk, -(-min(offset + size, self.size) // self.chunk)):
            if number in self.damaged:
                raise DamageError(f"chunk {number} is damaged")
        return super().pread(offset, size)

    def view(self, offset: int, size: int) -> bytes:
        return self.pread(offset, size)

    def kept(self, _offset: int, _size: int) -> None:
        """Nothing is kept."""

    def spans(self, offset: int, size: int) -> Iterator[Extent]:
        while size:
            length = min(size, self.chunk - offset % self.chunk)
            start = offset - offset % self.chunk
            yield Extent(offset, length, hole=not any(self.data[start : start + self.chunk]))
            offset, size = offset + length, size - length


def opened(written: Written, **options: Any) -> tuple[Archive, list[Chunked]]:
    """An archive, and the streams that it lies in, made with `options`."""
    main = Chunked(written.main, **options)
    if written.payload is None:
        return Archive(main), [main]
    payload = Chunked(written.payload, **options)
    return Archive(main, payload), [main, payload]


def restored(
    written: Written,
    place: Path,
    *,
    kept: Kept | None = None,
    selection: Selection | None = None,
    on_damage: OnDamage | None = None,
    streams: Sequence[Chunked] | None = None,
    overwrite: bool = False,
    existing_directories: bool = False,
) -> tuple[Restored, Unset]:
    """Restores an archive to the directory `place`, which is made if need be."""
    archive, own = opened(written)
    if streams is not None:
        own = list(streams)
        archive = Archive(*own)
    place.mkdir(exist_ok=True)
    destination = Destination(str(place), overwrite=overwrite, existing_directories=existing_directories)
    attributes = Attributes(kept or Kept())
    try:
        work = Restore(
            archive, own, destination, attributes, selection or Selection(), on_damage or OnDamage()
        )
        return work.directory(archive.root), attributes.unset
    finally:
        destination.close()


Seen = dict[bytes, tuple[Any, ...]]


def seen(root: Path, *, times_of_change: bool = False) -> Seen:
    """All that the file system says of what is below `root` and of itself, by path; no link is followed."""
    found: Seen = {}
    for folder, directories, files, fd in os.fwalk(os.fsencode(root), follow_symlinks=False):
        inner = os.path.relpath(folder, os.fsencode(root))
        if inner == b".":
            found[b""] = _one(b".", fd, times_of_change)
        for name in directories + files:
            found[os.path.normpath(os.path.join(inner, name))] = _one(name, fd, times_of_change)
    return found


def _one(name: bytes, directory: int, times_of_change: bool) -> tuple[Any, ...]:
    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=directory)
    try:
        place = f"/proc/self/fd/{fd}"
        xattrs = {os.fsencode(key): os.getxattr(place, key) for key in os.listxattr(place)}
        content = b""
        if stat.S_ISREG(status.st_mode):
            content = Path(place).read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(name, dir_fd=directory)
    finally:
        os.close(fd)
    changed = (status.st_ino, status.st_ctime_ns) if times_of_change else ()
    links = 1 if stat.S_ISDIR(status.st_mode) else status.st_nlink
    owner = (status.st_uid, status.st_gid)
    what = (xattrs, content, *changed)
    return (status.st_mode, *owner, status.st_mtime_ns, status.st_rdev, links, *what)


def empty(top: Path) -> None:
    """Removes all that is in a directory, whatever it is."""
    for child in top.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


@contextmanager
def untouched(root: Path) -> Iterator[None]:
    """Fails where anything below `root` is another afterwards, be it only its time of change."""
    before = seen(root, times_of_change=True)
    yield
    assert seen(root, times_of_change=True) == before
