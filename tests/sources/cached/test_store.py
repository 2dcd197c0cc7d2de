"""The files of a cache on disk: bounds, what is removed first, hostile entries, kills and full disks."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pbsfs.access.caching import CacheAccess, look_at
from pbsfs.base.errors import SourceError
from pbsfs.sources.cached.files import INNER, CacheFiles, Found, Kind, Name, size_on_disk
from pbsfs.sources.cached.limits import CacheLimits
from pbsfs.sources.cached.store import DiskCache
from pbsfs.sources.cached.usage import Usage

SIZE = 64 << 20
PART = 256 << 10
LIMIT = 1 << 30


def name_of(number: int, kind: Kind = Kind.CHUNK) -> Name:
    return Name(hashlib.sha256(number.to_bytes(8, "big")).digest(), kind)


def content_of(number: int, size: int = PART) -> bytes:
    return random.Random(number).randbytes(size)


def cache_in(directory: Path, size: int = SIZE, limits: CacheLimits | None = None) -> DiskCache:
    cache = DiskCache(directory, size, limits or CacheLimits())
    cache.prepare()
    return cache


def path_of(cache: DiskCache, name: Name) -> Path:
    return cache.directory / INNER / f"{name.shard:02x}" / str(name)


def stored(directory: Path) -> int:
    """Bytes of all files but those that are shared state."""
    return sum(file.lstat().st_size for file in (directory / INNER).glob("??/*"))


def files_in(directory: Path) -> list[Path]:
    return list((directory / INNER).glob("??/*"))


def test_what_is_put_is_there_for_other_processes(tmp_path: Path) -> None:
    cache = cache_in(tmp_path / "c")
    for kind in Kind:
        assert cache.get(name_of(1, kind), LIMIT) is None
        assert cache.put(name_of(1, kind), kind.name.encode())
    other = DiskCache(tmp_path / "c", SIZE)
    assert [other.get(name_of(1, kind), LIMIT) for kind in Kind] == [kind.name.encode() for kind in Kind]
    tag = (tmp_path / "c/CACHEDIR.TAG").read_bytes()
    assert tag.startswith(b"Signature: 8a477f597d28d172789f06886806bc55\n")


def test_the_bound_holds_and_the_least_recently_used_go_first(tmp_path: Path) -> None:
    first, second = cache_in(tmp_path), DiskCache(tmp_path, SIZE)
    count = 2 * SIZE // PART
    for number in range(count):
        cache = first if number % 2 else second
        assert cache.put(name_of(number), content_of(number % 7))
        path = path_of(cache, name_of(number))
        os.utime(path, ns=(number, 10**9 * number))
        if number == 100:
            assert first.get(name_of(0), LIMIT)  # which makes it new
        assert stored(tmp_path) <= SIZE
    there = [number for number in range(count) if path_of(first, name_of(number)).exists()]
    assert there[0] == 0
    assert there[1:] == list(range(there[1], count))  # all of the newest
    assert stored(tmp_path) > SIZE * 0.8


def test_an_entry_that_is_used_again_gets_a_new_time_only_after_a_while(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    cache.put(name_of(1), b"x")
    path = path_of(cache, name_of(1))
    fresh = path.stat().st_mtime_ns
    cache.get(name_of(1), LIMIT)
    assert path.stat().st_mtime_ns == fresh
    os.utime(path, (0, 1000))
    cache.get(name_of(1), LIMIT)
    assert path.stat().st_mtime > fresh / 1e9 - 1


@pytest.mark.parametrize("numbers", [b"\xff" * 2048, b"\0" * 2048, b"\x01", b""])
def test_wrong_numbers_are_corrected(tmp_path: Path, numbers: bytes) -> None:
    cache = cache_in(tmp_path)
    for number in range(40):
        cache.put(name_of(number), content_of(1))
    (tmp_path / INNER / "usage").write_bytes(numbers)
    for number in range(40, 3 * SIZE // PART):
        cache.put(name_of(number), content_of(1))
    assert SIZE / 2 < stored(tmp_path) <= SIZE + (16 << 20)
    cache.contents()
    found = int.from_bytes((tmp_path / INNER / "usage").read_bytes()[:8], "little")
    assert found == sum(file.stat().st_size for file in (tmp_path / INNER / "00").glob("*"))


def test_entries_from_the_future_go_first_until_they_are_used(tmp_path: Path) -> None:
    cache = cache_in(tmp_path / "c")
    late = time.time() + 10**8
    for number in range(20):
        cache.put(name_of(number), content_of(number))
        if number < 10:
            os.utime(path_of(cache, name_of(number)), (late, late))
    assert cache.get(name_of(3), LIMIT) == content_of(3)
    assert path_of(cache, name_of(3)).stat().st_mtime < late - 10**7
    cache.prune(11 * PART)
    assert [number for number in range(20) if cache.get(name_of(number), LIMIT)] == [3, *range(10, 20)]


def test_an_unfinished_file_from_the_future_is_removed(tmp_path: Path) -> None:
    cache = cache_in(tmp_path / "c")
    cache.put(name_of(1), b"x")
    left = Path(f"{path_of(cache, name_of(1))}.01234567.new")
    left.touch()
    os.utime(left, (0, time.time() + 10**8))
    assert cache.contents().counts[Kind.CHUNK] == 1
    assert not left.exists()


def test_more_bytes_than_can_be_counted_are_counted_as_the_most(tmp_path: Path) -> None:
    cache = cache_in(tmp_path / "c")
    usage = Usage(CacheFiles(tmp_path / "c", CacheLimits()))
    usage.add(5, 1 << 64)  # two sparse files, on a file system that has such
    usage.correct(7, 0, 1 << 64)
    assert not usage.add(6, 1, most=SIZE)
    cache.contents()
    assert usage.total() == 0
    assert cache.put(name_of(1), b"x")


def test_a_directory_in_the_place_of_an_unfinished_file_stops_nothing(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    assert cache.put(name_of(1), content_of(1))
    odd = path_of(cache, name_of(1)).with_name(f"{name_of(2)}.0123abcd.new")
    odd.mkdir()
    os.utime(odd, (0, 0))
    assert cache.contents().counts[Kind.CHUNK] >= 1
    assert cache.prune(0) > 0
    assert cache.get(name_of(1), LIMIT) is None


def test_pruning_leaves_the_newest(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    for number in range(20):
        cache.put(name_of(number), content_of(1))
        os.utime(path_of(cache, name_of(number)), (0, 1000 + number))
    assert cache.prune(5 * PART) == 15 * PART
    there = [number for number in range(20) if cache.get(name_of(number), LIMIT) is not None]
    assert there == [*range(15, 20)]
    contents = cache.contents()
    assert (contents.counts[Kind.CHUNK], contents.size) == (5, 5 * PART)
    assert cache.prune(0) == 5 * PART
    assert stored(tmp_path) == 0


# --- other users


@pytest.mark.parametrize("what", ["link", "fifo", "directory", "empty", "large", "device"])
def test_what_else_is_in_the_place_of_an_entry_is_not_used(tmp_path: Path, what: str) -> None:
    cache = cache_in(tmp_path / "c")
    cache.put(name_of(1), b"content")
    path = path_of(cache, name_of(1))
    path.unlink()
    secret = tmp_path / "secret"
    secret.write_bytes(b"content")
    match what:
        case "link":
            path.symlink_to(secret)
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "empty":
            path.touch()
        case "large":
            path.write_bytes(bytes(5000))
        case "device":
            if os.geteuid():
                path.symlink_to("/dev/zero")
            else:
                os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
    if what == "directory":
        assert cache.get(name_of(1), 4096) is None
        with pytest.raises(OSError, match="Is a directory"):
            cache.put(name_of(1), b"anew", replace=True)
        return
    assert cache.get(name_of(1), 4096) is None
    assert not os.path.lexists(path)
    assert secret.read_bytes() == b"content"
    assert cache.put(name_of(1), b"anew")
    assert cache.get(name_of(1), 4096) == b"anew"


@pytest.mark.parametrize("inner", [True, False], ids=["inner", "shard"])
def test_links_instead_of_directories_are_not_followed(tmp_path: Path, inner: bool) -> None:
    other = tmp_path / "other"
    cache = cache_in(tmp_path / "c")
    theirs = cache_in(other)
    theirs.put(name_of(1), b"theirs")
    if inner:
        os.rename(tmp_path / "c" / INNER, tmp_path / "away")
        (tmp_path / "c" / INNER).symlink_to(other / INNER)
    else:
        path_of(cache, name_of(1)).parent.symlink_to(path_of(theirs, name_of(1)).parent)
    before = sorted(other.rglob("*"))
    for work in (
        lambda: cache.put(name_of(1), b"mine", replace=True),
        lambda: cache.drop(name_of(1)),
    ):
        with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
            work()
    assert cache.get(name_of(1), LIMIT) is None
    if inner:
        with pytest.raises(OSError, match="Not a directory"):
            cache.prune(0)
    else:
        assert cache.prune(0) == 0
    assert sorted(other.rglob("*")) == before
    assert theirs.get(name_of(1), LIMIT) == b"theirs"


def test_only_the_owner_gets_access_unless_the_directory_says_so(tmp_path: Path) -> None:
    mask = os.umask(0o077)
    try:
        for mode, folder, file in ((0o700, 0o700, 0o600), (0o2770, 0o2770, 0o660), (0o777, 0o770, 0o660)):
            place = tmp_path / oct(mode)
            place.mkdir()
            place.chmod(mode)
            cache = cache_in(place)
            cache.put(name_of(1), b"x")
            cache.put(name_of(2, Kind.RECORD), b"x")
            assert stat.S_IMODE((place / INNER).stat().st_mode) == folder
            assert stat.S_IMODE(path_of(cache, name_of(1)).parent.stat().st_mode) == folder
            assert stat.S_IMODE(path_of(cache, name_of(1)).stat().st_mode) == file
            assert stat.S_IMODE((place / INNER / "usage").stat().st_mode) == file
            assert stat.S_IMODE(path_of(cache, name_of(2, Kind.RECORD)).stat().st_mode) == file & 0o640
    finally:
        os.umask(mask)
    cache_in(tmp_path / "new")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_only_own_records_are_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_in(tmp_path)
    name = name_of(1, Kind.RECORD)
    cache.put(name, b"x")
    assert cache.get(name, LIMIT, own=True) == b"x"
    path_of(cache, name).chmod(0o660)
    assert cache.get(name, LIMIT, own=True) is None
    path_of(cache, name).chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path_of(cache, name), 12345, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    assert cache.get(name, LIMIT, own=True) is None
    assert cache.get(name, LIMIT) == b"x"


# --- kills and full disks

WRITER = """
import hashlib, random, sys
from pathlib import Path
from pbsfs.sources.cached.files import Kind, Name
from pbsfs.sources.cached.store import DiskCache
from pbsfs.sources.cached.usage import Usage
seed, directory, size = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
source = random.Random(seed)
cache = DiskCache(directory, size)
cache.prepare()
print("begun", flush=True)
while True:
    number = source.randrange(1000)
    data = random.Random(number).randbytes(1 + number * 300)
    name = Name(hashlib.sha256(data).digest(), Kind.CHUNK)
    if source.random() < 0.3:
        found = cache.get(name, 1 << 30)
        assert found in (None, data), "a torn entry was served"
        if source.random() < 0.2:
            cache.drop(name)
    else:
        cache.put(name, data, replace=source.random() < 0.1)
    print(number, flush=True)
"""


def test_a_killed_process_leaves_whole_entries_only(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    size = 8 << 20
    source = random.Random(16)
    for seed in range(1000 if request.config.getoption("--all") else 12):
        words = [sys.executable, "-c", WRITER, str(seed), str(tmp_path), str(size)]
        others = [subprocess.Popen(words, stdout=subprocess.PIPE) for _ in range(1 + seed % 2)]
        for other in others:
            assert other.stdout is not None
            for _ in range(1 + source.randrange(40)):
                assert other.stdout.readline()
            other.send_signal(signal.SIGKILL)
            other.wait()
            other.stdout.close()
        for path in (tmp_path / INNER).glob("??/*"):
            if path.suffix != ".new":
                assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    cache = cache_in(tmp_path, size)
    for path in (tmp_path / INNER).glob("??/*.new"):
        os.utime(path, (0, 0))  # an hour later
    cache.prune(size)
    assert not list((tmp_path / INNER).glob("??/*.new"))
    assert cache.contents().size <= size
    assert cache.put(name_of(1), b"still works")


@pytest.mark.parametrize("what", ["link", "dangling link", "directory", "pipe", "socket"])
@pytest.mark.parametrize("name", ["usage", "fetching"])
def test_what_is_in_the_place_of_a_shared_file_is_removed(
    what: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_in(tmp_path / "c")
    (tmp_path / "victim").write_bytes(b"theirs")
    place = tmp_path / "c" / INNER / name
    if what == "directory":
        place.mkdir()
    elif what == "pipe":
        os.mkfifo(place)
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(place))
    else:
        place.symlink_to(tmp_path / ("victim" if what == "link" else "nothing"))
    assert cache.claims.take(name_of(1))
    assert cache.put(name_of(1), b"content")
    assert cache.get(name_of(1), LIMIT) == b"content"
    assert place.is_file()
    assert not place.is_symlink()
    assert (tmp_path / "victim").read_bytes() == b"theirs"
    assert not (tmp_path / "nothing").exists()
    assert [record.getMessage() for record in caplog.records] == [
        f"{place}: removed, it was not a regular file"
    ]
    caplog.clear()
    cache.claims.close()


def test_what_cannot_be_removed_from_the_place_of_a_shared_file_is_named(tmp_path: Path) -> None:
    cache = cache_in(tmp_path / "c")
    (tmp_path / "c" / INNER / "usage/full").mkdir(parents=True)
    with pytest.raises(SourceError, match="pbsfs-1/usage: not a regular file; remove it"):
        cache.put(name_of(1), b"content")
    assert cache.get(name_of(1), LIMIT) is None
    text, is_warning = look_at(CacheAccess(tmp_path / "c"))
    assert is_warning
    assert text.endswith("usage: not a regular file; remove it; pbsfs reads without the cache until then")


class Racing(CacheFiles):
    """Files of which another process changes something while the shard of the first name is counted: before
    and after the look at them."""

    def __init__(self, directory: Path, before: Callable[[], object], after: Callable[[], object]) -> None:
        super().__init__(directory, CacheLimits())
        self._before, self._after = before, after

    def scan(self, shard: int) -> list[Found]:
        races = shard == name_of(1).shard
        if races:
            self._before()
        found = super().scan(shard)
        if races:
            self._after()
        return found


def test_a_count_that_races_with_others_never_makes_the_number_too_small(tmp_path: Path) -> None:
    def put() -> None:
        other.put(next(names), content_of(1))

    other = cache_in(tmp_path)
    names = (name for name in map(name_of, range(1, 100_000)) if name.shard == name_of(1).shard)
    races: list[tuple[Callable[[], object], Callable[[], object]]] = [(put, int), (int, put), (put, put)]
    for before, after in races:
        counting = DiskCache(tmp_path, SIZE)
        counting._files = Racing(tmp_path, before, after)
        counting.contents()
        assert other.used() >= sum(size_on_disk(path.stat().st_size) for path in files_in(tmp_path))
    other.contents()
    assert other.used() == sum(size_on_disk(path.stat().st_size) for path in files_in(tmp_path))


def test_two_that_count_at_once_correct_a_number_once(tmp_path: Path) -> None:
    other = cache_in(tmp_path)
    other.put(name_of(1), content_of(1))
    Usage(CacheFiles(tmp_path, CacheLimits())).add(name_of(1).shard, 1 << 20)  # one that was killed
    counting = DiskCache(tmp_path, SIZE)
    counting._files = Racing(tmp_path, other.contents, int)
    counting.contents()
    assert other.used() == PART


def test_an_entry_is_counted_when_others_see_it(tmp_path: Path) -> None:
    cache, other = cache_in(tmp_path), cache_in(tmp_path)
    name, data = name_of(1), content_of(1)

    def reserve() -> bool:
        assert cache._usage.add(name.shard, PART, most=SIZE)
        assert other.contents().size == PART
        return True

    assert cache._files.write(name, data, reserve)
    assert other.used() == PART
    assert not cache._files.write(name_of(2), data, lambda: False)
    assert stored(tmp_path) == PART


def test_what_does_not_fit_on_the_disk_leaves_nothing(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    cache.put(name_of(1), b"there")
    before = sorted(tmp_path.rglob("*"))
    used = cache.contents().size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            cache.put(name_of(2), content_of(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    assert all(path.is_dir() for path in left)
    assert (cache.contents().size, cache.get(name_of(1), LIMIT)) == (used, b"there")


def test_a_disk_that_others_fill_gets_room_from_the_oldest_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_in(tmp_path / "c")
    for number in range(20):
        cache.put(name_of(number), content_of(number))
        os.utime(path_of(cache, name_of(number)), (0, 1000 + number))
    least = stored(tmp_path / "c") - 5 * PART  # what the disk has for the cache, from now on

    def lacking(_files: CacheFiles, size: int) -> int:
        return stored(tmp_path / "c") + size - least

    monkeypatch.setattr(CacheFiles, "lacking", lacking)
    assert cache.put(name_of(100), content_of(100))
    assert stored(tmp_path / "c") <= least
    assert [number for number in range(6) if cache.get(name_of(number), LIMIT)] == []
    assert cache.get(name_of(19), LIMIT) == content_of(19)
    least = 0
    used = cache.used()
    with pytest.raises(OSError, match="the disk is almost full"):
        cache.put(name_of(101), content_of(101))
    assert cache.used() <= used
    assert cache.get(name_of(101), LIMIT) is None


def test_some_of_the_disk_is_left_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = CacheFiles(tmp_path / "c", CacheLimits())
    files.prepare()
    disk = os.statvfs(tmp_path)
    free, kept = disk.f_bavail * disk.f_frsize, min(disk.f_blocks * disk.f_frsize // 20, 1 << 30)
    assert files.lacking(free - kept + (1 << 32)) > 0
    assert files.lacking(free - kept - (1 << 32)) < 0
    monkeypatch.setattr(os, "statvfs", lambda _path: os.statvfs_result([4096] * 2 + [0] * 8))
    assert files.lacking(1 << 50) < 0, "a file system that does not know"


def test_another_user_who_keeps_the_numbers_locked_stops_only_writing(tmp_path: Path) -> None:
    import fcntl  # noqa: PLC0415

    cache = cache_in(tmp_path)
    cache.put(name_of(1), b"there")
    with open(tmp_path / INNER / "usage", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="keeps it locked") as caught:
            cache.put(name_of(2), b"x")
    assert caught.value.errno == errno.EAGAIN
    assert cache.get(name_of(1), LIMIT) == b"there"


def test_a_claim_is_of_one_process(tmp_path: Path) -> None:
    first, second = cache_in(tmp_path), DiskCache(tmp_path, SIZE)
    assert first.claims.take(name_of(1))
    assert not second.claims.take(name_of(1))
    assert second.claims.take(name_of(2))
    first.claims.give_back(name_of(1))
    assert second.claims.take(name_of(1))
    second.claims.close()
    assert first.claims.take(name_of(1))
    assert first.claims.take(name_of(2))
