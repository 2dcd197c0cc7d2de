"""The parent of a parser process: starts it, gives it bytes of disks, and takes its answers.

Synchronous, for worker threads; one request at a time, so others wait. When the process ends without a reason
that this program gave, the request fails; the next one starts it anew, unless that happens often.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pbsfs.base.errors import DamageError, SourceError, UnsupportedError
from pbsfs.base.text import one_line
from pbsfs.contents.base import Stream
from pbsfs.disks import wire
from pbsfs.runtime.stats import COUNTS
from pbsfs.runtime.threads import no_task, start

SILENT = 150.0
"""Seconds without a word from the process after which it is ended: more than it may compute."""

MOST_PROCESSES = 8
"""Processes that run at once where some of them are idle: the least recently used one ends for another."""

FAILURES = 3
WITHIN = 60.0
"""So many unexpected ends in so many seconds: the process is not started again until they have passed."""

MOST_VOLUMES = 10_000
"""Volumes of a snapshot."""

COMMAND = (sys.executable, "-I", "-m", "pbsfs.disks.worker")
"""The process: isolated from the environment and the current directory."""

MOST_DAMAGE = 100
"""Errors of damaged disks that are kept."""

MOST_NAME = 1 << 10
"""Bytes of a volume's name, and characters of what is said about it."""

_guard = threading.Lock()
_started: weakref.WeakSet[Parser] = weakref.WeakSet()
"""The parsers that have started a process at some time."""


class ParserError(SourceError):
    """The process that reads the file systems of a snapshot has failed."""


@dataclass(frozen=True, slots=True)
class VolumeInfo:
    """A volume on the disks of a snapshot: see `probe.Found`, whose fields these are.

    `damage`: of the stored disk, where that is the problem.
    """

    number: int
    name: bytes
    size: int
    kind: str
    problem: str | None
    part_uuid: str | None
    damage: str | None = None

    @property
    def is_guest(self) -> bool:
        """Whether it is the machine's own tree, which shows the files of the others once more."""
        return self.kind == wire.GUEST


class Parser:
    """A parser process for `disks`, started when it is needed."""

    def __init__(
        self, name: str, disks: Sequence[tuple[str, Stream]], command: Sequence[str] = COMMAND
    ) -> None:
        """`name`: of the snapshot, for errors. `disks`: each with its short name, `scsi0`."""
        self._command = command
        self.name = name
        self.streams = [stream for _name, stream in disks]
        self._names = [name for name, _stream in disks]
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._failures: deque[float] = deque(maxlen=FAILURES)
        self._damage: set[str] = set()  # of the disks, met since `volumes` was called
        self._is_closed = False
        self._has_place = False  # among those that run or are about to
        self._last_used = 0.0

    def volumes(self) -> list[VolumeInfo]:
        """What is on the disks. Raises DamageError, KeyRequiredError, SourceError."""
        self._damage.clear()
        rows = self.ask("volumes")
        if not isinstance(rows, list) or len(rows) > MOST_VOLUMES:
            raise self.failed("its list of volumes is not valid")
        found: list[VolumeInfo] = []
        names: set[bytes] = set()
        for number, row in enumerate(rows):
            try:
                name, size, kind, problem, part_uuid = row
                name = wire.raw(name)
            except (TypeError, ValueError, wire.WireError):
                raise self.failed("a volume in its list is not valid") from None
            if (
                not name
                or len(name) > MOST_NAME
                or b"/" in name
                or b"\0" in name
                or name in {b".", b".."}
                or name in names
                or type(size) is not int
                or not 0 <= size < 1 << 63
                or not isinstance(kind, str)
                or not all(text is None or isinstance(text, str) for text in (problem, part_uuid))
            ):
                raise self.failed("a volume in its list is not valid")
            names.add(name)
            damage = next((text for text in self._damage if problem is not None and text in problem), None)
            found.append(VolumeInfo(number, name, size, kind[:MOST_NAME], problem, part_uuid, damage))
        return found

    def ask(self, method: str, *arguments: object) -> Any:
        """The answer to a request: what JSON holds, or bytes. Raises DamageError, KeyRequiredError,
        SourceError."""
        request = wire.pack([method, *arguments])
        with self._lock:
            self._last_used = time.monotonic()
            if self._is_closed:
                raise ParserError(f"{self.name}: its disks were closed")
            fresh = self._sock is None
            try:
                return self._converse(request)
            except EOFError:
                # It ends when it was idle; what was asked just then is asked again.
                self._end()
                if fresh:
                    raise self._failed("it ended at once") from None
            except (OSError, wire.WireError) as error:
                raise self._failed(self._why(error)) from None
            try:
                return self._converse(request)
            except (EOFError, OSError, wire.WireError) as error:
                raise self._failed(self._why(error)) from None

    def _converse(self, request: bytes) -> Any:
        sock = self._sock or self._start()
        try:
            wire.send(sock, wire.ASK, request)
        except BrokenPipeError:
            raise EOFError from None
        raised: BaseException | None = None
        asked = False
        while True:
            try:
                kind, data = wire.receive(sock)
            except EOFError:
                if asked:
                    raise wire.WireError("it ended in the middle of a request") from None
                raise
            except ConnectionResetError:
                raise EOFError from None
            if kind == wire.READ:
                asked = True
                raised = self._serve(sock, data, raised)
            elif kind == wire.AHEAD:
                asked = True
                raised = self._prefetch(data, raised)
            elif raised is not None and not isinstance(raised, DamageError):
                raise raised
            elif kind == wire.BYTES:
                return data
            elif kind == wire.ANSWER:
                return wire.unpack(data)
            elif kind == wire.DAMAGED:
                self._raise_damage(wire.unpack(data), raised)
            elif kind == wire.FAILED:
                raise self._fault(wire.unpack(data))
            else:
                raise wire.WireError("an unknown message")

    def _serve(self, sock: socket.socket, data: bytes, raised: BaseException | None) -> BaseException | None:
        """Answers a READ. Returns what reading raised first: it is raised when the process has given up."""
        if len(data) != wire.RANGE.size:
            raise wire.WireError("a range of another length")
        disk, offset, size = wire.RANGE.unpack(data)
        if disk >= len(self.streams) or offset + size > self.streams[disk].size or size > wire.MOST:
            raise wire.WireError("it wants bytes beyond its disks")
        damage: str | None = None
        if raised is None or isinstance(raised, DamageError):
            try:
                found = self.streams[disk].pread(offset, size)
            except DamageError as error:
                raised = error
                damage = str(error)
                if len(self._damage) < MOST_DAMAGE:
                    self._damage.add(damage)
            except BaseException as error:  # a cancelled task too: the process is to stop in order first
                raised = error
            else:
                wire.send(sock, wire.DATA, found)
                return raised
        wire.send(sock, wire.REFUSED, wire.pack(damage))
        return raised

    def _prefetch(self, data: bytes, raised: BaseException | None) -> BaseException | None:
        if len(data) % wire.RANGE.size or len(data) > wire.MOST_RANGES * wire.RANGE.size:
            raise wire.WireError("ranges of another length")
        if raised is not None and not isinstance(raised, DamageError):
            return raised
        wanted: dict[int, list[tuple[int, int]]] = {}
        for disk, offset, size in wire.RANGE.iter_unpack(data):
            if disk >= len(self.streams) or offset >= self.streams[disk].size:
                raise wire.WireError("it wants bytes beyond its disks")
            wanted.setdefault(disk, []).append((offset, min(size, self.streams[disk].size - offset)))
        try:
            for disk, ranges in wanted.items():
                self.streams[disk].prefetch(ranges)
        except BaseException as error:
            return error
        return raised

    @staticmethod
    def _raise_damage(answer: object, raised: BaseException | None) -> None:
        if not isinstance(answer, list) or len(answer) != 2:
            raise wire.WireError("an error is not valid")
        said, unsupported = answer
        if isinstance(raised, DamageError) and str(raised) == said:
            raise raised
        raise (UnsupportedError if unsupported else DamageError)(one_line(str(said)))

    def _fault(self, said: object) -> ParserError:
        return ParserError(f"{self.name}: reading its file systems failed ({one_line(str(said))})")

    # --- the process

    def _start(self) -> socket.socket:
        now = time.monotonic()
        if len(self._failures) == FAILURES and now - self._failures[0] < WITHIN:
            raise ParserError(
                f"{self.name}: the process that reads its file systems failed {FAILURES} times; "
                f"it is tried again in {WITHIN:.0f} seconds"
            )
        self._make_room()
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    env={"PATH": os.defpath},
                    start_new_session=True,
                )
            except BaseException as error:
                ours.close()
                self._has_place = False
                if isinstance(error, BlockingIOError):
                    raise no_task(f"{self.name}: can't start a process for its file systems") from None
                raise
        COUNTS.parsers += 1
        COUNTS.parsers_started += 1
        reaper = threading.Thread(target=_reap, args=(self._process, weakref.ref(self)), daemon=True)
        try:
            start(reaper)
        except SourceError:
            ours.close()
            self._end()
            raise
        ours.settimeout(SILENT)
        self._sock = ours
        disks = [[name, stream.size] for name, stream in zip(self._names, self.streams, strict=True)]
        wire.send(ours, wire.DATA, wire.pack(disks))
        return ours

    def _make_room(self) -> None:
        """Takes a place for this process, which is about to start. Ends idle ones, the least recently used
        first, as far as there are too many with it."""
        with _guard:
            others = [parser for parser in _started if parser is not self and parser._has_place]
            surplus = len(others) + 1 - MOST_PROCESSES
            for parser in sorted(others, key=lambda parser: parser._last_used):
                if surplus > 0 and parser._lock.acquire(blocking=False):
                    try:
                        parser._end()
                    finally:
                        parser._lock.release()
                    surplus -= 1
            self._has_place = True
            _started.add(self)

    def forget(self, process: subprocess.Popen[bytes]) -> None:
        """Gives back what is kept for `process`, which has ended: its place and its socket."""
        with self._lock:
            if self._process is process:
                self._end()

    def _end(self) -> int | None:
        """Ends the process, if it has not. Returns its status."""
        self._has_place = False
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        process, self._process = self._process, None
        if process is None:
            return None
        COUNTS.parsers -= 1
        try:
            return process.wait(0.2)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _why(self, error: BaseException) -> str:
        status = self._end()
        if isinstance(error, TimeoutError):
            return f"it was silent for {SILENT:.0f} seconds"
        if status is not None and status < 0:
            return f"signal {-status} ended it"
        if isinstance(error, EOFError):
            return f"it ended with status {status}"
        return str(error)

    def failed(self, why: str) -> ParserError:
        """Ends the process. Returns the error that says so."""
        with self._lock:
            return self._failed(why)

    def _failed(self, why: str) -> ParserError:
        self._end()
        COUNTS.parsers_failed += 1
        self._failures.append(time.monotonic())
        return ParserError(
            f"{self.name}: the process that reads its file systems failed: {why}; "
            "try again, or read the whole image instead"
        )

    def __del__(self) -> None:
        # When Python ends, the thread that reaps the process has stopped for good, perhaps with a lock that
        # `close` waits for. The process ends then because its socket does.
        if not sys.is_finalizing():
            self.close()

    def close(self) -> None:
        """Ends the process. From any thread; a request that is under way fails."""
        self._is_closed = True
        process = self._process
        if process is not None:
            process.kill()
        with self._lock:
            self._end()


def _reap(process: subprocess.Popen[bytes], parser: weakref.ref[Parser]) -> None:
    """Waits for the end of a process, so that one that was idle is no zombie. Runs in a thread of its own."""
    process.wait()
    found = parser()
    if found is not None:
        found.forget(process)
