"""The map of a copy: which of its ranges are good and which are zeros instead of damaged data.

A map file of GNU ddrescue (its manual, "Mapfile structure"), so that ddrescue can fill the ranges from
another copy. Called by `pbsfs export --on-damage zero`; synchronous.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from pbsfs.base.errors import OutputError
from pbsfs.reader.damage import Range
from pbsfs.tasks.image.refusals import exists, refusal, refuse_existing
from pbsfs.tasks.image.target import Target


def check_map_file(path: Path, target: Target, *, force: bool) -> None:
    """Raises OutputError if `write_map` could not write `path`: before a copy that may take hours."""
    if os.path.realpath(path) == os.path.realpath(str(target)):
        raise OutputError(f"{path} can't be both the copy and its map; name another file for the map")
    if not force:
        refuse_existing(path)
    place = path
    try:
        os.stat(path)
    except FileNotFoundError:
        place = path.parent
    except OSError as error:
        raise OutputError(refusal(path, error)) from None
    if not os.access(place, os.W_OK):
        reason = errno.EACCES if os.path.isdir(path.parent) else errno.ENOENT
        raise OutputError(refusal(path, OSError(reason, os.strerror(reason))))


def write_map(path: Path, size: int, zeros: list[Range], *, force: bool) -> None:
    """Writes the map of a copy of `size` bytes. `zeros`: the damaged ranges, in order. Raises OutputError."""
    lines = ["# Mapfile. Written by pbsfs", "# current_pos  current_status  current_pass"]
    lines += [f"0x{size:08X}     +               1", "#      pos        size  status"]
    done = 0
    for zero in [*zeros, Range(size, 0)]:
        if zero.offset > done:
            lines.append(f"0x{done:08X}  0x{zero.offset - done:08X}  +")
        if zero.length:
            lines.append(f"0x{zero.offset:08X}  0x{zero.length:08X}  -")
        done = zero.offset + zero.length
    try:
        with open(path, "w" if force else "x", encoding="ascii") as file:
            file.write("\n".join(lines) + "\n")
    except FileExistsError:
        raise OutputError(exists(path)) from None
    except OSError as error:
        raise OutputError(refusal(path, error)) from None
