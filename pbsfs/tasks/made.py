"""A directory to copy to, which does not stay behind where nothing is copied.

Used by the copies of images and the restores of files; synchronous.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pbsfs.base.errors import OutputError
from pbsfs.tasks.image.refusals import refusal


@contextmanager
def made_directory(place: Path, mode: int = 0o777) -> Iterator[None]:
    """Makes a directory, unless there is one. Removes it again if the context fails and it is empty.

    Raises OutputError, also where the name is taken by something else.
    """
    is_new = True
    try:
        place.mkdir(mode)
    except FileExistsError:
        if not place.is_dir():
            error = NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            raise OutputError(refusal(place, error)) from None
        is_new = False
    except OSError as error:
        raise OutputError(refusal(place, error)) from None
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):  # not empty
                place.rmdir()
        raise
