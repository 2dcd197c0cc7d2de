"""scripts/setup, on machines where packages are missing; and that one list has all packages."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
SETUP = CHECKOUT / "scripts" / "setup"


BY_HAND = {"clamav", "libguestfs-tools"}
"""Large packages of guides whose commands no test runs."""


class Machine:
    """A machine whose only programs are those that a test puts there. No package is installed."""

    def __init__(self, folder: Path) -> None:
        self.programs = folder / "bin"
        self.programs.mkdir()
        for name in ("dirname", "env", "mktemp", "cat", "rm"):
            found = shutil.which(name)
            assert found is not None
            (self.programs / name).symlink_to(found)
        self.put("dpkg-query", "exit 1")
        self.put("apt-get", 'echo "noise of $1"; test "$1" = update || exit 100')

    def put(self, name: str, script: str) -> None:
        (path := self.programs / name).write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def set_up(self, user: int, what: str = "run") -> subprocess.CompletedProcess[str]:
        self.put("id", f"echo {user}")
        return subprocess.run(
            ["/bin/sh", SETUP, what],
            env={"PATH": str(self.programs)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def check_that_root_is_told_what_to_run(done: subprocess.CompletedProcess[str], why: str) -> None:
    assert done.returncode == 1
    *_, reason, command = done.stderr.splitlines()
    assert why in reason
    assert command.startswith("  apt-get update && apt-get install --yes --no-install-recommends ")
    assert {"fuse3", "libfuse3-dev", "python3-venv", "nbdkit", "jq"} <= set(command.split())


def test_without_sudo_a_user_learns_what_root_has_to_run(machine: Machine) -> None:
    check_that_root_is_told_what_to_run(machine.set_up(1000, "dev"), "there is no sudo")


def test_a_user_whom_sudo_refuses_learns_it_too(machine: Machine) -> None:
    machine.put("sudo", "echo 'anna is not in the sudoers file.' >&2; exit 1")
    done = machine.set_up(1000, "dev")
    assert "not in the sudoers file" in done.stderr
    check_that_root_is_told_what_to_run(done, "sudo does not let you")


@pytest.mark.parametrize("user", [0, 1000])
def test_of_apt_only_what_failed_is_shown(machine: Machine, user: int) -> None:
    machine.put("sudo", 'exec "$@"')
    machine.put("true", "")
    done = machine.set_up(user)
    assert done.returncode == 1
    assert done.stdout.startswith("setup: installing with apt: ")
    assert "noise of update" not in done.stdout + done.stderr
    assert done.stderr == (
        "noise of install\nsetup: apt-get install ended with status 100; what it wrote is above\n"
    )


def test_packages_that_are_named_anywhere_are_those_that_setup_installs() -> None:
    installed = set(
        re.findall(r"[a-z][a-z0-9.+-]+", "".join(re.findall(r'packages="(.*)"', SETUP.read_text())))
    )
    places = [CHECKOUT / "README.md", *CHECKOUT.glob("docs/**/*.md"), *CHECKOUT.glob("pbsfs/**/*.py")]
    named = {
        package
        for place in places
        for found in re.findall(r"apt(?:-get)? install ([a-z0-9 +.-]+)", place.read_text())
        for package in found.split()
        if not package.startswith(("-", "."))  # options, and files
    }
    assert {"nbdkit", "qemu-utils", "ovmf"} <= named
    assert named - BY_HAND <= installed, named - BY_HAND - installed
