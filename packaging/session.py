"""The picture of a session at a terminal: real commands on the datastore of `pbsfs demo`, as an animated SVG.

    python packaging/session.py [FILE]

runs them in a terminal of its own, and writes the picture to FILE (default: docs/session.svg). It is the same
each time, because the datastore and the names are, and a command that fails ends the recording. A test
compares docs/session.svg with a new one. Requires /dev/fuse and mke2fs.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

from pbsfs.testing.demo import make_datastore, make_disks

FILE = Path(__file__).resolve().parent.parent / "docs/session.svg"

STEPS = (
    ("What is in the backup of a virtual machine?", "pbsfs ls -lh home:vm/100/latest"),
    (
        "What changed on a host since the first backup?",
        "pbsfs diff home:host/web1/2023-11-14T22:13:20Z home:host/web1/latest",
    ),
    ("All backups as files", "pbsfs mount home: mnt"),
    (None, "ls mnt mnt/vm/100/latest/"),
    ("A file on the disk of the machine", "cat mnt/files/vm/100/latest/scsi0-p1/hello.txt"),
    (None, "pbsfs umount mnt"),
    ("Find a file in all backups", "pbsfs find home:files --name hosts"),
    ("Copy an image; holes stay holes", "pbsfs export home:vm/100/latest/drive-scsi0.img disk.img"),
    ("Read and check everything", "pbsfs verify home:"),
)
"""What the session shows: a comment, and a command for the shell."""

COLUMNS = 88
_ROWS = 50

_COLUMN, _LINE, _EDGE = 8.43, 19, 16
"""Pixels: of a column and a line of the font with 14, and around the text."""

_KEY, _AFTER_COMMENT, _BEFORE_OUTPUT, _AFTER_OUTPUT = 0.035, 0.4, 0.3, 1.4
"""Seconds of the animation."""

_STYLE = """\
svg{--back:#fff;--text:#1f2328;--faint:#656d76;--edge:#d1d9e0;--green:#116329;--yellow:#7d4e00;--red:#a40e26;--cyan:#0b5c73}
@media(prefers-color-scheme:dark){svg{--back:#0d1117;--text:#e6edf3;--faint:#8d96a0;--edge:#30363d;--green:#7ee787;\
--yellow:#e3b341;--red:#ff7b72;--cyan:#79c0ff}}
rect{fill:var(--back);stroke:var(--edge)}
text{fill:var(--text);white-space:pre}
text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.faint{fill:var(--faint)}.green{fill:var(--green)}.cyan{fill:var(--cyan)}
.yellow{fill:var(--yellow)}.red{fill:var(--red)}
.bold{font-weight:bold}
text,tspan{animation:show 1ms backwards}
@keyframes show{from{fill-opacity:0}}
@media(prefers-reduced-motion:reduce){text,tspan{animation:none}}
"""

_SGR = re.compile(r"\x1b\[([0-9;]*)m")
_CLASSES = {"1": "bold", "31": "red", "32": "green", "33": "yellow", "36": "cyan"}


@dataclass(frozen=True, slots=True)
class Step:
    """A command and what it printed. `comment`: what stands above it."""

    comment: str | None
    command: str
    output: str


def record() -> list[Step]:
    """Runs the commands. Exits with a message if one fails or writes to standard error."""
    with tempfile.TemporaryDirectory(prefix="pbsfs-session-") as base:
        place = Path(base)
        store = place / "store"
        make_datastore(store, make_disks(place))
        settings = place / "config/pbsfs/config.toml"
        settings.parent.mkdir(parents=True)
        settings.write_text(f'[profiles.home]\ndatastore-dir = "{store}"\n', "utf-8")
        work = place / "work"
        (work / "mnt").mkdir(parents=True)
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(place),
            "XDG_CONFIG_HOME": str(place / "config"),
            "LC_ALL": "C.UTF-8",
            "TZ": "UTC",
            "TERM": "xterm-256color",
        }
        try:
            return [Step(comment, command, _run(command, work, environment)) for comment, command in STEPS]
        finally:
            with contextlib.suppress(OSError):  # a command failed while the mount was there
                if os.path.ismount(work / "mnt"):
                    subprocess.run(["pbsfs", "umount", work / "mnt"], env=environment, check=False)


def _run(command: str, work: Path, environment: dict[str, str]) -> str:
    """What a command prints to a terminal. Standard error is a pipe: progress would differ each time."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (_ROWS, COLUMNS))
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=errors,
            cwd=work,
            env=environment,
        )
        os.close(theirs)
        output = b"".join(_read(ours))
        os.close(ours)
        status = process.wait()
        errors.seek(0)
        said = errors.read().decode(errors="replace")
    if status or said:
        sys.exit(f"session: '{command}' ended with status {status}: {said}")
    return output.decode().replace("\r\n", "\n").expandtabs()


def _read(terminal: int) -> Iterator[bytes]:
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while data := os.read(terminal, 1 << 16):
            yield data


def drawn(steps: list[Step]) -> str:
    """The picture."""
    picture = _Picture()
    for number, step in enumerate(steps):
        if step.comment is not None:
            if number:
                picture.blank()
            picture.show([(f"# {step.comment}", ("faint",))])
            picture.wait(_AFTER_COMMENT)
        picture.type(step.command)
        picture.wait(_BEFORE_OUTPUT)
        for line in step.output.splitlines():
            for part in _wrapped(_styled(line)):
                picture.show(part)
        picture.wait(_AFTER_OUTPUT if step.output else 0)
    return picture.text()


Run = tuple[str, tuple[str, ...]]
"""Text, and the classes of its style."""


def _styled(line: str) -> list[Run]:
    runs: list[Run] = []
    classes: tuple[str, ...] = ()
    for place, part in enumerate(_SGR.split(line)):
        if place % 2:
            codes = part.split(";")
            kept = () if "0" in codes or not part else classes
            classes = (*kept, *(_CLASSES[code] for code in codes if code in _CLASSES))
        elif part:
            runs.append((part, classes))
    return runs


def _wrapped(runs: list[Run]) -> Iterator[list[Run]]:
    """The lines of a terminal of COLUMNS columns."""
    line: list[Run] = []
    room = COLUMNS
    for text, classes in runs:
        while len(text) > room:
            yield [*line, (text[:room], classes)]
            text, line, room = text[room:], [], COLUMNS  # noqa: PLW2901 - what is left
        line.append((text, classes))
        room -= len(text)
    yield line


class _Picture:
    def __init__(self) -> None:
        self._parts: list[str] = []
        self._lines = 0
        self._time = 0.5

    def wait(self, seconds: float) -> None:
        self._time += seconds

    def blank(self) -> None:
        self._lines += 1

    def show(self, runs: list[Run]) -> None:
        """A line that appears at once."""
        self._lines += 1
        column = 0
        for text, classes in runs:
            kind = f' class="{" ".join(classes)}"' if classes else ""
            delay = f' style="animation-delay:{self._time:.2f}s"'
            self._parts.append(f"<text{self._at(column)}{kind}{delay}>{escape(text)}</text>")
            column += len(text)

    def type(self, command: str) -> None:
        """A line with the prompt, whose characters appear one by one."""
        self.show([("$ ", ("green",))])
        keys = []
        for key in command:
            self._time += _KEY
            keys.append(f'<tspan style="animation-delay:{self._time:.2f}s">{escape(key)}</tspan>')
        self._parts.append(f'<text{self._at(2)} class="bold">{"".join(keys)}</text>')

    def _at(self, column: int) -> str:
        return f' x="{_EDGE + column * _COLUMN:g}" y="{_EDGE + self._lines * _LINE - 5:g}"'

    def text(self) -> str:
        width, height = round(2 * _EDGE + COLUMNS * _COLUMN), 2 * _EDGE + self._lines * _LINE
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" aria-label="A session with pbsfs" xml:space="preserve">'
        )
        frame = f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" fill="#fff"/>'
        return "\n".join([head, f"<style>\n{_STYLE}</style>", frame, *self._parts, "</svg>\n"])


if __name__ == "__main__":
    (Path(sys.argv[1]) if sys.argv[1:] else FILE).write_text(drawn(record()), "utf-8")
