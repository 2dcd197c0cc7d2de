"""Forms of disk images other than raw, by the bytes that they begin with.

A restore in place compares a raw image with its target, byte by byte. A target of another form has such a
disk inside, and would be destroyed. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

HEAD = 512
"""Bytes of a file that `form_of` needs."""


@dataclass(frozen=True, slots=True)
class Form:
    """`name`: as QEMU and users have it. `access`: how users get at the disk inside."""

    name: str
    offset: int
    magic: bytes
    access: str


_CONNECT = "connect it with qemu-nbd, and name that device"

FORMS = (
    Form("qcow2", 0, b"QFI\xfb", _CONNECT),  # QEMU's docs/interop/qcow2.txt, "Header"
    Form("VMDK", 0, b"KDMV", _CONNECT),  # VMware, Virtual Disk Format 5.0: SparseExtentHeader
    Form("VMDK", 0, b"COWD", _CONNECT),  # the same: COWDisk_Header
    Form("VMDK", 0, b"# Disk DescriptorFile", _CONNECT),  # the same: the descriptor
    Form("VDI", 64, b"\x7f\x10\xda\xbe", _CONNECT),  # VirtualBox: VDI_IMAGE_SIGNATURE in VDIPREHEADER
    Form("VHDX", 0, b"vhdxfile", _CONNECT),  # MS-VHDX 2.2.1: File Type Identifier
    Form("VHD", 0, b"conectix", _CONNECT),  # Virtual Hard Disk Image Format: the copy of the footer
    Form("QED", 0, b"QED\0", _CONNECT),  # QEMU's docs/interop/qed_spec.txt
    # LUKS1 and LUKS2 On-Disk Format: the magic of the first header
    Form("LUKS", 0, b"LUKS\xba\xbe", "open it with cryptsetup, and name that device"),
)


def form_of(head: bytes) -> Form | None:
    """The form of a file that begins with `head` (`HEAD` bytes, or all that it has); None for a raw image."""
    return next((form for form in FORMS if head.startswith(form.magic, form.offset)), None)
