"""Restores and packs from the tree: opens the archive, and runs the synchronous work in a thread.

Used by `pbsfs export`, from tasks of one trio loop.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

import trio

from pbsfs.contents.base import Entry
from pbsfs.tasks.extract.attributes import Attributes, Kept, Unset
from pbsfs.tasks.extract.destination import Destination
from pbsfs.tasks.extract.extract import OnDamage, Restore, Restored
from pbsfs.tasks.made import made_directory
from pbsfs.tasks.patterns import Selection
from pbsfs.tree import ContentsNode

if TYPE_CHECKING:
    from pbsfs.tasks.pack import Packing

Advance = Callable[[int, int], None]
"""Called with the bytes of each step, and the number of entries that are done."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to restore.

    `overwrite` and `existing_directories`: see `Destination`.
    """

    kept: Kept = field(default_factory=Kept)
    selection: Selection = field(default_factory=Selection)
    overwrite: bool = False
    existing_directories: bool = False
    on_damage: OnDamage = field(default_factory=OnDamage)


async def size_below(node: ContentsNode, selection: Selection) -> int | None:
    """Bytes of what is to be read, about; None where that is not known. Raises what reading raises."""
    entry = await node.learn()
    if not entry.is_directory:
        return entry.size
    if not selection.is_all:
        return None
    opened = await node.inside.open()
    return await opened.run(functools.partial(opened.contents.size_below, entry))


async def restore(
    node: ContentsNode, place: Path, options: Options, advance: Advance
) -> tuple[Restored, Unset]:
    """Restores a directory to `place`, which is made where it does not exist; or another entry as `place`, or
    in it where that is a directory. Raises what reading raises, and OutputError."""
    entry = await node.learn()
    opened = await node.inside.open()
    place, path = _where(entry, node.name, place)
    made = nullcontext() if path else made_directory(place, 0o700)
    with made, opened.streams() as streams:
        destination = Destination(
            str(place), overwrite=options.overwrite, existing_directories=options.existing_directories
        )
        attributes = Attributes(options.kept)
        node.tree.reader.store.serve_copy(len(streams))
        result = Restored()
        work = Restore(
            opened.contents,
            streams,
            destination,
            attributes,
            options.selection,
            options.on_damage,
            functools.partial(_step, advance, result),
            result,
        )
        restored = functools.partial(work.entry, entry, path)
        if not path:
            restored = functools.partial(work.directory, entry)
        try:
            return await opened.run(restored), attributes.unset
        finally:
            destination.close()


def _step(advance: Advance, result: Restored, count: int) -> None:
    trio.from_thread.check_cancelled()
    advance(count, result.files)


def _where(entry: Entry, name: bytes, place: Path) -> tuple[Path, bytes]:
    """The destination, and the path from there to what is restored."""
    if entry.is_directory:
        return place, b""
    return (place, name) if place.is_dir() else (place.parent, os.fsencode(place.name))


async def pack(node: ContentsNode, out: IO[bytes], form: str, options: Options, advance: Advance) -> Packing:
    """Writes an archive of `form`, tar or zip. Raises what reading raises, and OutputError."""
    from pbsfs.tasks.pack import Packing, write_zip  # noqa: PLC0415 - slow to import, and to restore needs none
    from pbsfs.tasks.tar import write_tar  # noqa: PLC0415

    entry = await node.learn()
    opened = await node.inside.open()
    result = Restored()
    skips = options.on_damage.zero or options.on_damage.skip
    write = write_tar if form == "tar" else write_zip
    with opened.streams() as streams:
        node.tree.reader.store.serve_copy(len(streams))
        step = functools.partial(_step, advance, result)
        packing = Packing(opened.contents, streams, options.selection, skips, step, result)
        # Writing to a pipe may block for ever: then the thread is left behind when the user gives up.
        await opened.run(functools.partial(write, packing, entry, out), abandon=True)
    return packing
