"""What the machine reports; and with `PBSFS_MACHINE=PACKAGE`, all that it checks."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine import base
from tests.machine.__main__ import GUEST, check, default_cache
from tests.machine.base import MachineError, base_of, release_of
from tests.machine.machine import SHUTDOWN_LIMIT, Result, results
from tests.support import golden
from tests.support.needs import need
from tests.support.truth import FILES

PACKAGE = os.environ.get("PBSFS_MACHINE")


def reported(*script: tuple[float, str]) -> tuple[list[Result], bool]:
    """The results of lines that each come at a second, and whether the machine boots again."""
    now = 0.0

    def lines() -> Iterator[str]:
        nonlocal now
        for second, line in script:
            now = second
            if line:
                yield f"{line}\r\n"

    found = []
    running = results(lines(), lambda: now)
    while True:
        try:
            found.append(next(running))
        except StopIteration as ended:
            return found, ended.value


def test_each_check_is_a_result_with_what_it_printed() -> None:
    assert reported(
        *((2, "begin mount"), (5, "pass mount")),
        *((5, "begin nbd"), (6, "| no such device"), (6, "| status 1"), (7, "fail nbd")),
        *((8, "reboot busy"), (20, "")),
    ) == (
        [
            Result("mount", True, 3),
            Result("nbd", False, 2, ["no such device", "status 1"]),
            Result("busy", True, 12),
        ],
        True,
    )


def test_it_does_not_boot_again_after_it_was_switched_off() -> None:
    assert reported((8, "poweroff off"), (20, "")) == ([Result("off", True, 12)], False)


def test_going_down_for_too_long_is_a_failure() -> None:
    found, _again = reported((2, "reboot busy"), (3 + SHUTDOWN_LIMIT, ""))
    assert [result.passed for result in found] == [False]


def test_a_machine_that_ends_too_early_is_an_error() -> None:
    with pytest.raises(MachineError, match="ended before its checks did; the last one was nbd"):
        reported((2, "begin mount"), (3, "pass mount"), (4, "begin nbd"))


@pytest.mark.parametrize(
    ("version", "release"),
    [("1.0+deb12", "bookworm"), ("1.0~rc1+deb13", "trixie"), ("1.0+ubuntu24.04", None)],
)
def test_the_package_says_which_release_it_is_for(
    monkeypatch: pytest.MonkeyPatch, version: str, release: str | None
) -> None:
    monkeypatch.setattr(base, "output_of", lambda *_command: f"{version}\n")
    if release is None:
        with pytest.raises(MachineError, match="is not for Debian 12 or 13"):
            release_of(Path("pbsfs.deb"))
    else:
        assert release_of(Path("pbsfs.deb")) == release


def test_only_root_can_make_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(MachineError, match="only root can make it"):
        base_of("bookworm", tmp_path)


def test_each_check_belongs_to_a_boot() -> None:
    topics = "".join(topic.read_text() for topic in sorted((GUEST / "topics").glob("*.sh")))
    program = (GUEST / "checks").read_text()
    listed = " ".join(re.findall(r'_boot\+?="([^"]*)"', program)).split()
    assert sorted(listed) == sorted(re.findall(r"^check_(\w+)\(\)", topics, re.MULTILINE))


PROGRAM = """
import signal
from pathlib import Path
from tests.machine import __main__ as machine
from tests.machine.base import Base

machine.base_of = lambda release, cache: Base(cache)
machine.release_of = lambda package: "bookworm"
machine.make_disks = lambda work: [Path("/dev/null")]
machine.make_datastore = lambda place, disks: place.mkdir(parents=True)
signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal
machine.main()
"""
"""The program, with a base that does not exist, and an empty datastore."""

QEMU = """#!/bin/sh
echo $$ >"$0.pid"
echo pass start
exec sleep 600
"""


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name
)
def test_the_machine_ends_with_the_program(tmp_path: Path, number: signal.Signals) -> None:
    need("mke2fs", "setpriv")
    programs, cache, package = tmp_path / "bin", tmp_path / "cache", tmp_path / "pbsfs.deb"
    programs.mkdir()
    cache.mkdir()
    package.touch()
    for name, text in (("qemu-system-x86_64", QEMU), ("qemu-img", "#!/bin/sh\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "--cache", cache, package],
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as program:
        try:
            assert program.stdout is not None
            assert program.stdout.readline().startswith("ok     start")
            pid = int((programs / "qemu-system-x86_64.pid").read_text())
            with open(os.pidfd_open(pid)) as qemu:
                try:
                    program.send_signal(number)
                    assert select.select([qemu], [], [], 60)[0]
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(qemu.fileno(), signal.SIGKILL)
            assert program.wait(60) != 0
        finally:
            program.kill()
    if number != signal.SIGKILL:
        assert list(cache.iterdir()) == []


@pytest.mark.long
@pytest.mark.skipif(PACKAGE is None, reason="PBSFS_MACHINE does not name a package (some 20 minutes)")
def test_all_checks_in_the_machine_pass() -> None:
    need("qemu-system-x86_64", "qemu-img", "mke2fs", "dpkg-deb")
    assert PACKAGE is not None
    cache = default_cache()
    found = check(
        Path(PACKAGE),
        cache,
        golden=FILES if golden.is_there() else None,
        console=cache / "console.log",
        patterns=("*",),
        memory=1536,
        limit=3000,
    )
    failed = [result for result in found if not result.passed]
    assert not failed, "\n".join(line for result in failed for line in (result.name, *result.lines))
