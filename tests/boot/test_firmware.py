"""UEFI firmware: which files, and what is used as its variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from pbsfs.base.errors import HelperError, exit_status_of
from pbsfs.boot.firmware import fits, uefi_arguments
from pbsfs.boot.machine import LARGE_EFI_VARIABLES, SMALL_EFI_VARIABLES


def never() -> list[str]:
    raise AssertionError("the variables of the backup are not used")


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two folders: the first has no firmware, the second has both kinds."""
    for name in ("a", "b,c"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "OVMF_CODE_4M.fd").write_bytes(b"code without variables")
    for kind in ("", "_4M"):
        for part in ("CODE", "VARS"):
            (tmp_path / "b,c" / f"OVMF_{part}{kind}.fd").write_bytes(f"{part}{kind}".encode())
    return [tmp_path / "a", tmp_path / "b,c"]


@pytest.mark.parametrize(("size", "kind"), [(LARGE_EFI_VARIABLES, "_4M"), (SMALL_EFI_VARIABLES, "")])
def test_variables_of_the_backup_go_with_their_firmware(
    folders: list[Path], tmp_path: Path, size: int, kind: str
) -> None:
    assert fits(size)
    code = str(folders[1] / f"OVMF_CODE{kind}.fd").replace(",", ",,")
    assert uefi_arguments(size, lambda: ["file=stored", "format=raw"], tmp_path, folders) == [
        *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={code}"),
        *("-drive", "if=pflash,unit=1,file=stored,format=raw"),
    ]


@pytest.mark.parametrize("size", [0, 4096])
def test_without_variables_that_fit_there_are_new_ones(
    folders: list[Path], tmp_path: Path, size: int
) -> None:
    assert not fits(size)
    *_, last = uefi_arguments(size, never, tmp_path, folders)
    assert last == f"if=pflash,unit=1,format=raw,file={tmp_path}/variables.fd"
    assert (tmp_path / "variables.fd").read_bytes() == b"VARS_4M"
    assert (folders[1] / "OVMF_VARS_4M.fd").read_bytes() == b"VARS_4M"


@pytest.mark.parametrize(
    ("size", "name"), [(0, "OVMF_CODE_4M.fd"), (1, "OVMF_CODE_4M.fd"), (SMALL_EFI_VARIABLES, "OVMF_CODE.fd")]
)
def test_without_firmware_for_uefi_it_says_what_to_install(
    folders: list[Path], tmp_path: Path, size: int, name: str
) -> None:
    with pytest.raises(HelperError) as caught:
        uefi_arguments(size, never, tmp_path, folders[:1])
    assert str(caught.value) == (
        f"the machine needs UEFI firmware ({name}): apt install ovmf; or try --firmware bios"
    )
    assert exit_status_of(caught.value) == 9
