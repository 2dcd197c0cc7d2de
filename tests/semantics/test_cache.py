"""What docs/semantics.md promises of a cache on disk: a test for each promise, by its name."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.mounts import fails_with, mounted
from tests.support.nbd import nbdkit
from tests.support.needs import need_root
from tests.support.program import PBSFS, environment, output_of
from tests.support.server import ReferenceServer
from tests.support.serving import access, serving
from tests.support.stocked import CONFIGURATION, FIRST, IMAGE, NEWER_IMAGE, Stocked
from tests.support.waiting import wait_until

pytestmark = pytest.mark.mount

CHUNK_REQUEST = "/chunk?digest="


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("pbsfs-1/??/*"))


def test_what_is_cached_is_fetched_once(server: ReferenceServer, own: Stocked, tmp_path: Path) -> None:
    env = access(server, PBSFS_CACHE_DIR=str(tmp_path / "cache"))
    with mounted(env, tmp_path / "first") as mount:
        assert (mount / IMAGE).read_bytes() == own.contents[IMAGE]
    fetched = server.requests.count(CHUNK_REQUEST)
    sessions = server.requests.count("/reader")
    assert fetched > 1
    with mounted(env, tmp_path / "second") as mount, nbdkit(env, f"path={IMAGE}") as nbd:
        assert (mount / IMAGE).read_bytes() == own.contents[IMAGE]
        assert nbd.read() == own.contents[IMAGE]
    output_of(PBSFS, "export", IMAGE, tmp_path / "copy", env=env)
    assert server.requests.count(CHUNK_REQUEST) == fetched
    assert server.requests.count("/reader") == sessions


def linked(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


WRONG: dict[str, Callable[[Path], object]] = {
    "other": lambda path: path.write_bytes(b"other" * 100),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "link": linked,
}


@pytest.mark.parametrize("how", WRONG)
def test_a_cache_on_disk_is_never_believed(
    server: ReferenceServer, own: Stocked, tmp_path: Path, how: str
) -> None:
    env = access(server, PBSFS_CACHE_DIR=str(tmp_path / "cache"))
    with mounted(env, tmp_path / "m") as mount:
        assert (mount / IMAGE).read_bytes() == own.contents[IMAGE]
        assert (mount / CONFIGURATION).read_bytes() == own.contents[CONFIGURATION]
    wrong = entries(tmp_path / "cache")
    for path in wrong:
        WRONG[how](path)
    with mounted(env, tmp_path / "m2") as mount:
        assert (mount / IMAGE).read_bytes() == own.contents[IMAGE]
        assert (mount / CONFIGURATION).read_bytes() == own.contents[CONFIGURATION]
    server.requests.clear()
    output_of(PBSFS, "export", IMAGE, tmp_path / "copy", env=env)
    assert server.requests.count(CHUNK_REQUEST) == 0  # they were replaced


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    need_root("mount")
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k,mode=0700", "pbsfs-test", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.root
def test_a_cache_whose_disk_is_full_is_no_error(
    server: ReferenceServer, own: Stocked, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "cache") as cache:
        (cache / "of-others").write_bytes(bytes(124 << 10))
        env = access(server, PBSFS_CACHE_DIR=str(cache))
        with mounted(env, tmp_path / "m") as mount:
            assert (mount / IMAGE).read_bytes() == own.contents[IMAGE]
            assert (mount / NEWER_IMAGE).read_bytes() == own.contents[NEWER_IMAGE]
            wait_until(lambda: bool(mount.log_lines()), "the log says why")
            (line,) = mount.log_lines()
            assert f"cache {cache}: nothing is kept for now: the disk is almost full; " in line
        with mounted(env, tmp_path / "m2") as mount:
            assert (mount / IMAGE).read_bytes() == own.contents[IMAGE]
            mount.log_lines()
        assert not [path for path in entries(cache) if path.suffix == ".new"]


def test_offline_what_is_cached_is_read_without_the_source(own: Stocked, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with serving(own.path) as server:
        env = access(server, PBSFS_CACHE_DIR=str(cache))
        output_of(PBSFS, "cache", "warm", FIRST, env=env)
        repository = env["PBS_REPOSITORY"]
    alone = environment(PBSFS_CACHE_DIR=str(cache), PBS_REPOSITORY=repository)
    with mounted(alone, tmp_path / "m", "--offline") as mount:
        assert (mount / IMAGE).read_bytes() == own.contents[IMAGE]
        assert (mount / CONFIGURATION).read_bytes() == own.contents[CONFIGURATION]
        assert fails_with(5, (mount / NEWER_IMAGE).read_bytes)
        assert any("read it once without --offline" in line for line in mount.log_lines())
