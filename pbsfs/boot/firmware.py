"""UEFI firmware for QEMU: the installed files, and the variable store that goes with them.

Used by `pbsfs boot`; synchronous.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from pbsfs.base.errors import HelperError
from pbsfs.boot.machine import LARGE_EFI_VARIABLES, SMALL_EFI_VARIABLES
from pbsfs.boot.qemu import escaped

FOLDERS = (Path("/usr/share/OVMF"), Path("/usr/share/edk2/x64"), Path("/usr/share/edk2/ovmf"))
"""Where distributions install the files of the OVMF project."""

_FILES = {LARGE_EFI_VARIABLES: "OVMF_{}_4M.fd", SMALL_EFI_VARIABLES: "OVMF_{}.fd"}
"""By the size of the variable store: it fits no other firmware."""


def fits(variables: int) -> bool:
    """Whether there is firmware for a variable store of so many bytes."""
    return variables in _FILES


def uefi_arguments(
    variables: int,
    stored: Callable[[], Sequence[str]],
    directory: Path,
    folders: Sequence[Path] = FOLDERS,
) -> list[str]:
    """QEMU's arguments for the firmware and its variables: those of the backup, or new ones in `directory`.

    `variables`: bytes of the variable store in the backup, 0 for none. `stored`: its drive, in the words of
    `-drive`; called if the store fits. Raises HelperError if the firmware is not installed.
    """
    pattern = _FILES.get(variables, _FILES[LARGE_EFI_VARIABLES])
    code, template = pattern.format("CODE"), pattern.format("VARS")
    folder = next((f for f in folders if (f / code).exists() and (f / template).exists()), None)
    if folder is None:
        raise HelperError(
            f"the machine needs UEFI firmware ({code}): apt install ovmf; or try --firmware bios"
        )
    arguments = ["-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={escaped(str(folder / code))}"]
    if fits(variables):
        return [*arguments, "-drive", ",".join(["if=pflash,unit=1", *stored()])]
    fresh = directory / "variables.fd"
    shutil.copyfile(folder / template, fresh)
    return [*arguments, "-drive", f"if=pflash,unit=1,format=raw,file={escaped(str(fresh))}"]
