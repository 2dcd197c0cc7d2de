"""Opening what lies beneath a root: no link is followed, nothing odd is opened, and no trace is left."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pbsfs.base.errors import DamageError, SourceError
from pbsfs.sources.directory.root import Root
from tests.support.needs import need_loop

LIMIT = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory with `a/b/file`."""
    (tmp_path / "root" / "a" / "b").mkdir(parents=True)
    (tmp_path / "root" / "a" / "b" / "file").write_bytes(b"content")
    return tmp_path / "root"


@pytest.fixture(autouse=True)
def no_descriptor_is_left_open() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def names(root: Path, *steps: str) -> list[str]:
    with Root(str(root)).scanned(steps) as entries:
        return sorted(entry.name for entry in entries)


def test_a_file_and_a_directory_are_what_they_are(root: Path) -> None:
    assert Root(str(root)).read_file(("a", "b", "file"), LIMIT) == b"content"
    assert names(root, "a", "b") == ["file"]
    assert names(root) == ["a"]
    assert Root(str(root)).exists(("a", "b", "file"))
    assert not Root(str(root)).exists(("a", "c", "file"))
    assert not Root(str(root)).exists(("a", "b", "file", "more"))
    Root(str(root)).enter(("a",))
    with pytest.raises(NotADirectoryError):
        Root(str(root)).enter(("a", "b", "file"))


def test_what_is_missing_is_named_with_its_path(root: Path) -> None:
    for steps in (("x",), ("a", "x"), ("a", "x", "file")):
        with pytest.raises(FileNotFoundError) as caught:
            Root(str(root)).read_file(steps, LIMIT)
        assert caught.value.filename == "/".join((str(root), *steps))


def test_the_root_and_what_lies_above_it_may_be_links(root: Path) -> None:
    (root.parent / "above").symlink_to(root)
    (root.parent / "root2").symlink_to("above/a")
    assert Root(str(root.parent / "above")).read_file(("a", "b", "file"), LIMIT) == b"content"
    assert names(root.parent / "root2") == ["b"]
    assert Root(str(root.parent / "root2")).read_file(("b", "file"), LIMIT) == b"content"


WAYS: dict[str, Callable[[Path, tuple[str, ...]], object]] = {
    "read": lambda root, steps: Root(str(root)).read_file(steps, LIMIT),
    "scan": lambda root, steps: names(root, *steps),
    "enter": lambda root, steps: Root(str(root)).enter(steps),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("linked", [0, 1, 2])
def test_a_link_on_the_way_or_at_its_end_is_refused_by_name(root: Path, way: str, linked: int) -> None:
    steps = ("a", "b", "file") if way == "read" else ("a", "b", "c")
    (root / "a" / "b" / "c").mkdir()
    place = root.joinpath(*steps[: linked + 1])
    place.rename(root.parent / "elsewhere")
    place.symlink_to(root.parent / "elsewhere")
    with pytest.raises(SourceError, match=f"^{place} is a symbolic link, which is not followed"):
        WAYS[way](root, steps)


@pytest.mark.parametrize("target", ["loop", "nowhere", "/etc/passwd", "../a/b/file"])
def test_a_link_is_refused_wherever_it_leads(root: Path, target: str) -> None:
    (root / "loop").symlink_to(target)
    with pytest.raises(SourceError, match="is a symbolic link"):
        Root(str(root)).read_file(("loop",), LIMIT)
    assert Root(str(root)).exists(("loop",))


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


ODD: dict[str, Callable[[Path], object]] = {
    "a directory": Path.mkdir,
    "a FIFO": os.mkfifo,
    "a socket": _socket,
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_not_a_regular_file_is_not_even_opened(
    root: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ODD[kind](root / "odd")
    opened: list[str] = []
    real = os.open

    def noted(path: Any, *rest: Any, **more: Any) -> int:
        opened.append(str(path))
        return real(path, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", noted)
        with pytest.raises(DamageError, match=f"^{root}/odd is not a regular file$"):
            Root(str(root)).read_file(("odd",), LIMIT)
    assert opened == []


def test_a_file_that_is_exchanged_between_looking_and_opening_is_not_read(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(root / "odd")
    seen = os.stat(root / "a" / "b" / "file")
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda *_args, **_more: seen)
        with pytest.raises(DamageError, match="is not a regular file"):
            Root(str(root)).read_file(("odd",), LIMIT)


def test_an_oversize_file_is_refused(root: Path) -> None:
    with pytest.raises(DamageError, match="file has 7 bytes where 6 is the most"):
        Root(str(root)).read_file(("a", "b", "file"), 6)


def test_a_file_that_shrinks_while_it_is_read_is_damage(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = iter([b"some", b""])
    with monkeypatch.context() as patch:
        patch.setattr(os, "read", lambda _file, _size: next(parts))
        with pytest.raises(DamageError, match="became shorter while pbsfs read it"):
            Root(str(root)).read_file(("a", "b", "file"), LIMIT)


def test_a_file_that_comes_in_pieces_is_read_whole(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.read
    with monkeypatch.context() as patch:
        patch.setattr(os, "read", lambda file, size: whole(file, min(size, 2)))
        assert Root(str(root)).read_file(("a", "b", "file"), LIMIT) == b"content"


def test_a_read_that_fails_half_way_names_the_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_file: int, _size: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "read", fail)
        with pytest.raises(OSError, match="Input/output error") as caught:
            Root(str(root)).read_file(("a", "b", "file"), LIMIT)
    assert caught.value.filename == str(root / "a" / "b" / "file")


def test_another_user_s_files_are_read_though_the_kernel_refuses_to_leave_their_times(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refusing(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_NOATIME:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        return real(path, flags, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refusing)
        assert Root(str(root)).read_file(("a", "b", "file"), LIMIT) == b"content"
        assert names(root, "a", "b") == ["file"]


@pytest.mark.root
def test_access_times_stay_where_the_file_system_counts_every_access(tmp_path: Path) -> None:
    need_loop()
    image, place = tmp_path / "image", tmp_path / "place"
    image.touch()
    os.truncate(image, 8 << 20)
    place.mkdir()
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True, timeout=30)
    subprocess.run(["mount", "-o", "loop,strictatime", str(image), str(place)], check=True, timeout=30)
    try:
        (place / "a").mkdir()
        (place / "a" / "file").write_bytes(b"content")
        for path in (place / "a" / "file", place / "a", place):
            os.utime(path, ns=(10**18, 10**18))
        assert Root(str(place)).read_file(("a", "file"), LIMIT) == b"content"
        assert names(place, "a") == ["file"]
        assert "a" in names(place)
        assert [p.stat().st_atime_ns for p in (place, place / "a", place / "a" / "file")] == [10**18] * 3
        assert stat.S_ISREG((place / "a" / "file").stat().st_mode)
        (place / "a" / "file").read_bytes()
        assert (place / "a" / "file").stat().st_atime_ns != 10**18, "the file system counts no access"
    finally:
        subprocess.run(["umount", str(place)], check=True, timeout=30)
