"""Places of the user's: those of the XDG base directory specification, and what is temporary."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from pbsfs.base.errors import HelperError
from pbsfs.runtime.places import MAX_PRIVATE_PATH, config_home, private_directory, state_home


def test_settings_lie_where_the_environment_says_or_in_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config_home({"XDG_CONFIG_HOME": "/c", "HOME": "/h"}) == Path("/c")
    assert config_home({"XDG_CONFIG_HOME": "relative", "HOME": "/h"}) == Path("/h/.config")
    assert config_home({}) == Path(pwd.getpwuid(os.getuid()).pw_dir) / ".config"

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert config_home({}) is None
    assert config_home({"HOME": ""}) is None
    assert state_home({}) is None


def test_a_home_that_does_not_exist_is_not_made(tmp_path: Path) -> None:
    assert state_home({"HOME": str(tmp_path / "none")}) is None
    assert state_home({"HOME": str(tmp_path)}) == tmp_path / ".local" / "state"
    assert state_home({"HOME": "/nowhere", "XDG_STATE_HOME": "/s"}) == Path("/s")


def test_a_private_directory_is_this_users_alone_and_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (short := Path(f"/tmp/pbsfs-test-{os.getpid()}")).mkdir()
    try:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
        with private_directory() as found:
            assert found.parent == short
            assert found.stat().st_mode & 0o777 == 0o700
            (found / "something").touch()
        assert not list(short.iterdir())
    finally:
        short.rmdir()


def test_places_that_are_relative_missing_or_too_long_for_a_socket_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (long := tmp_path / ("x" * MAX_PRIVATE_PATH)).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    monkeypatch.setenv("TMPDIR", str(long))
    with private_directory() as found:
        assert len(os.fsencode(found)) <= MAX_PRIVATE_PATH
    assert list(tmp_path.iterdir()) == [long]
    assert not list(long.iterdir())


def test_without_any_place_it_is_said_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_options: object) -> str:
        raise PermissionError(13, "no")

    monkeypatch.setattr("tempfile.mkdtemp", refused)
    monkeypatch.setenv("TMPDIR", "/here")
    with pytest.raises(HelperError, match=r"cannot write to .*/here, /tmp, /run, /dev/shm; set TMPDIR"):
        private_directory().__enter__()
