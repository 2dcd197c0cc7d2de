"""The extension beside pyfuse3: what is said where the two do not meet."""

from __future__ import annotations

import pbsfs.fuse.shim  # noqa: F401 - before pyfuse3, see there

import os
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pyfuse3
import pytest

from pbsfs.base.errors import MountError
from pbsfs.fuse import session, shim
from pbsfs.fuse.notices import Notices
from tests.support.program import error_of, run
from tests.support.stocked import stock

MAPS = """\
7f01-7f02 r-xp 00000000 fe:00 12 /usr/lib/x86_64-linux-gnu/libc.so.6
7f03-7f04 r-xp 00000000 fe:00 13 /usr/lib/x86_64-linux-gnu/libfuse3.so.3.14.0
7f04-7f05 rw-p 00000000 fe:00 13 /usr/lib/x86_64-linux-gnu/libfuse3.so.3.14.0
7f06-7f07 rw-p 00000000 00:00 0
7f08-7f09 r-xp 00000000 fe:00 14 /opt/a b/pyfuse3.libs/libfuse3-1234abcd.so.3.17.1
7f10-7f11 r-xp 00000000 fe:00 15 /home/libfuse3/other.so
"""


def session_of_nobody() -> AbstractContextManager[None]:
    return session.mounted(pyfuse3.Operations(), Notices(), Path("/nowhere"), frozenset(), "source")


def mount_by(monkeypatch: pytest.MonkeyPatch, init: Any) -> list[str]:
    """Mounts with `init` in the place of pyfuse3's; what is done while it is mounted and after."""
    done: list[str] = []
    monkeypatch.setattr(pyfuse3, "init", init)
    monkeypatch.setattr(pyfuse3, "close", lambda *, unmount: done.append(f"unmount: {unmount}"))
    with session_of_nobody():
        done.append("mounted")
    return done


def test_two_libraries_are_told_from_one() -> None:
    system = "/usr/lib/x86_64-linux-gnu/libfuse3.so.3.14.0"
    assert shim._libfuses(MAPS.splitlines(keepends=True)[:4]) == [system]
    other = "/opt/a b/pyfuse3.libs/libfuse3-1234abcd.so.3.17.1"
    assert shim._libfuses(MAPS.splitlines(keepends=True)) == [other, system]


def test_this_process_has_one() -> None:
    shim.check_libfuse()


def test_another_libfuse_is_refused_before_anything_is_mounted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shim, "_libfuses", lambda _maps: ["/a/libfuse3.so.3", "/b/libfuse3.so.4"])
    with pytest.raises(MountError, match=r"^cannot mount on /nowhere: .*/a/libfuse3\.so\.3, /b/.*pip"):
        mount_by(monkeypatch, lambda *_: pytest.fail("mounted"))


def test_a_session_before_there_is_one_is_an_error_and_no_crash() -> None:
    code = (
        "import pbsfs.fuse.shim as shim\ntry: shim.session_fd()\nexcept RuntimeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("pyfuse3 did not call the extension of pbsfs; ")


def test_a_session_that_was_made_past_the_extension_is_refused_and_unmounted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[bool] = []
    monkeypatch.setattr(pyfuse3, "init", lambda *_: None)
    monkeypatch.setattr(pyfuse3, "close", lambda *, unmount: done.append(unmount))
    with (
        pytest.raises(MountError, match="did not call the extension"),
        session_of_nobody(),
    ):
        pytest.fail("served")
    assert done == [True]


def test_what_libfuse_says_of_a_mount_that_works_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    def init(_operations: object, _place: str, _flags: set[str]) -> None:
        os.write(2, b"fuse: warning: library too old\nfusermount3: \xff\n")

    monkeypatch.setattr(shim, "session_fd", lambda: 0)
    assert mount_by(monkeypatch, init) == ["mounted", "unmount: True"]
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "/nowhere: fuse: warning: library too old"),
        ("WARNING", "/nowhere: fusermount3: \N{REPLACEMENT CHARACTER}"),
    ]
    assert capfd.readouterr().err == ""
    caplog.clear()
    os.write(2, b"restored")
    assert capfd.readouterr().err == "restored"


def test_what_libfuse_says_of_a_mount_that_fails_is_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(_operations: object, _place: str, _flags: set[str]) -> None:
        os.write(2, b"a hint\nfusermount3: no permission\n")
        raise RuntimeError("fuse_session_mount failed")

    with pytest.raises(MountError, match=r"^cannot mount on /nowhere: fusermount3: no permission$"):
        mount_by(monkeypatch, init)


def test_a_missing_libfuse_is_one_line_that_says_what_to_install(tmp_path: Path) -> None:
    program = """
import sys
class WithoutLibfuse:
    def find_spec(self, name, path=None, target=None):
        if name == "pbsfs.fuse._shim":
            raise ImportError("libfuse3.so.3: cannot open shared object file: No such file or directory")
sys.meta_path.insert(0, WithoutLibfuse())
from pbsfs.cli import main
main()
"""
    stock(tmp_path / "datastore")
    (tmp_path / "m").mkdir()
    command = ["mount", "--foreground", "--datastore-dir", tmp_path / "datastore", tmp_path / "m"]
    done = run([sys.executable, "-c", program, *map(str, command)])
    assert error_of(done, 7) == (
        "cannot load libfuse 3: libfuse3.so.3: cannot open shared object file: No such file or directory; "
        "apt install fuse3, or, if pbsfs was built on another system, install it again"
    )
