"""The cache on disk as options name it, and what `config check` says of one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pbsfs.access.caching import CacheAccess, look_at
from pbsfs.sources.cached.files import Kind, Name
from pbsfs.sources.cached.store import DiskCache


def test_a_cache_that_can_be_used_is_said_with_what_it_holds(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "c", 64 << 20)
    cache.prepare()
    cache.put(Name(bytes(32), Kind.CHUNK), bytes(1 << 20))
    text, is_warning = look_at(CacheAccess(tmp_path / "c", 64 << 20))
    assert (text, is_warning) == (f"{tmp_path}/c: 1.0 MiB of 64 MiB used", False)


def test_one_that_cannot_be_made_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    text, is_warning = look_at(CacheAccess(tmp_path / "file/c", 64 << 20))
    assert is_warning
    assert text == f"{tmp_path}/file/c: Not a directory; pbsfs reads without it until that is repaired"


def test_one_that_may_only_be_read_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_args: False)
    text, is_warning = look_at(CacheAccess(tmp_path / "c", 64 << 20))
    assert is_warning
    assert text == f"{tmp_path}/c: this user may only read it; nothing more is kept there"


def test_one_that_is_larger_than_its_disk_is_a_warning(tmp_path: Path) -> None:
    text, is_warning = look_at(CacheAccess(tmp_path / "c", 1 << 60))
    assert is_warning
    assert "; its disk has only " in text


@pytest.mark.parametrize("offline", [True, False])
def test_the_inverse_of_dump_is_load(offline: bool) -> None:
    access = CacheAccess(Path("/c"), 5, offline)
    assert CacheAccess.load(access.dump()) == access
