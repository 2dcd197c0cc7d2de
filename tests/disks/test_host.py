"""The parser process and its parent: answers, faults, and what a process that was taken over can do."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from pbsfs.base.errors import DamageError, SourceError
from pbsfs.contents.base import DECODED, Entry, Piece
from pbsfs.disks import wire
from pbsfs.disks.host import (
    FAILURES,
    MOST_PROCESSES,
    Parser,
    ParserError,
    VolumeInfo,
)
from pbsfs.disks.remote import MAPS_AT_ONCE, MOST_KEPT, RemoteVolume
from pbsfs.runtime.stats import COUNTS
from tests.support.disks import FileDisk, MemoryDisk, image_from
from tests.support.mounts import is_running
from tests.support.needs import need
from tests.support.waiting import wait_until


def disk_with_luks() -> bytearray:
    """A disk with one partition, which is encrypted."""
    data = bytearray(4 << 20)
    struct.pack_into("<B3xB3xII", data, 446, 0, 0x83, 2048, 4096)
    data[510:512] = b"\x55\xaa"
    data[1 << 20 : (1 << 20) + 8] = b"LUKS\xba\xbe\0\2"
    return data


class Holed(MemoryDisk):
    """A disk of which a range is damaged."""

    def __init__(self, data: bytearray, damaged: range) -> None:
        super().__init__(data)
        self._damaged = damaged

    def pread(self, offset: int, size: int) -> bytes:
        if offset < self._damaged.stop and self._damaged.start < offset + size:
            raise DamageError("vm/1/x/drive-scsi0.img: chunk 0 is missing")
        return super().pread(offset, size)


class Watched(MemoryDisk):
    """A disk that does something at its first read."""

    def __init__(self, data: bytearray, act: Callable[[], object]) -> None:
        super().__init__(data)
        self._act: Callable[[], object] | None = act

    def pread(self, offset: int, size: int) -> bytes:
        act, self._act = self._act, None
        if act is not None:
            act()
        return super().pread(offset, size)


@contextmanager
def parser_of(disk: MemoryDisk, *command: str) -> Iterator[Parser]:
    made = Parser("vm/1/x", [("scsi0", disk)], command) if command else Parser("vm/1/x", [("scsi0", disk)])
    try:
        yield made
    finally:
        made.close()


def raising(error: BaseException) -> Callable[[], object]:
    def act() -> object:
        raise error

    return act


def is_luks(volumes: Sequence[VolumeInfo]) -> bool:
    return [(volume.name, volume.kind) for volume in volumes] == [(b"scsi0-p1", "luks")]


def refuse_thread(_thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def refuse_process(*_arguments: object, **_options: object) -> None:
    raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")


@pytest.mark.parametrize("lacks", ["thread", "process"])
def test_at_the_limit_of_tasks_the_error_passes_and_is_no_failure_of_the_process(
    monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    before = COUNTS.parsers
    with parser_of(MemoryDisk(disk_with_luks())) as parser:
        with monkeypatch.context() as patch:
            if lacks == "thread":
                patch.setattr(threading.Thread, "start", refuse_thread)
            else:
                patch.setattr(subprocess, "Popen", refuse_process)
            for _ in range(FAILURES + 1):
                with pytest.raises(SourceError, match=r"; end other programs, or allow more tasks") as raised:
                    parser.volumes()
                assert raised.value.retryable
                assert COUNTS.parsers == before
        assert is_luks(parser.volumes())


def test_the_process_says_what_is_on_the_disks() -> None:
    with parser_of(MemoryDisk(disk_with_luks())) as parser:
        assert is_luks(parser.volumes())
        assert is_luks(parser.volumes())


@pytest.mark.parametrize("error", [SourceError("gone", retryable=True), KeyboardInterrupt()], ids=str)
def test_what_reading_raises_is_raised_and_the_process_goes_on(error: BaseException) -> None:
    with parser_of(Watched(disk_with_luks(), raising(error))) as parser:
        with pytest.raises(type(error)) as caught:
            parser.volumes()
        assert caught.value is error
        assert is_luks(parser.volumes())


def test_damage_of_a_disk_is_the_problem_of_what_it_hides() -> None:
    with parser_of(Holed(disk_with_luks(), range(512))) as parser:
        (volume,) = parser.volumes()
        assert volume.damage == "vm/1/x/drive-scsi0.img: chunk 0 is missing"


def test_damage_beside_what_is_read_hides_nothing() -> None:
    with parser_of(Holed(disk_with_luks(), range(300 << 10, 301 << 10))) as parser:
        assert is_luks(parser.volumes())


def test_a_process_that_ended_when_it_was_idle_is_started_again_silently() -> None:
    with parser_of(MemoryDisk(disk_with_luks())) as parser:
        parser.volumes()
        process = parser._process
        assert process is not None
        process.kill()
        process.wait()
        assert is_luks(parser.volumes())


def test_a_process_that_ended_when_it_was_idle_leaves_nothing_behind() -> None:
    disk = MemoryDisk(disk_with_luks())
    with parser_of(disk) as parser, parser_of(disk) as other:
        for one in (parser, other):
            one.volumes()
        process, sock = parser._process, parser._sock
        assert process is not None
        assert sock is not None
        sock.shutdown(socket.SHUT_RDWR)  # as the process does when it was idle
        wait_until(lambda: parser._process is None, "the end of an idle process")
        assert not Path(f"/proc/{process.pid}").exists()
        assert parser._sock is None
        assert other._process is not None
        assert is_luks(parser.volumes())


def test_a_process_that_is_killed_fails_its_request() -> None:
    def kill() -> None:
        assert parser._process is not None
        os.kill(parser._process.pid, signal.SIGKILL)
        parser._process.wait()

    disk = Watched(disk_with_luks(), kill)
    with parser_of(disk) as parser:
        with pytest.raises(ParserError, match="vm/1/x: the process that reads its file systems failed"):
            parser.volumes()
        assert is_luks(parser.volumes())
        kill()
        disk._act = kill
        with pytest.raises(ParserError):
            parser.volumes()


def test_a_process_that_fails_again_and_again_is_not_started_any_more() -> None:
    with parser_of(MemoryDisk(b"\0" * 4096), sys.executable, "-c", "pass") as parser:
        for _ in range(FAILURES):
            with pytest.raises(ParserError):
                parser.volumes()
        with pytest.raises(ParserError, match="it is tried again in 60 seconds"):
            parser.volumes()


def test_few_processes_run_at_once() -> None:
    with ExitStack() as stack:
        made = [
            stack.enter_context(parser_of(MemoryDisk(disk_with_luks()))) for _ in range(MOST_PROCESSES + 2)
        ]
        for parser in made:
            assert is_luks(parser.volumes())
        assert [parser._process is None for parser in made] == [True] * 2 + [False] * MOST_PROCESSES
        assert is_luks(made[0].volumes())
        assert sum(parser._process is not None for parser in made) == MOST_PROCESSES
        with made[3]._lock:  # the least recently used one is busy, so another one ends
            assert is_luks(made[1].volumes())
            assert made[3]._process is not None
        assert sum(parser._process is not None for parser in made) == MOST_PROCESSES


_SAY = """
import json, socket, struct, sys
sock = socket.socket(fileno=0)
def take():
    kind, length = struct.unpack("<BI", sock.recv(5, socket.MSG_WAITALL))
    return sock.recv(length, socket.MSG_WAITALL) if length else b""
take()
for line in sys.argv[1:]:
    take()
    kind, value = line[0], bytes.fromhex(line[1:])
    sock.sendall(struct.pack("<BI", ord(kind), len(value)) + value)
"""


def saying(*answers: tuple[str, object]) -> list[str]:
    """A process that answers so, whatever it is asked."""
    lines = [kind + (said if isinstance(said, bytes) else wire.pack(said)).hex() for kind, said in answers]
    return [sys.executable, "-c", _SAY, *lines]


@pytest.mark.parametrize(
    "answer",
    [
        ("A", b"no JSON"),
        ("A", b"[" * 100_000),
        ("A", {"a": 1}),
        ("A", [1]),
        ("A", [["../up", 1, "ext4", None, None]]),
        ("A", [["", 1, "ext4", None, None]]),
        ("A", [["a\0", 1, "ext4", None, None]]),
        ("A", [["\u1234", 1, "ext4", None, None]]),
        ("A", [["a", -1, "ext4", None, None]]),
        ("A", [["a", 1, 7, None, None]]),
        ("A", [["a", 1, "ext4", None, None]] * 2),
        ("R", wire.RANGE.pack(0, 1 << 40, 1)),
        ("R", wire.RANGE.pack(7, 0, 1)),
        ("R", wire.RANGE.pack(0, 0, (1 << 32) - 1)),
        ("R", b"short"),
        ("P", wire.RANGE.pack(9, 0, 1)),
        ("P", b"short"),
        ("z", b""),
        ("F", 3),
    ],
    ids=lambda answer: f"{answer[0]} {str(answer[1])[:20]}",
)
def test_a_process_that_says_what_it_should_not_fails(answer: tuple[str, object]) -> None:
    with parser_of(MemoryDisk(bytes(4096)), *saying(answer)) as parser:
        with pytest.raises(ParserError):
            parser.volumes()
        assert parser._process is None


ROOT = wire.entry_row(Entry(b"", stat.S_IFDIR | 0o755, inode=2))
FILE = Entry(b"f", stat.S_IFREG | 0o644, size=10, inode=3)
VOLUME = VolumeInfo(0, b"scsi0", 1, "ext4", None, None)


def opened(*answers: tuple[str, object]) -> list[str]:
    return saying(("A", [ROOT, {"uuid": "x"}]), *answers)


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        (lambda volume: volume.children(volume.root), ("A", [[ROOT], None])),
        (lambda volume: volume.children(volume.root), ("A", 5)),
        (lambda volume: volume.child(volume.root, b"f"), ("A", "f")),
        (lambda volume: volume.complete(volume.root, [FILE]), ("A", [])),
        (lambda volume: volume.data(FILE), ("A", [[[0, 4090, 10]]])),
        (lambda volume: volume.data(FILE), ("A", [[[5, 0, 10]]])),
        (lambda volume: volume.data(FILE), ("A", [[[DECODED, 5, 10]]])),
        (lambda volume: volume.data(FILE), ("A", [[[0, 0, -10]]])),
        (lambda volume: volume.data(FILE), ("A", None)),
        (lambda volume: volume.data(FILE), ("A", [None])),
        (lambda volume: volume.data(FILE), ("A", [])),
        (lambda volume: volume.read(FILE, 0, 10), ("B", b"short")),
        (lambda volume: volume.read(FILE, 0, 10), ("A", "text")),
        (lambda volume: volume.xattrs(FILE), ("A", [["a"]])),
        (lambda volume: volume.decoded_from(FILE), ("A", [[0, 4090, 10]])),
        (lambda volume: volume.decoded_from(FILE), ("A", [[None, 0, 10]])),
        (lambda volume: volume.decoded_from(FILE), ("A", [[DECODED, 0, 10]])),
        (lambda volume: volume.decoded_from(FILE), ("A", 5)),
    ],
)
def test_contents_that_cannot_be_are_refused(
    method: Callable[[RemoteVolume], object], answer: tuple[str, object]
) -> None:
    with parser_of(MemoryDisk(bytes(4096)), *opened(answer)) as parser:
        volume = RemoteVolume(parser, VOLUME)
        with pytest.raises(ParserError):
            method(volume)


def test_contents_that_can_be_are_taken() -> None:
    answers: list[tuple[str, object]] = [
        ("A", [[wire.entry_row(FILE)], "half of it is gone"]),
        ("A", [[[0, 6, 4], [None, 0, 3], [DECODED, 7, 3]]]),
        ("B", b"0123456789"),
        ("A", [["user.a", "\u00ff"]]),
        ("A", [[0, 6, 100]]),
        ("A", None),
        ("A", [None, "no inode"]),
    ]
    with parser_of(MemoryDisk(bytes(4096)), *opened(*answers)) as parser:
        volume = RemoteVolume(parser, VOLUME)
        assert volume.facts() == {"uuid": "x"}
        found = volume.children(volume.root)
        assert found.entries == [FILE]
        assert str(found.damage) == "half of it is gone"
        assert volume.data(FILE) == [Piece(0, 6, 4), Piece(None, 0, 3), Piece(DECODED, 7, 3)]
        assert volume.read(FILE, 0, 10) == b"0123456789"
        assert volume.xattrs(FILE) == {b"user.a": b"\xff"}
        assert volume.decoded_from(FILE) == [Piece(0, 6, 100)]
        assert volume.decoded_from(FILE) is None
        gone, broken = volume.complete(volume.root, [FILE, FILE])
        assert gone is None
        assert isinstance(broken, DamageError)


def test_places_are_told_without_asking_once_they_are_known() -> None:
    pieces = [[0, 2 * number, 1] for number in range(MOST_KEPT + 1)]
    large = FILE.but(size=len(pieces))
    answers: list[tuple[str, object]] = [("A", [[[0, 6, 10]]]), ("A", [pieces])]
    with parser_of(MemoryDisk(bytes(4096)), *opened(*answers)) as parser:
        volume = RemoteVolume(parser, VOLUME)
        assert volume.data_at_once(FILE) is None
        assert volume.data(FILE) == volume.data_at_once(FILE) == [Piece(0, 6, 10)]
        assert len(volume.data(large)) == len(pieces)
        assert volume.data_at_once(large) is None


def test_maps_of_files_that_were_listed_together_are_asked_for_together() -> None:
    """However many were listed before them, each listing of a few."""
    listings = [
        [FILE.but(name=b"%d" % (5 * n + m), inode=5 * n + m + 20) for m in range(5)] for n in range(700)
    ]
    answers: list[tuple[str, object]] = [
        ("A", [[wire.entry_row(file) for file in files], None]) for files in listings
    ]
    answers.append(("A", [[[0, number, 10]] for number in range(MAPS_AT_ONCE)]))
    with parser_of(MemoryDisk(bytes(4096)), *opened(*answers)) as parser:
        volume = RemoteVolume(parser, VOLUME)
        for _files in listings:
            volume.children(volume.root)
        near = [file for files in listings for file in files][-500:]
        assert volume.data(near[0]) == [Piece(0, 0, 10)]
        assert [volume.data_at_once(file) for file in near[:MAPS_AT_ONCE]] == [
            [Piece(0, number, 10)] for number in range(MAPS_AT_ONCE)
        ]
        assert volume.data_at_once(near[MAPS_AT_ONCE]) is None


def test_maps_of_the_files_of_a_large_directory_are_asked_for_together_as_a_walk_reaches_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together = 2 * MAPS_AT_ONCE
    for place in ("contents.base.WALKED_TOGETHER", "disks.remote.WALKED_TOGETHER", "disks.remote.MOST_NEAR"):
        monkeypatch.setattr(f"pbsfs.{place}", together)
    count = 5 * together
    files = [FILE.but(name=b"%d" % number, inode=number + 20) for number in range(count)]
    answers: list[tuple[str, object]] = [("A", [[wire.entry_row(file) for file in files], None])]
    answers += [("A", [[[0, number, 10]] for number in range(MAPS_AT_ONCE)])] * (count // MAPS_AT_ONCE)
    with parser_of(MemoryDisk(bytes(4096)), *opened(*answers)) as parser:
        volume = RemoteVolume(parser, VOLUME)
        for number, (_path, file) in enumerate(volume.walk(volume.root)):
            assert isinstance(file, Entry)
            assert volume.data(file) == [Piece(0, number % MAPS_AT_ONCE, 10)]


_LEAVE = """
from pbsfs.disks.host import Parser
from tests.support.disks import MemoryDisk

parser = Parser("vm/1/x", [("scsi0", MemoryDisk(bytes(4096)))])
parser.volumes()
print(parser._process.pid)
"""


def test_a_program_ends_that_has_not_closed_its_parser() -> None:
    command = [sys.executable, "-c", _LEAVE]
    checkout = Path(__file__).parents[2]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=checkout)
    assert not ended.stderr
    wait_until(lambda: not is_running(int(ended.stdout)), "the end of the parser's process")


def _row(**changes: Any) -> list[object]:
    names = ["name", "mode", "uid", "gid", "mtime", "size", "inode", "rdev", "target"]
    names += ["xattrs", "exact", "position", "end", "hint", "links"]
    row = wire.entry_row(FILE)
    for name, value in changes.items():
        row[names.index(name)] = value
    return row


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"name": ".."},
        {"name": "a/b"},
        {"name": "a\0"},
        {"name": "\u0100"},
        {"name": 5},
        {"mode": 0},
        {"mode": 0o200644 | 1 << 20},
        {"mode": "x"},
        {"mode": True},
        {"uid": -1},
        {"gid": 1 << 32},
        {"mtime": (1 << 63) * 10**9},
        {"mtime": -(1 << 63) * 10**9 - 1},
        {"size": -1},
        {"size": 1.5},
        {"inode": -1},
        {"rdev": 1 << 64},
        {"target": "\0"},
        {"target": "a" * 70_000},
        {"xattrs": 1},
        {"exact": None},
        {"hint": 1 << 300},
    ],
    ids=str,
)
def test_entries_that_cannot_be_are_refused(changes: dict[str, object]) -> None:
    assert wire.entry_of(_row()) == FILE
    with pytest.raises(wire.WireError):
        wire.entry_of(_row(**changes))


@pytest.mark.parametrize("seconds", [-(1 << 63), 15_032_385_535, (1 << 63) - 1])
def test_times_of_every_file_system_come_through(seconds: int) -> None:
    assert wire.entry_of(_row(mtime=seconds * 10**9)).mtime_ns == seconds * 10**9


def test_a_file_of_the_year_2300_does_not_cost_its_directory(tmp_path: Path) -> None:
    """Nanoseconds since 1970 need more than 64 bits after April 2262; ext4 keeps times until 2446."""
    need("mke2fs", "debugfs")
    image = image_from(tmp_path / "image", 8 << 20)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", image], check=True, capture_output=True)
    (tmp_path / "file").write_bytes(b"content")
    script = f"write {tmp_path / 'file'} late\nset_inode_field late mtime @15032385535\n"
    subprocess.run(["debugfs", "-w", image], input=script, check=True, capture_output=True, text=True)
    made = Parser("vm/1/x", [("scsi0", FileDisk(image))])
    try:
        volume = RemoteVolume(made, made.volumes()[0])
        late = volume.child(volume.root, b"late")
        assert late is not None
        assert late.mtime_ns == 15_032_385_535 * 10**9
        assert {entry.name for entry in volume.children(volume.root).entries} == {b"late", b"lost+found"}
    finally:
        made.close()


_TRY = """
import os, socket
from pbsfs.disks import sandbox
filtered = sandbox.enter()
def works(act):
    try:
        act()
    except (OSError, MemoryError):
        return False
    return True
print(
    filtered,
    works(lambda: open("/etc/passwd")),
    works(lambda: socket.socket()),
    works(lambda: os.fork()),
    works(lambda: bytes(1 << 30)),
    works(lambda: os.kill(os.getppid(), 0)),
    works(lambda: os.listdir("/")),
)
"""


def test_the_process_gives_up_what_it_does_not_need() -> None:
    said = subprocess.run(
        [sys.executable, "-I", "-c", _TRY], capture_output=True, text=True, timeout=60, check=True
    ).stdout.split()
    assert said[1:5] == ["False"] * 4
    if said[0] == "True":
        assert said[5:] == ["False", "False"]


def test_what_never_ends_is_ended_by_its_clock() -> None:
    code = "from pbsfs.disks import sandbox\nsandbox.enter()\nsandbox.start_clock(0.05)\nwhile True: pass"
    ended = subprocess.run([sys.executable, "-I", "-c", code], timeout=60, check=False)
    assert ended.returncode == -signal.SIGPROF
