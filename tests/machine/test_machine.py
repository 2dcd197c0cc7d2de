"""What the machine reports; and with `PBSFS_MACHINE=PACKAGE`, all that it checks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine import base
from tests.machine.__main__ import check, default_cache
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
