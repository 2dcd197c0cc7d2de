"""Commands that run until they are stopped, with programs of their own that have to end with them."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.support.program import PBSFS, environment
from tests.support.serving import without
from tests.support.waiting import LIMIT, wait_until


class Foreground:
    """A `pbsfs` that runs. `temporary`: where it makes what is temporary."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.process = process
        self.temporary = folder / "t"
        self._output, self._errors = folder / "output", folder / "errors"

    def output(self) -> str:
        """What it printed so far, and what its programs did."""
        return self._output.read_text(errors="replace")

    def errors(self) -> list[str]:
        """The lines on standard error so far."""
        return self._errors.read_text(errors="replace").splitlines()

    def line(self) -> str:
        """The first line that it prints, when that is there."""

        def printed() -> bool:
            assert self.process.poll() is None, (
                f"ended with status {self.process.returncode}: {self.errors()}"
            )
            return "\n" in self.output()

        wait_until(printed, "a line is printed")
        return self.output().splitlines()[0]

    def programs(self, name: str) -> list[int]:
        """The processes of a program that it runs."""
        return [pid for pid in self._group() if _facts(pid)[0] == name]

    def interrupt(self) -> None:
        """Ctrl-C, which all processes at a terminal get."""
        os.killpg(self.process.pid, signal.SIGINT)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """The status with which it ends after a signal."""
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> int:
        """The status with which it ends: and then nothing is left of it, neither running nor on disk."""
        status = self.process.wait(LIMIT)
        # What was killed may take the kernel a moment longer than its parent.
        wait_until(self.no_process_is_left, "nothing is left running")
        assert list(self.temporary.iterdir()) == []
        return status

    def no_process_is_left(self) -> bool:
        return self._group() == []

    def kill(self) -> None:
        """Ends whatever still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in self._group():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(self.no_process_is_left, "all processes have ended")

    def _group(self) -> list[int]:
        """Its processes, but for those that have ended: they are of one group, as it leads one."""
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        facts = {pid: _facts(pid) for pid in pids}
        return [
            pid for pid, (_, state, group) in facts.items() if group == self.process.pid and state not in "ZX"
        ]


def _facts(pid: int) -> tuple[str, str, int]:
    """A process's name, state and group."""
    try:
        head, _, tail = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except (FileNotFoundError, ProcessLookupError):
        return "", "X", 0
    return head.partition("(")[2], tail.split()[0], int(tail.split()[2])


@contextmanager
def foreground(
    *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Iterator[Foreground]:
    """`pbsfs ARGUMENTS`, with directories of its own for what is temporary, short enough for sockets."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        (folder / "t").mkdir()
        told = {**without(dict(env or environment()), "XDG_RUNTIME_DIR"), "TMPDIR": str(folder / "t")}
        output = stack.enter_context((folder / "output").open("wb"))
        errors = stack.enter_context((folder / "errors").open("wb"))
        process = subprocess.Popen(
            [PBSFS, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=told,
            cwd=cwd,
            start_new_session=True,
        )
        running = Foreground(process, folder)
        stack.callback(running.kill)
        yield running
