"""What a piece of work costs: seconds, processor time and memory of processes, looked at from outside."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

POLL = 0.02
"""Seconds between looks at the memory of a command that runs."""

GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of one thing.

    `size`: bytes of data that went through; `operations`: how many reads; `cpu`: seconds of user and system
    time of what is measured; `server_cpu`: of the bench's server meanwhile; `peak`: bytes, the largest
    resident size; `counts`: what else was counted.
    """

    seconds: float
    size: int = 0
    operations: int = 0
    cpu: float | None = None
    server_cpu: float | None = None
    peak: int | None = None
    counts: Mapping[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Operations a second where there are any, or else bytes."""
        return (self.operations or self.size) / self.seconds if self.seconds else 0.0

    def with_counts(self, **counts: float) -> Sample:
        return replace(self, counts={**self.counts, **counts})


class BenchError(Exception):
    """Something that is measured, or needed for it, does not work."""


def cpu_of(pid: int) -> float:
    """Seconds of processor time that a process that runs has used so far, all its threads together."""
    # The clock of another process, as clock_getcpuclockid(3) makes its number.
    with contextlib.suppress(OSError):
        return time.clock_gettime((~pid << 3) | 2)
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def memory_of(pid: int, what: str = "VmHWM") -> int:
    """Bytes: the largest resident size so far, or `VmRSS`, the one now; 0 where the process is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{what}:"):
                return int(line.split()[1]) << 10
    return 0


def children_of(pid: int) -> list[int]:
    """The processes that a process has started and that run."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def forget_peak(pid: int) -> None:
    """Sets a process's largest resident size back to what it is now, where that is allowed."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


@dataclass(slots=True)
class Ended:
    """A command that has ended. `seconds`: from its start; `cpu`: with all its children; `peak`: its own."""

    seconds: float
    cpu: float
    peak: int
    output: bytes


def run(
    command: Sequence[str | Path],
    *,
    environment: Mapping[str, str] | None = None,
    keep_output: bool = False,
    timeout: float = 3600,
) -> Ended:
    """A command from its start to its end. Raises BenchError where it fails."""
    with _started(command, environment, keep_output=keep_output) as process:
        started = time.perf_counter()
        peak = [0]
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(POLL):
                peak[0] = max(peak[0], memory_of(process.pid))

        kill = threading.Timer(timeout, process.kill)
        watch = threading.Thread(target=look, daemon=True)
        watch.start()
        kill.start()
        errors: list[bytes] = []
        assert process.stderr is not None
        stderr = process.stderr
        reading = threading.Thread(target=lambda: errors.append(stderr.read()), daemon=True)
        reading.start()
        try:
            output = process.stdout.read() if process.stdout is not None else b""
            _pid, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            kill.cancel()
            ended.set()
            watch.join()
        reading.join(5)
    if process.returncode:
        text = b"".join(errors).decode(errors="replace").strip()[-2000:]
        raise BenchError(f"{command[0]} {command[1:]}: status {process.returncode}: {text}")
    return Ended(seconds, usage.ru_utime + usage.ru_stime, peak[0], output)


@contextmanager
def _started(
    command: Sequence[str | Path], environment: Mapping[str, str] | None, *, keep_output: bool
) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if keep_output else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=None if environment is None else dict(environment),
    )
    try:
        yield process
    finally:
        stop(process)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def stop(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """Ends a process that was started here, in order if it goes, and waits for it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass(frozen=True, slots=True)
class Watched:
    """Processes that live longer than what is measured: those that do the work, and the server's."""

    pids: tuple[int, ...]
    server: int | None = None

    def measure(
        self, work: Callable[[], object], *, size: int = 0, operations: int = 0, own_cpu: float = 0.0
    ) -> Sample:
        """`work`, timed, with what the processes used meanwhile."""
        for pid in self.pids:
            forget_peak(pid)
        before = sum(cpu_of(pid) for pid in self.pids)
        server_before = cpu_of(self.server) if self.server else 0.0
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
        return Sample(
            seconds=seconds,
            size=size,
            operations=operations,
            cpu=sum(cpu_of(pid) for pid in self.pids) - before + own_cpu,
            server_cpu=cpu_of(self.server) - server_before if self.server else None,
            peak=sum(memory_of(pid) for pid in self.pids) or None,
        )

    def command(
        self, command: Sequence[str | Path], *, size: int = 0, environment: Mapping[str, str] | None = None
    ) -> Sample:
        """A command that has the processes do something. Its own processor time does not count."""
        return self.measure(lambda: run(command, environment=environment), size=size)


def command(
    words: Sequence[str | Path],
    *,
    size: int = 0,
    environment: Mapping[str, str] | None = None,
    server: int | None = None,
) -> Sample:
    """A command that is itself what is measured."""
    server_before = cpu_of(server) if server else 0.0
    ended = run(words, environment=environment)
    return Sample(
        seconds=ended.seconds,
        size=size,
        cpu=ended.cpu,
        server_cpu=cpu_of(server) - server_before if server else None,
        peak=ended.peak,
    )
