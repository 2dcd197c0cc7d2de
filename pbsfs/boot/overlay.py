"""Where the guest's writes go: an overlay on each image, discarded by QEMU or kept in qcow2 files.

Used by `pbsfs boot`; synchronous. QEMU and qemu-img reach the images themselves by NBD.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pbsfs.base.errors import OutputError, UsageError
from pbsfs.boot.qemu import escaped


class Drives:
    """The drives of one machine, in the words of QEMU's `-drive`."""

    def __init__(self, uri: Callable[[str], str], first: str, keep: Path | None) -> None:
        """`uri`: of the image `drive-scsi0.img` and so on. `keep`: the overlay of the image `first`; the
        overlays of the other images are beside it. None: QEMU discards the writes.
        """
        self._uri = uri
        self._first = first
        # QEMU takes what comes before a colon for a protocol, unless there is a slash in it.
        self._keep = None if keep is None else Path(os.path.abspath(keep))
        self._new: list[Path] = []  # overlays to remove if the machine never runs

    def of_disk(self, disk: str) -> list[str]:
        """The drive of the disk `scsi0` and so on. Raises OutputError, UsageError."""
        return self.of_image(f"drive-{disk}.img")

    def of_image(self, image: str) -> list[str]:
        """The drive of an image of the backup. Raises OutputError, UsageError."""
        uri = self._uri(image)
        if self._keep is None:
            return [f"file={escaped(uri)}", "format=raw", "snapshot=on"]
        overlay = self._keep
        if image != self._first:
            overlay = overlay.with_name(f"{overlay.stem}-{image.removesuffix('.img')}{overlay.suffix}")
        if _prepare(overlay, uri):
            self._new.append(overlay)
        return [f"file={escaped(str(overlay))}", "format=qcow2"]

    def keep_new(self) -> None:
        """The machine runs: its new overlays are kept."""
        self._new.clear()

    def remove_new(self) -> None:
        """Removes the new overlays of a machine that never ran."""
        for overlay in self._new:
            overlay.unlink(missing_ok=True)


def _prepare(overlay: Path, uri: str) -> bool:
    """Creates `overlay` on the image at `uri`, or checks that an existing one is an overlay of that image.

    Returns whether it is new.
    """
    try:
        found = overlay.exists()
    except OSError as error:
        raise OutputError(f"--keep {overlay}: {error.strerror}") from None
    if not found:
        if not os.access(overlay.parent, os.W_OK | os.X_OK):
            why = "is not writable" if overlay.parent.is_dir() else "is not a directory"
            raise OutputError(f"--keep {overlay}: {overlay.parent} {why}; name a file in another directory")
        _qemu_img(overlay, "create", "-q", "-f", "qcow2", "-F", "raw", "-b", uri, str(overlay))
        return True
    shown = json.loads(_qemu_img(overlay, "info", "--output=json", "-f", "qcow2", str(overlay)))
    before = shown.get("full-backing-filename") or shown.get("backing-filename") or ""
    if unquote(urlsplit(before).path) != unquote(urlsplit(uri).path):
        of = unquote(urlsplit(before).path).strip("/") or "something else"
        raise UsageError(
            f"--keep {overlay}: is an overlay of {of}, not of this backup; boot that, or name another file"
        )
    # The same image, at the socket that serves it this time.
    _qemu_img(overlay, "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", uri, str(overlay))
    return False


def _qemu_img(overlay: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["qemu-img", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise OutputError(f"--keep {overlay}: {said[-1] if said else 'qemu-img failed'}")
    return done.stdout
