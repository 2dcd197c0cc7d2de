"""The units in packaging/systemd: systemd accepts them, and they stay as closed as a FUSE mount allows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.needs import need
from tests.support.program import PBSFS, output_of, run

UNITS = Path(__file__).parents[1] / "packaging" / "systemd"


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units for a profile, of the program that is installed here."""
    for unit in UNITS.glob("*@.*"):
        text = unit.read_text().replace("/usr/bin/pbsfs", PBSFS).replace("User=pbsfs", "User=daemon")
        (tmp_path / unit.name.replace("@", "@home")).write_text(text)
    return tmp_path


@pytest.mark.parametrize("name", ["pbsfs@home.service", "pbsfs-nbd@home.socket", "pbsfs-nbd@home.service"])
def test_systemd_accepts_the_unit(units: Path, name: str) -> None:
    need("systemd-analyze")
    done = run(["systemd-analyze", "verify", "--man=no", units / name])
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("name", "most"), [("pbsfs@home.service", 2.0), ("pbsfs-nbd@home.service", 1.5)])
def test_the_service_is_hardened(units: Path, name: str, most: float) -> None:
    need("systemd-analyze")
    text = output_of("systemd-analyze", "security", "--offline=yes", "--no-pager", units / name)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", text)
    assert found is not None
    assert float(found[1]) <= most


def test_a_program_that_waits_is_visible_to_the_service() -> None:
    """Else every signal would end its read, not only one that ends the program."""
    settings = {line.partition("=")[0] for line in (UNITS / "pbsfs@.service").read_text().splitlines()}
    assert not settings & {"ProtectProc", "ProcSubset"}


def test_the_user_is_made_by_sysusers(tmp_path: Path) -> None:
    need("systemd-sysusers")
    (tmp_path / "etc").mkdir()
    output_of("systemd-sysusers", f"--root={tmp_path}", UNITS / "pbsfs.sysusers")
    assert "pbsfs:" in (tmp_path / "etc/passwd").read_text()
